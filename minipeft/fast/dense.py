"""Frozen 16-bit linear layers on a CPU without products of 16 bits: panels of float32.

torch computes such a layer by plain loops: with more than a few rows 3 to 6 times as long as what
is here, and its input gradient 12 to 200 times.  Here, as in the product with a 4-bit weight, a
panel of the weight is turned to float32 in a buffer that stays in the cache, and multiplied from
there (panels.py).  The result is rounded once; nothing of the weight's size is kept.

An adapter calls its base by `call` (adapters/products.py), which comes here.  Whatever is not a
plain nn.Linear with a frozen weight is called as it is, and so is everything while torch.compile, a
transform of torch.func or a mode of torch's dispatcher looks on.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from minipeft.adapters import products
from minipeft.adapters.products import cast, product_dtype, without_autocast
from minipeft.fast import panels
from minipeft.ops import OPERATORS, Packed, nobody_listens, plain_row

# up to here torch's own product is at least as fast: rows of x, and multiplications
FEW_ROWS, FEW_FORWARD, FEW = 4, 2**19, 2**18
# as they are when this is imported: somebody may put others into the classes later
_CALL, _FORWARD = nn.Module.__call__, nn.Linear.forward

plain_row("dense_linear")(operator.call)  # layer(x)


def called(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """layer(...), by the row of the table for its weight, which has a slow dtype."""
    weight: Any = layer._parameters["weight"]
    if len(args) != 1 or kwargs:
        return layer(*args, **kwargs)
    if not isinstance(x := args[0], Tensor) or x.numel() * len(weight) < FEW:  # asked first: quick
        return layer(x)
    return OPERATORS["dense_linear"].choose(weight.device, weight.dtype, weight.shape)(layer, x)


products.callers["dense"] = called


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The row of the table: the layer in panels, where it can be so computed."""
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    if weight is None or not _is_plain(layer) or not _fits(x, weight, bias):
        out: Tensor = layer(x)
        return out
    return product(cast(x, weight.dtype), weight, bias)


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer runs nn.Linear's forward, and nothing else."""
    return (
        type(layer) is nn.Linear
        and (nn.Module.__call__, nn.Linear.forward) == (_CALL, _FORWARD)
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch would multiply these as plain matrices of the weight's dtype, for x alone."""
    return (
        not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and nobody_listens(x, (x, weight, bias), profiled=True)
        and not x.is_nested
        and x.layout == weight.layout == torch.strided
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and x.device == weight.device
        and product_dtype(x) == weight.dtype
        and (bias is None or (bias.dtype, bias.shape) == (weight.dtype, weight.shape[:1]))
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, *, turned: bool = False) -> Tensor:
    """x W^T + bias, or x W; differentiable in x, as often as one likes."""
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Product.apply(x, weight, bias, turned)  # type: ignore[no-untyped-call]
        return out
    with without_autocast(x.device):
        return _multiplied(x, weight, bias, turned)


class _Product(torch.autograd.Function):
    """x W^T + bias or x W: each is the other's gradient, but for the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.turned = turned
        with without_autocast(x.device):
            return _multiplied(x, weight, bias, turned)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        if nobody_listens(grad, (grad, weight), profiled=True) and grad.numel():
            dx = product(grad, weight, None, turned=not ctx.turned)
        else:  # torch.func or a batch of gradients: in operations that it knows
            with without_autocast(grad.device):
                dx = grad @ (weight.t() if ctx.turned else weight)
        return dx, None, None, None


def _decode_panel(
    out: Tensor, weight: Packed, rows: tuple[int, int, int], columns: tuple[int, int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """A rectangle of the weight into `out`: every number of 16 bits is one of float32."""
    out.copy_(weight.packed[slice(*rows[1:]), slice(*columns)])


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    """The values alone."""
    (out_features, in_features), numbers = weight.shape, weight.detach()
    blocks = Packed(numbers, numbers, 1)  # as panels take a weight: a block is one number
    if turned:
        return panels.input_gradient(x, blocks, in_features, _decode_panel)
    if x.numel() <= max(FEW_ROWS * in_features, FEW_FORWARD // out_features):
        return F.linear(x, numbers, bias)
    return panels.linear(x, blocks, bias, out_features, _decode_panel)
