"""Fold adapters into weights, or take them off.

merge(model)                keeps the layers; each stack computes with one plain module
unmerge(model)              drops those modules; the base was never changed
remove(model)               takes the layers off: the original model, bit for bit
remove(model, name="fr")    takes one adapter off and leaves the others
remove(model, merge=True)   plain modules with the merged weights, folded layer by layer

An error leaves the model as it was; only once folding has begun it cannot, since no second copy of
the weights is kept.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import adapters_called, named, stacks
from minipeft.adapters.prefix_holder import holds_prefixes
from minipeft.adapters.protocol import (
    Adapter,
    AdapterLayer,
    innermost,
    is_adapter_layer,
    is_packed,
    wraps_module,
)
from minipeft.adapters.sharded import is_sharded_module, refuse_shards
from minipeft.adapters.state import named_adapters, refuse_merged, require_adapters
from minipeft.adapters.targets import shared_parameters
from minipeft.inject import put, restoring, swap, tell
from minipeft.model.dense_again import forget_codes
from minipeft.model.peft_words import in_our_words
from minipeft.model.rows import refuse_rows

_IN_ONE_PROCESS = (
    "save_peft writes the adapter of shards: load it into the plain model in one process, and "
    "merge there"
)


def _layer_stacks(
    caller: str, model: nn.Module, takes: Callable[[object], bool] = is_adapter_layer
) -> dict[str, list[Any]]:
    """The stacks of layers that can be merged (or `takes`) by module name, outermost first."""
    adapters = require_adapters(caller, model)
    refuse_rows(caller, model)
    found: dict[str, list[Any]] = {}
    for name, stack in stacks(model).items():
        layers = [layer for layer in stack if takes(layer)]
        if layers:
            found[name] = layers
    if not found:
        place, adapter = next(iter(adapters.items()))
        why = "has no `base` that could be put back in its place"
        if takes is is_adapter_layer:
            why = (
                "is not folded into a weight: a prefix or prompt stays as it is (its bake() drops "
                "an MLP), and a layer of your own needs `base` and `merge`"
            )
        raise ValueError(f"{caller}: {place or 'the model'}, a {type(adapter).__name__}, {why}")
    return found


@in_our_words
def merge(model: nn.Module) -> list[str]:
    """Let every stack of adapter layers compute with its effective weights, rounded once.

    The weights are summed in float32 or better, over the adapters that are on.  They lie beside the
    untouched base, and no state dict holds them.  Training while merged raises.  Merging again
    recomputes.  Returns the names of the modules.

    Raises:
        ValueError: nothing to merge, a weight that is not finite, a module below an adapter that
            is not proved to compute the formula of its kind (linearity.py), shards of fully_shard;
            no layer is merged then.
    """
    found = _layer_stacks("merge", model)
    refuse_shards("merge", model, _IN_ONE_PROCESS)
    outermost = {n: next((x for x in stack if x.enabled), None) for n, stack in found.items()}
    chosen = {name: layer for name, layer in outermost.items() if layer is not None}
    if not chosen:
        raise ValueError("merge: every adapter is off; see use_adapters and disable_adapters")
    _refuse_unfoldable("merge", chosen)
    with restoring(model):
        for layer in (layer for stack in found.values() for layer in stack):
            layer.unmerge()
        for name, layer in chosen.items():
            try:
                layer.merge()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return list(chosen)


def _refuse_unfoldable(caller: str, layers: Mapping[str, AdapterLayer]) -> None:
    """Raise unless the module below each layer computes the formula of its kind.

    A layer without a method `why_not_foldable`, of somebody else's, is not asked.
    """
    for place, layer in layers.items():
        ask = getattr(layer, "why_not_foldable", None)
        if ask is not None and (reason := ask()):
            raise ValueError(
                f"{caller}: {place}: {reason}; an adapter cannot be folded into it: leave it "
                "unmerged (it runs as it is), or take it off with remove(model)"
            )


def unmerge(model: nn.Module) -> list[str]:
    """Drop the merged modules.  Returns the names of the modules that were merged.

    Raises:
        ValueError: nothing is merged.
    """
    merged = [
        (name, layer)
        for name, stack in _layer_stacks("unmerge", model).items()
        for layer in stack
        if layer.merged_module is not None
    ]
    if not merged:
        raise ValueError("unmerge: nothing is merged")
    for _, layer in merged:
        layer.unmerge()
    return list(dict.fromkeys(name for name, _ in merged))


@in_our_words
def remove(
    model: nn.Module, *, merge: bool = False, requantize: bool = False, name: str | None = None
) -> list[str]:
    """Take adapters off, in place: all of them, or with `name` one.

    With `merge`, the merged weights (of the adapters that are on) overwrite the weights of dense
    bases, one layer after the other, and NF4 bases become dense; `requantize` keeps NF4 and warns
    of the error that this adds.  Prefixes and prompts are taken off too, with the heads that came
    with them; with `merge` they stay, since no weight could hold them (`bake` drops their network).
    A layer of your own leaves too, if it has a `base`.  A model without 4-bit layers no longer says
    that it is 4-bit.  Returns the names of the modules.

    Raises:
        ValueError: nothing to remove; a module below an adapter that is not proved to compute the
            formula of its kind (with `merge`); a merged weight that is not finite or belongs to two
            modules (tied embeddings); `merge` of one adapter among others (switch the others off
            or remove them first); shards (with `merge`), or fully_shard called on an adapter layer
            itself.  The model is then as it was.
    """
    if not isinstance(merge, bool) or not isinstance(requantize, bool):
        raise TypeError("remove: merge and requantize are True or False")
    refuse_rows("remove", model)
    if name is not None:
        adapters_called("remove", model, name)
        refuse_merged("remove", named_adapters(model))
        if merge:
            raise ValueError(
                f"remove: merging {name!r} alone would leave the others on a changed base; "
                "use_adapters, then remove(model, merge=True) folds those that are on and drops all"
            )
    if merge:
        found = _layer_stacks("remove", model)
        refuse_shards("remove(merge=True)", model, _IN_ONE_PROCESS)
        _check_foldable(model, found, requantize)
        _fold_all(model, found, requantize)
        forget_codes(model)
        return list(found)
    layers = {
        id(layer)
        for own, places in named(model).items() if name in (None, own)
        for stack in places.values() for layer in stack if wraps_module(layer)
    }  # fmt: skip
    for place, layer in model.named_modules():
        if id(layer) in layers and is_sharded_module(layer):
            raise ValueError(
                f"remove: fully_shard was called on {place} itself, an adapter layer, and without "
                "it nothing gathers what is below; take it off before fully_shard, or call that on "
                "the block that holds it"
            )
    prefixes: list[tuple[str, Any, str]] = [
        (place, holder, own)
        for place, holder in model.named_modules()
        if holds_prefixes(holder)
        for own in holder.encoders if name in (None, own)
    ]  # fmt: skip
    found = _layer_stacks("remove", model, wraps_module) if layers or not prefixes else {}
    with restoring(model):
        if found:
            _take_off(model, found, layers)
        for _, holder, own in prefixes:  # after what may fail: their hooks go with the last
            holder.remove(name=own, heads=False)
    touched = [place for place, stack in found.items() if any(id(x) in layers for x in stack)]
    for layer in (layer for stack in found.values() for layer in stack if id(layer) in layers):
        if restore := getattr(layer, "restore_base", None):  # LoftQ changed its base's codes
            restore()
    return [f"{place}.encoders.{own}" for place, _, own in prefixes] + touched


def original(layer: nn.Module | AdapterLayer) -> nn.Module | nn.Parameter:
    """What stood in the model where this stack of layers is."""
    plain = innermost(layer)  # type: ignore[arg-type]
    unwrap = getattr(plain, "original", None)  # of a module that was made around a parameter
    made: nn.Module | nn.Parameter = plain if unwrap is None else unwrap()
    return made


def _take_off(model: nn.Module, found: dict[str, list[Any]], gone: set[int]) -> None:
    """Take these layers off, by their ids; the others of a stack close the gap."""
    outermost: dict[int, nn.Module | nn.Parameter] = {}
    for stack in found.values():
        kept: nn.Module = innermost(stack[-1])
        stays = [layer for layer in reversed(stack) if id(layer) not in gone]
        for layer in stays:
            layer.base, kept = kept, layer
        outermost[id(stack[0])] = kept if stays else original(kept)
    swap(model, {
        place: outermost[id(module)]
        for place, module in model.named_modules(remove_duplicate=False)
        if id(module) in outermost and outermost[id(module)] is not module
    })  # fmt: skip


def _check_foldable(
    model: nn.Module, found: dict[str, list[AdapterLayer]], requantize: bool
) -> None:
    shared = shared_parameters(model)
    on = {p: stack[0] for p, stack in found.items() if any(layer.enabled for layer in stack)}
    _refuse_unfoldable("remove", on)
    for place, stack in found.items():
        plain = innermost(stack[0])  # type: ignore[arg-type]
        if requantize and not is_packed(plain):
            raise ValueError(f"remove: {place} has a dense base; requantize is for NF4 bases")
        with torch.no_grad():
            try:
                values = stack[0].effective_parameters()
            except ValueError as error:
                raise ValueError(f"remove: {place}: {error}") from error
        reason = getattr(stack[0], "fold_reason", None)
        if reason is not None and (why := reason()):
            raise ValueError(f"remove: {place}: {why}")
        for own, value in values.items():
            in_place = not is_packed(plain) and getattr(stack[0], "folds_into_base", True)
            if in_place and id(plain.get_parameter(own)) in shared:
                raise ValueError(
                    f"remove: the {own} of {place} belongs to another module too (tied weights); "
                    "merging would change both: untie them first"
                )
            if not bool(value.isfinite().all()):
                raise ValueError(f"remove: the merged {own} of {place} holds NaN or Inf")


def _fold_all(model: nn.Module, found: dict[str, list[AdapterLayer]], requantize: bool) -> None:
    outermost = {id(stack[0]) for stack in found.values()}
    plain: dict[int, nn.Module | nn.Parameter] = {}
    errors: dict[str, float] = {}
    for place, layer in list(model.named_modules(remove_duplicate=False)):
        if id(layer) not in outermost or not is_adapter_layer(layer):
            continue
        if id(layer) not in plain:
            folded = layer.fold(requantize=requantize)
            if requantize:
                errors[place] = _relative_error(folded, layer)
            plain[id(layer)] = original(folded)
        put(model, {place: plain[id(layer)]})
    tell(model)
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        warnings.warn(
            f"remove: rounding merged weights to NF4 again moved them by {mean:.2%} on average, "
            f"at most {errors[worst]:.2%} ({worst}), in the Frobenius norm",
            stacklevel=4,
        )


def _relative_error(folded: nn.Module, layer: Adapter | AdapterLayer) -> float:
    with torch.no_grad():
        exact = layer.exact_parameters().get("weight")  # type: ignore[union-attr]
        if exact is None:
            return 0.0
        weight: Tensor = folded.weight  # type: ignore[assignment]
        return float((weight.float() - exact.float()).norm() / exact.float().norm())
