"""A model on the meta device, put into the state that a method trains it in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minipeft.adapters.protocol import is_conv1d
from minipeft.adapters.targets import Head, Target, survey
from minipeft.inject import inject
from minipeft.model.inject_lora import inject_lora
from minipeft.model.quantize import quantizable
from minipeft.qlora import NF4Linear
from minipeft.quantized.conv1d import NF4Conv1D

METHODS = ("full", "lora", "dora", "qlora", "qdora", "prefix", "as_it_is")


def empty_codes(model: nn.Module, head: Head, **settings: Any) -> None:
    """Put 4-bit layers without values where `quantize_model` would put real ones."""
    chosen, _ = quantizable(survey(model, head))
    names = {name for name, layer in chosen.items() if isinstance(layer, nn.Module)}
    if not names:
        raise ValueError("predict_memory: the model has no layer to quantise")

    def make(layer: Any) -> nn.Module:
        conv1d = is_conv1d(layer)
        rows, columns = layer.weight.shape
        sizes = (rows, columns) if conv1d else (columns, rows)
        kind = NF4Conv1D if conv1d else NF4Linear
        made = kind(
            *sizes, bias=layer.bias is not None, dtype=layer.weight.dtype, device="meta", **settings
        )
        if conv1d:
            made.dense_class = type(layer)
        return made.train(layer.training)

    inject(model, lambda name, _: name in names, make, head=head)


def prepare(
    model: nn.Module,
    method: str,
    *,
    rank: int,
    target: Target,
    head: Head,
    quantisation: dict[str, Any],
    attach: Callable[[nn.Module], object] | None,
    options: dict[str, Any],
) -> None:
    """Put the model (on the meta device) into the state that `method` trains.

    `attach` puts a prefix into the model.

    Raises:
        ValueError: an unknown method, or what the functions of the method refuse.
    """
    if method not in METHODS:
        raise ValueError(f"predict_memory: method={method!r}; choose one of {METHODS}")
    if method == "as_it_is":
        return
    if method == "full":
        model.requires_grad_(True)
        return
    if method == "prefix":
        if attach is None:
            raise ValueError("predict_memory: prefixes are predicted for transformers models")
        attach(model)
        return
    if method in ("qlora", "qdora"):
        empty_codes(model, head, **quantisation)
    inject_lora(model, target, rank, dora=method.endswith("dora"), head=head, **options)


def cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """The model's floating-point tensors in this dtype."""
    if dtype is not None:
        if not dtype.is_floating_point:
            raise ValueError(f"predict_memory: dtype={dtype}; expected a floating-point one")
        model.to(dtype)
