"""Other factors in an adapter that is there, without building or compiling anything again."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT, adapters_called
from minipeft.adapters.state import named_adapters, refuse_merged
from minipeft.lora import LoRALinear

Factors = Mapping[str, tuple[Tensor, Tensor, float]]  # module name: a, b, scaling


def factors_of(model: nn.Module, *, name: str = DEFAULT) -> dict[str, tuple[Tensor, Tensor, float]]:
    """An adapter's a, b and scaling by the names of its modules, for `swap_adapter`.

    Raises:
        ValueError: no such adapter, or one with other layers than LoRALinear.
    """
    found = {}
    for place, layer in _layers("factors_of", model, name).items():
        a, b = layer.factors()
        found[place] = (a.detach(), b.detach(), layer.scaling * layer.scale)
    return found


def _layers(caller: str, model: nn.Module, name: str) -> dict[str, LoRALinear]:
    layers: dict[str, LoRALinear] = {}
    for place, stack in adapters_called(caller, model, name).items():
        if len(stack) != 1 or type(stack[0]) is not LoRALinear:
            kinds = [type(layer).__name__ for layer in stack]
            raise ValueError(f"{caller}: {name!r} has {kinds} over {place!r}; expected LoRALinear")
        layers[place] = stack[0]
    return layers


def swap_adapter(
    model: nn.Module, name: str, other: nn.Module | Factors, *, other_name: str = DEFAULT
) -> list[str]:
    """Let the adapter `name` compute what another one does, in place; returns the modules.

    `other` is a model that has it, as `other_name` (the same architecture, loaded from a file for
    example), or what `factors_of` returns.  A smaller rank is padded with zeros; layers that the
    other one lacks add nothing.  Its scaling goes into B, so that nothing but the values of
    parameters changes: optimisers keep their parameters and a compiled model stays compiled.

    Raises:
        ValueError: no such adapter, a layer that `name` lacks, a rank above a layer's, other sizes,
            a merged model.  Nothing has changed then.
    """
    refuse_merged("swap_adapter", named_adapters(model))
    layers = _layers("swap_adapter", model, name)
    factors = factors_of(other, name=other_name) if isinstance(other, nn.Module) else other
    if unknown := [place for place in factors if place not in layers]:
        raise ValueError(f"swap_adapter: {name!r} has no layer over {unknown[:3]} ({len(unknown)})")
    for place, (a, b, _) in factors.items():
        layer, rank = layers[place], len(a)
        expected = ((rank, layer.in_features), (layer.out_features, rank))
        if (tuple(a.shape), tuple(b.shape)) != expected or rank > layer.rank:
            raise ValueError(
                f"swap_adapter: {place} has factors {tuple(a.shape)} and {tuple(b.shape)}; the "
                f"layer takes (r, {layer.in_features}) and ({layer.out_features}, r), r at most "
                f"{layer.rank}"
            )
    if starts := [place for place, layer in layers.items() if layer.lora_a0 is not None]:
        raise ValueError(f"swap_adapter: {starts[0]} subtracts its start; swap into a plain LoRA")
    with torch.no_grad():
        for place, layer in layers.items():
            a, b, scaling = factors.get(place, (layer.lora_a[:0], layer.lora_b[:, :0], 0.0))
            layer.lora_a[: len(a)].copy_(a)
            layer.lora_b[:, : len(a)].copy_(b * (scaling / layer.scaling))
            layer.lora_a[len(a) :].zero_()
            layer.lora_b[:, len(a) :].zero_()
    return list(layers)
