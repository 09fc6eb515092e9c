"""Fold adapters into weights, or take them off: finished for the whole model, or not begun.

merge(model)                keeps the wrappers; each computes with one dense weight
unmerge(model)              drops those weights; the base was never changed
remove(model)               takes the wrappers off: the original model, bit for bit
remove(model, merge=True)   plain modules with the merged weights, folded layer by layer
"""

import warnings

import torch
from torch import Tensor, nn

from minipeft.adapters import require_adapters
from minipeft.inject import swap
from minipeft.protocol import AdapterLayer, has_stored_weight, is_adapter_layer, is_packed


def _layers(caller: str, model: nn.Module) -> dict[str, AdapterLayer]:
    adapters = require_adapters(caller, model)
    layers = {name: layer for name, layer in adapters.items() if is_adapter_layer(layer)}
    if not layers:
        raise ValueError(f"{caller}: none of the model's adapters wraps a weight")
    return layers


def merge(model: nn.Module) -> list[str]:
    """Let every adapter layer compute with its effective weight, summed in float32, rounded once.

    The weight lies beside the untouched base and in no state dict.  Training while merged raises.
    Merging again recomputes.  Returns the names of the layers.

    Raises:
        ValueError: nothing to merge, or a weight that is not finite; no layer is merged then.
    """
    layers = _layers("merge", model)
    before = {name: layer.merged_weight for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            try:
                layer.merge()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    except BaseException:
        for name, layer in layers.items():
            layer.merged_weight = before[name]
        raise
    return list(layers)


def unmerge(model: nn.Module) -> list[str]:
    """Drop the merged weights.  Returns the names of the layers that were merged.

    Raises:
        ValueError: nothing is merged.
    """
    layers = _layers("unmerge", model)
    merged = [name for name, layer in layers.items() if layer.merged_weight is not None]
    if not merged:
        raise ValueError("unmerge: nothing is merged")
    for name in merged:
        layers[name].unmerge()
    return merged


def remove(model: nn.Module, *, merge: bool = False, requantize: bool = False) -> list[str]:
    """Take every adapter layer off, in place: the bases, or with `merge` their merged copies.

    With `merge`, a dense base's weight is overwritten by the merged one, layer by layer, and an
    NF4 base becomes nn.Linear; `requantize` keeps NF4 and warns of the error that this adds.
    Adapters that wrap nothing (prefixes) stay.  Returns the names.

    Raises:
        ValueError: nothing to remove; a merged weight that is not finite or belongs to two
            modules (tied embeddings).  The model is then as it was.
    """
    layers = _layers("remove", model)
    if not isinstance(merge, bool) or not isinstance(requantize, bool):
        raise TypeError("remove: merge and requantize are True or False")
    every_name = {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if is_adapter_layer(layer)
    }
    if not merge:
        swap(model, {name: layer.base for name, layer in every_name.items()})
        return list(layers)
    _check_foldable(model, layers, requantize)
    plain: dict[int, nn.Module] = {}
    errors: dict[str, float] = {}
    for name, layer in every_name.items():
        if id(layer) not in plain:
            plain[id(layer)] = _fold(name, layer, requantize, errors)
        swap(model, {name: plain[id(layer)]})
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        warnings.warn(
            f"remove: rounding merged weights to NF4 again moved them by {mean:.2%} on average, "
            f"at most {errors[worst]:.2%} ({worst}), in the Frobenius norm",
            stacklevel=2,
        )
    return list(layers)


def _check_foldable(model: nn.Module, layers: dict[str, AdapterLayer], requantize: bool) -> None:
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for name, layer in layers.items():
        if not is_packed(layer.base):
            if requantize:
                raise ValueError(f"remove: {name} has a dense base; requantize is for NF4 bases")
            if not has_stored_weight(layer.base):
                raise ValueError(
                    f"remove: {name} has a base that computes its weight (weight norm, a "
                    "parametrisation); take that off first"
                )
            if holders[id(layer.base.weight)] > 1:
                raise ValueError(
                    f"remove: the weight of {name} belongs to another module too (tied weights); "
                    "merging would change both: untie them first"
                )
        with torch.no_grad():
            if not bool(layer.effective_weight().isfinite().all()):
                raise ValueError(f"remove: the merged weight of {name} holds NaN or Inf")


def _fold(name: str, layer: AdapterLayer, requantize: bool, errors: dict[str, float]) -> nn.Module:
    base = layer.base
    if not is_packed(base):  # in place: no second copy of any other tensor of the base
        with torch.no_grad():
            weight: Tensor = base.weight  # type: ignore[assignment]
            weight.copy_(layer.effective_weight())
        return base
    plain = layer.merged(requantize=requantize)
    if requantize:
        with torch.no_grad():
            exact = layer.effective_weight().float()
            errors[name] = float((plain.weight.float() - exact).norm() / exact.norm())  # type: ignore[operator]
    return plain
