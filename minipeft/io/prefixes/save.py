"""Saves a prefix or prompt in minipeft's own format."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT, adapters_called
from minipeft.adapters.replicas import unwrapped
from minipeft.adapters.sharded import own_class
from minipeft.integrations.transformers.prefixes import NAME, Prefix
from minipeft.io.files import check_finite, check_writable
from minipeft.io.gathering import whole
from minipeft.io.heads import head_tensors
from minipeft.io.prefixes.config import CONFIG_NAME, WEIGHTS_NAME, tensors_of
from minipeft.io.replace import Replacement
from minipeft.io.seal import stage
from minipeft.layers.prompt import PromptEncoder
from minipeft.layers.trained import TrainedModule
from minipeft.model.peft_words import in_our_words
from minipeft.prefix import PrefixEncoder


def prefix_of(caller: str, model: nn.Module, name: str) -> tuple[Prefix, Any]:
    """The model's Prefix, and the encoder of that name.

    Raises:
        ValueError: the model has none.
    """
    prefix = getattr(model, NAME, None)
    if not isinstance(prefix, Prefix):
        raise ValueError(f"{caller}: the model has no prefix; attach_prefix first")
    if name not in prefix.encoders:
        raise ValueError(f"{caller}: no prefix {name!r}; the model has {list(prefix.encoders)}")
    return prefix, prefix.encoders[name]


def has_prefix(model: nn.Module, name: str) -> bool:
    """Whether the adapter called `name` has a prefix or prompt."""
    prefix = getattr(model, NAME, None)
    return isinstance(prefix, Prefix) and name in prefix.encoders


def is_prompt(place: str) -> bool:
    """Whether an adapter at this place of the model is a prefix or prompt."""
    return place.startswith(f"{NAME}.")


def has_more_than_prefix(model: nn.Module, name: str) -> bool:
    """Whether the adapter called `name` has layers beside its prefix or prompt and its heads."""
    return any(
        not is_prompt(place) and not isinstance(layer, TrainedModule)
        for place, stack in adapters_called("save_prefix", model, name).items()
        for layer in stack
    )


@in_our_words
def save_prefix(
    model: Any, path: str | os.PathLike[str], *, name: str = DEFAULT,
    reparametrization: bool = False, heads: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write one prefix or prompt, with the `heads` that train with it, to directory `path`.

    `model` is a model that has it attached, or, for attention of your own, the PrefixEncoder
    itself.  An MLP or a prompt's network is folded into what it produces, unless
    `reparametrization`: then training can go on from the file.  Both files are of one save, see
    io/replace.py.

    Of a model that fully_shard has cut, every process calls this: the values are gathered, the
    first process writes, and the others wait for it.  `state_dict` gives values gathered elsewhere,
    under the model's own names; then only the process that writes calls this.

    Raises:
        ValueError: the model has no such prefix, or its values are not here or not finite.  Nothing
            is written then.
        OSError: the disk is full, and the like; the old files are as they were.
    """
    model = model if state_dict is not None else unwrapped(model)
    with whole("save_prefix", model, state_dict) as writes:
        content = describe_prefix(model, name, reparametrization=reparametrization, heads=heads)
        if writes:
            with Replacement(Path(path)) as unit:
                stage(unit, (CONFIG_NAME, WEIGHTS_NAME), *content)


def describe_prefix(
    model: Any, name: str, *, reparametrization: bool, heads: bool
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The configuration and the tensors of one prefix or prompt; arguments as in save_prefix."""
    alone = isinstance(model, PrefixEncoder)
    holder, encoder = (model, model) if alone else prefix_of("save_prefix", model, name)
    settings, tensors = described(encoder, reparametrization)
    states = head_tensors(model, name) if heads and not alone else {}
    config = {
        "format": 1, **settings, "heads": sorted(states),
        "kv_shapes": [list(shape) for shape in holder.kv_shapes],
    }  # fmt: skip
    if alone:  # no model is known, so positions and windows are the attention's own
        own = ["own"] * len(model.kv_shapes)
        config |= {"kind": "encoder", "locations": own, "position": "own", "window": "own"}
    else:
        config |= {
            "position": holder.position, "window": holder.window, "locations": holder.locations,
            "layers": holder.layers,
            "model": own_class(model).__name__,
            "model_type": getattr(model.config, "model_type", ""),
        }  # fmt: skip
    for place, state in states.items():
        tensors |= {f"head.{place}.{key}": value for key, value in state.items()}
    check_writable(tensors)
    check_finite("save_prefix", tensors)
    return config, tensors


def described(encoder: Any, reparametrization: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What to write of an encoder: how to build it, and its tensors."""
    if isinstance(encoder, PrefixEncoder):
        settings = {
            "kind": "prefix", "prefix_length": encoder.prefix_length, "dropout": encoder.dropout,
            "frozen": encoder.frozen, "gated": encoder.gated,
        }  # fmt: skip
        if reparametrization and encoder.hidden is not None:
            sizes = {"hidden": encoder.hidden, "embedding_dim": encoder.embedding.shape[1]}
            return {**settings, **sizes}, tensors_of(encoder, folded=False)
        return settings, tensors_of(encoder, folded=True)
    source = encoder.source
    settings = {"prefix_length": source.prompt_length, "embedding_dim": source.embedding_dim}
    if isinstance(source, PromptEncoder) and reparametrization:
        more = {"kind": "prompt_encoder", "hidden": source.hidden, "network": "mlp"}
        return {**settings, **more}, tensors_of(source, folded=False)
    return {**settings, "kind": "prompt"}, tensors_of(source, folded=True)
