"""Loads a PEFT directory into the layers that a model sharded by `fully_shard` has already.

Layers cannot be put into shards.  Where the model has the adapter's layers, injected before it was
cut, each process reads the file and takes its part of every tensor.
"""

import math
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from minipeft.adapters.names import adapters_called
from minipeft.adapters.plain_names import PlainNames
from minipeft.adapters.sharded import agreed, own_class, resharded
from minipeft.adapters.state import (
    checked_state,
    copy_state,
    named_adapters,
    named_tensors,
    refuse_merged,
)
from minipeft.io.fields import read_config
from minipeft.io.files import check_values
from minipeft.io.peft.config import CONFIG_NAME, PROMPT_KINDS, checked
from minipeft.io.peft.contents import sort_out
from minipeft.io.peft.folder import read_weights, weights_file
from minipeft.io.peft.located import locate
from minipeft.io.peft.matched import MatchedConfig, matched
from minipeft.io.peft.tensors import parameters
from minipeft.io.peft.training import PLAIN, Training, parsed
from minipeft.io.replace import read_whole
from minipeft.layers.fused import LoRAFusedLinear
from minipeft.layers.mixture import LoRAExperts
from minipeft.lora import LowRank, lora_scaling
from minipeft.model.rows import refuse_rows

_CALLER = "load_peft"
_BEFORE = "load it first, in every process, then fully_shard the model"
_NEAR = 1e-9  # two ways to write one scaling differ by rounding


def load_into_shards(model: nn.Module, directory: Path, name: str, *, strict: bool) -> list[str]:
    """Fill the adapter `name` of a sharded model from a directory; returns its modules' names.

    Every process must call it.  Only values change: ranks, scalings and kinds of the layers must be
    those of the file.

    Raises:
        ValueError, OSError: as load_peft; a file with more than LoRA or DoRA, or of other layers
            than the model has; in any process: then all raise.  The model is as it was.
    """
    mesh = resharded(model)
    with agreed(_CALLER, mesh):
        refuse_merged(_CALLER, named_adapters(model))
        refuse_rows(_CALLER, model)
        state = read_whole(directory, lambda: _state(model, directory, name, strict=strict))
        own, _ = named_tensors(_CALLER, model, name)
        missing = [key for key in own if key not in state]
        chosen, _ = checked_state(_CALLER, own, state, missing, strict=True)
    copy_state(_CALLER, mesh, own, chosen)
    return list(adapters_called(_CALLER, model, name))


def _state(model: nn.Module, directory: Path, name: str, *, strict: bool) -> dict[str, Tensor]:
    """The file's tensors by the names that `named_tensors` gives."""
    content = read_config(directory / CONFIG_NAME, "PEFT or save_peft", "prefix_config.json",
                          "load_prefix")  # fmt: skip
    if content.get("peft_type") in PROMPT_KINDS:
        raise ValueError(
            f"{directory}: holds a prefix or prompt, and the model's parameters are shards "
            f"(DTensor); {_BEFORE}"
        )
    where = weights_file(directory)
    plain = checked(content, strict=strict)
    tensors, training = read_weights(directory, content)
    found = locate(model, tensors, str(where))
    for key, said in found.keys.items():
        if said.role != "unknown" and not said.role.startswith("lora_"):
            raise ValueError(
                f"{where}: {key:.80} is more than LoRA, and the model's parameters are shards "
                f"(DTensor); {_BEFORE}"
            )
    config = matched(plain, found, CONFIG_NAME)
    training_of = parsed(training, str(where))
    contents = sort_out(where, tensors, model, config, found, training_of)
    if wrong := contents.complaint():
        raise ValueError(f"{where}: {wrong}")
    places = PlainNames(model).by_plain(adapters_called(_CALLER, model, name))
    if other := sorted(places.keys() ^ contents.low_rank.keys()):
        raise ValueError(
            f"{where}: {other[0]} is not in both the file and the adapter {name!r} of the model "
            f"({len(other)} such modules), whose parameters are shards (DTensor); {_BEFORE}"
        )
    state: dict[str, Tensor] = {}
    for place, stack in places.items():
        layer = _checked(f"{where}: {place}", place, stack, config, training_of.get(place, PLAIN))
        values = parameters(f"{where}: {place}", layer, contents.low_rank[place])
        check_values(f"{where}: {place}", values, layer.adapter_parameters())
        state |= {f"{place}.{own}": value for own, value in values.items()}
    return state


def _checked(
    where: str, place: str, stack: list[Any], config: MatchedConfig, training: Training
) -> LowRank:
    """The layer over one module, if the file says the same of it as the model does."""
    layer, plain = stack[0], config.config
    kinds = [own_class(one).__name__ for one in stack]
    simple = len(stack) == 1 and isinstance(layer, LowRank)
    if not simple or isinstance(layer, LoRAFusedLinear | LoRAExperts) or layer.lora_a0 is not None:
        raise ValueError(
            f"{where}: the model has {kinds} here, whose parameters are shards (DTensor); {_BEFORE}"
        )
    rank = config.rank_of(place)
    scaling = lora_scaling(config.alpha_of(place), rank, rank_stabilized=plain.rank_stabilized)
    dora = "magnitude" in layer._parameters
    file = _said(rank, scaling, plain.dropout, dora=plain.dora)
    mine = _said(layer.rank, layer.scaling, layer.dropout, dora=dora)
    near = math.isclose(scaling, layer.scaling, rel_tol=_NEAR)
    same = (rank, plain.dropout, plain.dora) == (layer.rank, layer.dropout, dora) and near
    if not same or training.slices or training.start:
        more = " with slices" if training.slices else " with a start" if training.start else ""
        raise ValueError(
            f"{where}: the file has {file}{more}, the model {mine}, whose parameters are shards "
            f"(DTensor) and keep their shapes; {_BEFORE}"
        )
    return cast(LowRank, layer)


def _said(rank: int, scaling: float, dropout: float, *, dora: bool) -> str:
    kind = "DoRA" if dora else "LoRA"
    return f"{kind} of rank {rank}, scaling {scaling:g} and dropout {dropout:g}"
