"""The product with a 4-bit weight in panels: a part of the weight is decoded, and multiplied.

The plain products of qlora.py decode the whole weight first.  Products of 16 bits are float32's on
a CPU that has none (products.py).
"""

import torch
from torch import Tensor

from minipeft.double_quant import decoded_absmax
from minipeft.fast import products

PANEL_BYTES = 16 * 2**20
GPU_PANEL_BYTES = 256 * 2**20


def _panel_bytes(device: torch.device) -> int:
    """How much of the weight to decode at a time for a product.

    On a CPU larger panels leave the cache before they are multiplied, and smaller ones make thin
    products; elsewhere it is a bound on memory, seldom reached.
    """
    return PANEL_BYTES if device.type == "cpu" else GPU_PANEL_BYTES


def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    """The operator nf4_linear."""
    in_features = x.shape[-1]
    rows = max(1, _panel_bytes(x.device) // max(1, in_features * x.element_size()))
    if rows >= out_features or in_features % block_size:
        shape = [out_features, in_features]
        weight = torch.ops.minipeft.dequantize_nf4(
            packed, absmax, scale, offset, shape, block_size, x.dtype, codebook
        )
        return products.linear(x, weight, bias)
    scales = decoded_absmax(absmax, scale, offset).view(out_features, -1)
    codes, panels = packed.view(out_features, -1), []
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        weight = torch.ops.minipeft.dequantize_nf4(
            codes[first:last], scales[first:last], None, None, [last - first, in_features],
            block_size, x.dtype, codebook,
        )  # fmt: skip
        panels.append(products.linear(x, weight, None if bias is None else bias[first:last]))
    return torch.cat(panels, dim=-1)


def input_gradient(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    """The operator nf4_linear_input_gradient."""
    out_features = grad.shape[-1]
    blocks = _panel_bytes(grad.device) // max(1, out_features * grad.element_size() * block_size)
    columns = max(1, blocks) * block_size
    if columns >= in_features or in_features % block_size:
        shape = [out_features, in_features]
        weight = torch.ops.minipeft.dequantize_nf4(
            packed, absmax, scale, offset, shape, block_size, grad.dtype, codebook
        )
        return products.matmul(grad, weight)
    # panels of columns, not of rows: each element of the gradient is one sum, rounded once
    scales = decoded_absmax(absmax, scale, offset).view(out_features, -1)
    codes, panels = packed.view(out_features, -1), []
    for first in range(0, in_features, columns):
        last = min(first + columns, in_features)
        weight = torch.ops.minipeft.dequantize_nf4(
            codes[:, first // 2 : last // 2].contiguous(),
            scales[:, first // block_size : last // block_size].contiguous(),
            None, None, [out_features, last - first], block_size, grad.dtype,
            codebook,
        )  # fmt: skip
        panels.append(products.matmul(grad, weight))
    return torch.cat(panels, dim=-1)
