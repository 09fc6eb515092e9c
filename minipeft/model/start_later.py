"""Adapters that were injected on the meta device: they get their start when the base has values.

On the meta device nothing has values, so `inject_lora` and `inject_qlora` give factors their shapes
there, and note how they are to start.  `load_quantized` starts them once it has filled the base.

    noted(layer, init)                    wrap_in_lora: how this layer starts
    waiting("load_quantized", model)      the layers that have no values yet
    settings_of(layer)                    what processes compare before they start them
    start(layers, device, place)          A random and B zero, or as `init` says

The layers start in the order of the model, as they do when they are injected: with the same random
numbers, a model that is filled later has the same bits.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import is_adapter
from minipeft.adapters.state import named_adapters
from minipeft.layers.dora import DoRA
from minipeft.lora import LowRank

_START = "_minipeft_start"  # in the __dict__ of a layer: its init, None for A random and B zero
Place = Callable[[Tensor, nn.Parameter], nn.Parameter]  # (values, the parameter on meta)


def noted(layer: nn.Module, init: Any) -> nn.Module:
    """The layer, with a note of its start if it has no values yet."""
    if isinstance(layer, LowRank) and layer.lora_a.is_meta:
        vars(layer)[_START] = init
    return layer


def settings_of(layer: LowRank) -> tuple[object, ...]:
    """What decides the start of a layer that waits, so that processes can compare it."""
    init = vars(layer).get(_START)
    name = getattr(init, "__qualname__", type(init).__qualname__)
    return type(layer).__qualname__, layer.rank, layer.scaling, layer.dropout, name


def waiting(caller: str, model: nn.Module) -> dict[str, LowRank]:
    """The adapter layers whose parameters are on the meta device, by name.

    Raises:
        ValueError: one whose start is not known: it was not made by inject_lora or inject_qlora.
    """
    found: dict[str, LowRank] = {}
    for name, layer in named_adapters(model).items():
        assert isinstance(layer, nn.Module) and is_adapter(layer)
        if not any(p.is_meta for p in layer.adapter_parameters().values()):
            continue
        if not isinstance(layer, LowRank) or _START not in vars(layer):
            raise ValueError(
                f"{caller}: {name} ({type(layer).__name__}) is an adapter on the meta device whose "
                "start is not known; add it after the weights are loaded (only inject_lora and "
                "inject_qlora plan for later)"
            )
        found[name] = layer
    return found


def start(layers: Mapping[str, LowRank], device: torch.device, place: Place) -> None:
    """Give these layers their start; `place` makes the parameter that takes the place of meta's.

    Raises:
        ValueError: an `init` that the layer refuses; the layer is named.
    """
    for name, layer in layers.items():
        metas = {own: p for own, p in layer.adapter_parameters().items() if p.is_meta}
        for own, meta in metas.items():
            empty = torch.empty(meta.shape, dtype=meta.dtype, device=device)
            layer._parameters[own] = nn.Parameter(empty, meta.requires_grad)
        try:
            layer.initialize(vars(layer)[_START])
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from error
        if isinstance(layer, DoRA):
            lengths = layer.norms(layer.scaling).to(metas["magnitude"].dtype)
            layer._parameters["magnitude"] = nn.Parameter(lengths)
        for own, meta in metas.items():
            value = layer._parameters[own]
            assert value is not None
            layer._parameters[own] = place(value.detach(), meta)
        vars(layer).pop(_START)
