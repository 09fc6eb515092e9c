"""What else trains: biases, whole modules, single rows of an embedding.

    train_biases(model, "lora_only")            biases of the layers that have LoRA, or "all"
    train_modules(model, ["lm_head"])           modules as a whole, by a copy of each
    train_tokens(model, tokenizer.convert_tokens_to_ids(new))
    tie_heads(model)                             heads that share an embedding's weight follow it

The base stays as it is: all of these are adapters, saved and taken off like the others.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from minipeft.adapters.names import DEFAULT, adapters_called, give_name, named, stacks
from minipeft.adapters.protocol import innermost, is_adapter
from minipeft.adapters.ready import check_model
from minipeft.adapters.state import named_adapters, refuse_merged
from minipeft.adapters.targets import Names, Target, find, settled, survey
from minipeft.inject import build, freeze, restoring, swap
from minipeft.layers.bias import LoRABias
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.layers.tied import LoRATiedLinear, tied_heads
from minipeft.layers.trained import TrainedBias, TrainedLogits, TrainedModule, TrainedTokens
from minipeft.lora import LowRank
from minipeft.model.peft_words import in_our_words
from minipeft.model.rows import refuse_rows

BIAS_MODES = ("all", "lora_only")


def _wrap(model: nn.Module, name: str, modules: dict[str, Any], make: Any) -> None:
    refuse_merged("train", named_adapters(model))
    refuse_rows("train", model)
    with restoring(model):
        made = build(modules, make)
        swap(model, made)
        give_name(name, made.values())
        freeze(model)


def train_biases(model: nn.Module, mode: str = "lora_only", *, name: str = DEFAULT) -> Names:
    """Train biases of the model, each by a delta beside the frozen one.

    With `mode` "lora_only", the biases of modules that have LoRA of the adapter called `name`; with
    "all", every bias that a module adds to its output.  Returns the names of the modules;
    `.left_out` names those whose bias is out of reach (attention and recurrent layers use it
    inside).

    Raises:
        ValueError: another mode, no such adapter, no bias to train, biases that train already.
    """
    check_model("train_biases", model)
    if mode not in BIAS_MODES:
        raise ValueError(f"train_biases: mode={mode!r}; choose one of {BIAS_MODES}")
    modules: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    places = survey(model)
    if mode == "lora_only":
        lora = adapters_called("train_biases", model, name)
        wanted = {place: model.get_submodule(place) for place, stack in lora.items()
                  if any(isinstance(layer, LowRank) for layer in stack)}  # fmt: skip
    else:
        wanted = places.modules
    for place, module in wanted.items():
        plain = innermost(module)
        if place in places.in_attention:
            left_out[place] = places.in_attention[place]
            continue
        if getattr(plain, "bias", None) is None or "bias" not in plain._parameters:
            if isinstance(plain, nn.MultiheadAttention | nn.RNNBase):
                left_out[place] = f"{type(plain).__name__} uses its biases inside"
            continue
        modules[place] = module
    chosen = {id(module) for module in modules.values()}  # a shared one under each of its names
    modules = {n: m for n, m in places.modules.items() if id(m) in chosen}
    taken = [p for p, s in stacks(model).items() if any(isinstance(a, TrainedBias) for a in s)]
    if twice := sorted(set(taken) & set(modules)):
        raise ValueError(f"train_biases: {twice[:3]} train already ({len(twice)} in all)")
    if not modules:
        hint = "; mode='all' takes those of other modules too" if mode == "lora_only" else ""
        more = f"; left out: {left_out}" if left_out else ""
        raise ValueError(f"train_biases: mode={mode!r} finds no bias to train{hint}{more}")
    _wrap(model, name, modules, lambda _, module: TrainedBias(module))
    return Names(modules, left_out)


@in_our_words
def train_modules(
    model: nn.Module, target: Target, *, name: str = DEFAULT, dtype: torch.dtype | None = None
) -> Names:
    """Train the modules that `target` names as a whole: a classification head, new embeddings.

    Each gets a trainable copy; the original stays frozen below it.  Copies of 16-bit modules are
    float32, unless `dtype` says something else.  If two modules that share a weight are both named,
    their copies share it too; if only one of them is named, a warning says that its copy does not
    follow the other.  Returns the names.

    Raises:
        ValueError: nothing matches, a module without parameters, with 4-bit codes or adapters.
            The model is then as it was.
    """
    check_model("train_modules", model)
    places = survey(model)
    modules = settled("train_modules", places, find(places, target).chosen)
    for place, module in modules.items():
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"train_modules: {place} is a parameter; name the module that holds it, or wrap it "
                "by inject_lora"
            )
        if is_adapter(module):
            raise ValueError(
                f"train_modules: {place} has an adapter already ({type(module).__name__}), which "
                "trains; to train the module as a whole take that off first (minipeft.remove)"
            )
    inside = {id(p) for module in modules.values() for p in module.parameters()}
    chosen = {id(part) for module in modules.values() for part in module.modules()}
    outside = {id(p) for part in model.modules() if id(part) not in chosen
               for p in part.parameters(recurse=False)}  # fmt: skip
    if inside & outside:
        warnings.warn(
            f"train_modules: {list(modules)} share a weight with other modules (tied embeddings), "
            "whose weight stays as it is; name both to keep them tied",
            stacklevel=3,
        )
    memo: dict[int, Any] = {}
    _wrap(model, name, modules, lambda _, module: TrainedModule(module, dtype=dtype, memo=memo))
    return Names(modules)


def train_tokens(
    model: nn.Module,
    token_ids: Iterable[int],
    *,
    target: Target | None = None,
    name: str = DEFAULT,
) -> Names:
    """Train the embedding rows of these tokens, and of no others.

    `target` names the embedding; None means what `get_input_embeddings()` returns.  A head that
    shares the table's weight multiplies by the trained rows too; a LoRA of its own lies above that.
    Returns the names of the modules.

    Raises:
        ValueError: no embedding; ids outside the table; a table whose rows train already.
    """
    check_model("train_tokens", model)
    places = survey(model)
    ids = list(token_ids)
    if target is None:
        getter = getattr(model, "get_input_embeddings", None)
        table = getter() if callable(getter) else None
        if table is None:
            raise ValueError("train_tokens: the model names no input embedding; pass target=")
        found = {n: m for n, m in places.modules.items() if m is table}
    else:
        found = find(places, target).chosen
    modules = settled("train_tokens", places, found)
    for place, module in modules.items():
        if any(isinstance(a, TrainedTokens) for a in stacks(model).get(place, [])):
            raise ValueError(f"train_tokens: rows of {place} train already; remove it first")
        if not isinstance(innermost(module), nn.Embedding):
            raise ValueError(
                f"train_tokens: {place} is a {type(innermost(module)).__name__}, no nn.Embedding"
            )
    weights = {id(innermost(module).weight): place for place, module in modules.items()}
    heads = {
        n: m for n, m in places.modules.items()
        if isinstance(innermost(m), nn.Linear) and id(innermost(m).weight) in weights
    }  # fmt: skip
    made: dict[str, TrainedTokens] = {}

    def make(place: str, module: nn.Module) -> nn.Module:
        if place in below:
            return TrainedLogits(module, made[weights[id(innermost(module).weight)]])
        made[place] = TrainedTokens(module, ids)
        return made[place]

    below = dict(_below_lora(place, module) for place, module in heads.items())
    _wrap(model, name, {**modules, **below}, make)
    return Names([*modules, *heads])


def _below_lora(place: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The module below a head's own LoRA and biases, with its name."""
    while (
        isinstance(module, LowRank | LoRABias | TrainedBias)
        and "magnitude" not in module._parameters  # DoRA's norms are of the weight below
    ):
        place, module = f"{place}.base", module.base
    return place, module


def tie_heads(model: nn.Module, *, name: str = DEFAULT) -> Names:
    """Let every head that shares its weight with an embedding follow the embedding's LoRA.

    Without this the adapter acts on the input side only.  Returns the names of the heads.

    Raises:
        ValueError: no such adapter or head, or a head that has an adapter of this name.
    """
    check_model("tie_heads", model)
    called = adapters_called("tie_heads", model, name)
    tables = [x for stack in called.values() for x in stack if isinstance(x, LoRAEmbedding)]
    found = tied_heads(model, tables)
    if not found:
        raise ValueError(
            "tie_heads: no linear layer shares its weight with an embedding that has LoRA called "
            f"{name!r}; the model has {sorted(named(model))}"
        )
    twice = [p for p in found if any(a in called.get(p, []) for a in stacks(model).get(p, []))]
    if twice:
        raise ValueError(f"tie_heads: {twice} have an adapter {name!r} already; remove it first")
    heads = {place: module for place, (module, _) in found.items()}
    _wrap(model, name, heads, lambda place, module: LoRATiedLinear(module, found[place][1]))
    return Names(heads)
