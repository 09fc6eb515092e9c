"""Exercise 5, solved."""

from typing import Any

import torch
from torch import Tensor

import minipeft as mp


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.shape = (out_features, x.shape[1])
        return x @ mp.dequantize_nf4(packed, absmax, ctx.shape).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed, absmax = ctx.saved_tensors
        return grad @ mp.dequantize_nf4(packed, absmax, ctx.shape), None, None, None


def product(x: Tensor, packed: Tensor, absmax: Tensor, out_features: int) -> Tensor:
    """Decode in forward, and once more in backward."""
    result: Tensor = _Product.apply(x, packed, absmax, out_features)
    return result
