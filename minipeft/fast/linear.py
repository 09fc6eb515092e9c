"""The product with a 4-bit weight, in panels (panels.py) that PyTorch's operations decode."""

import torch
from torch import Tensor

from minipeft.double_quant import decoded_absmax
from minipeft.fast import panels
from minipeft.fast.nf4 import decode_into
from minipeft.ops import Packed


def _decode_panel(
    out: Tensor, weight: Packed, rows: tuple[int, int, int], columns: tuple[int, int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """A rectangle of the weight, whose scales are float32, into `out`, rounded to `dtype`."""
    count, size = rows[0], weight.block_size
    part, blocks = slice(*rows[1:]), slice(*columns)
    codes = weight.packed.view(count, -1, size // 2)[part, blocks].contiguous()
    scales = weight.absmax.view(count, -1)[part, blocks].contiguous()
    panel = weight._replace(packed=codes, absmax=scales)
    decode_into(out, panel)
    if dtype != out.dtype:
        out.copy_(out.to(dtype))


def linear(x: Tensor, weight: Packed, bias: Tensor | None, out_features: int) -> Tensor:
    """The operator nf4_linear."""
    return panels.linear(x, _with_float32_scales(weight), bias, out_features, _decode_panel)


def input_gradient(dy: Tensor, weight: Packed, in_features: int) -> Tensor:
    """The operator nf4_linear_input_gradient."""
    return panels.input_gradient(dy, _with_float32_scales(weight), in_features, _decode_panel)


def _with_float32_scales(weight: Packed) -> Packed:
    return weight._replace(absmax=decoded_absmax(weight), scale=None, offset=None)
