"""What was loaded, put into the model: the last step, after which nothing can be refused."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.inject import put
from minipeft.io.bitsandbytes.plan import Plan
from minipeft.qlora import NF4Linear, PackedModule


def check_ties(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the file has two values for tensors that the model ties."""
    by_id: dict[int, Tensor] = {}
    for name, value in tensors.items():
        first = by_id.setdefault(id(plan.own[name]), value)
        if first is not value and not _equal(first, value):
            raise ValueError(
                f"{name}: tied to another tensor in the model, but the file has two values; untie "
                "them (tie_word_embeddings=False)"
            )


def _equal(first: Any, value: Any) -> bool:
    if hasattr(first, "to_local"):  # of shards each process compares its own
        first, value = first.to_local(), value.to_local()
    return torch.equal(first, value)


def assign(
    plan: Plan,
    layers: Mapping[str, PackedModule],
    tensors: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> list[str]:
    """Put everything into the model; the names of the 4-bit layers.

    A layer that is 4-bit already stays, and gets the codes of the one that was made for it.
    """
    own, here = plan.own, plan.model
    by_id: dict[int, Tensor] = {}
    for name, value in tensors.items():
        by_id.setdefault(id(own[name]), value)
    made = {id(own[name]): _as(own[name], by_id[id(own[name])])
            for name in own if id(own[name]) in by_id}  # fmt: skip
    for name, old in own.items():
        if id(old) in made:
            holder, last = here.holder(name)
            setattr(holder, last, made[id(old)])
    for name, value in buffers.items():  # by the names of the model itself
        path, _, last = name.rpartition(".")
        holder = here.model.get_submodule(path)
        setattr(holder, last, _as(getattr(holder, last), value))
    order = {name: number for number, name in enumerate(own)}
    names: list[str] = []
    places: dict[str, nn.Module | nn.Parameter] = {}
    replaced: dict[int, PackedModule] = {}
    for name, layer in sorted(layers.items(), key=lambda item: order[item[0]]):
        place = plan.places[name]
        if isinstance(place, PackedModule):
            _take(place, layer)
        elif isinstance(place, nn.Parameter):
            places[name] = layer
        else:
            bias = place.bias
            if bias is not None and isinstance(layer, NF4Linear):
                layer.bias = nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[operator]
            replaced[id(place)] = layer
        names.append(name if isinstance(place, nn.Parameter) else name.removesuffix(".weight"))
    ids = {id(plan.places[name]) for name in layers}
    for path, module in here.modules.items():  # under its other names too
        if id(module) in ids and path not in names:
            names.append(path)
    for path, module in here.model.named_modules(remove_duplicate=False):
        if id(module) in replaced:
            places[path] = replaced[id(module)]
    put(here.model, places)
    return names


def _as(old: Any, value: Tensor) -> Tensor:
    """The value as what stands there: a parameter, or a buffer."""
    if not isinstance(old, nn.Parameter):
        return value
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value, old.requires_grad)


def _take(place: PackedModule, layer: PackedModule) -> None:
    """Let a layer that is there have the codes of this one, and be as the file says."""
    for name, value in layer.packed_parameters().items():
        place._parameters[name] = value
    if layer.codebook is None:
        place._parameters.pop("codebook_bytes", None)
    place.weight_dtype = layer.weight_dtype
    if getattr(layer, "compute_dtype", None) is not None:
        place.compute_dtype = layer.compute_dtype
