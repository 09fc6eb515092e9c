"""The product with a 4-bit weight in panels: a part of the weight is decoded, then multiplied.

The plain products of qlora.py decode the whole weight first.  On a CPU without 16-bit products
these compute in float32 (adapters/products.py).
"""

import torch
from torch import Tensor

from minipeft.adapters import products
from minipeft.double_quant import decoded_absmax
from minipeft.ops import Packed
from minipeft.qlora import decode

PANEL_BYTES = 16 * 2**20
GPU_PANEL_BYTES = 256 * 2**20


def _panel_bytes(device: torch.device) -> int:
    """How much of the weight to decode at a time for a product.

    On a CPU larger panels leave the cache before they are multiplied, and smaller ones make thin
    products; elsewhere it is a bound on memory, seldom reached.
    """
    return PANEL_BYTES if device.type == "cpu" else GPU_PANEL_BYTES


def _matrix(weight: Packed, out_features: int) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales, a row for each output."""
    scales = decoded_absmax(weight)
    return weight.packed.view(out_features, -1), scales.view(out_features, -1)


def linear(x: Tensor, weight: Packed, bias: Tensor | None, out_features: int) -> Tensor:
    """The operator nf4_linear."""
    in_features, block_size = x.shape[-1], weight.block_size
    rows = max(1, _panel_bytes(x.device) // max(1, in_features * x.element_size()))
    if rows >= out_features or in_features % block_size:
        return products.linear(x, decode(weight, [out_features, in_features], x.dtype), bias)
    codes, scales = _matrix(weight, out_features)
    panels = []
    for first in range(0, out_features, rows):
        part = slice(first, first + rows)
        panel = Packed(codes[part], scales[part], block_size, codebook=weight.codebook)
        dense = decode(panel, [len(codes[part]), in_features], x.dtype)
        panels.append(products.linear(x, dense, None if bias is None else bias[part]))
    return torch.cat(panels, dim=-1)


def input_gradient(dy: Tensor, weight: Packed, in_features: int) -> Tensor:
    """The operator nf4_linear_input_gradient."""
    out_features, block_size = dy.shape[-1], weight.block_size
    blocks = _panel_bytes(dy.device) // max(1, out_features * dy.element_size() * block_size)
    columns = max(1, blocks) * block_size
    if columns >= in_features or in_features % block_size:
        return products.matmul(dy, decode(weight, [out_features, in_features], dy.dtype))
    # panels of columns, not of rows: each element of the gradient is one sum, rounded once
    codes, scales = _matrix(weight, out_features)
    panels = []
    for first in range(0, in_features, columns):
        last = min(first + columns, in_features)
        panel = Packed(
            codes[:, first // 2 : last // 2].contiguous(),
            scales[:, first // block_size : last // block_size].contiguous(),
            block_size,
            codebook=weight.codebook,
        )
        dense = decode(panel, [out_features, last - first], dy.dtype)
        panels.append(products.matmul(dy, dense))
    return torch.cat(panels, dim=-1)
