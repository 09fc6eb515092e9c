"""Products with a 4-bit weight: a panel that stays in the cache is decoded, then multiplied.

Panels, and what multiplies them, are those of minipeft/fast/panels.py; their decode is decode.py's.
A single row has loops of its own (one_row.py).
"""

import torch
from torch import Tensor

from minipeft.fast import panels
from minipeft.ops import Packed
from minipeft_kernels.cpu import one_row
from minipeft_kernels.cpu.decode import ROUNDED, checked, decode_into


def _decode_panel(
    out: Tensor, weight: Packed, rows: tuple[int, int, int], columns: tuple[int, int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """A rectangle of the weight into `out`, rounded to `dtype`."""
    decode_into(out, weight, rows, columns, ROUNDED[dtype] if out.dtype != dtype else None)


def _is_one_row(x: Tensor, in_features: int, out_features: int, weight: Packed) -> bool:
    """Whether x is one row, and rows of the weight hold whole blocks, and are many."""
    if not 0 < x.numel() == x.shape[-1] or in_features % weight.block_size or not in_features:
        return False
    return not panels.fits(x, in_features, out_features)


def linear(x: Tensor, weight: Packed, bias: Tensor | None, out_features: int) -> Tensor:
    """The operator nf4_linear."""
    weight, bias = (
        checked(weight, out_features * x.shape[-1]),
        panels.checked(bias, x, out_features),
    )
    if not _is_one_row(x, x.shape[-1], out_features, weight):
        return panels.linear(x, weight, bias, out_features, _decode_panel)
    out = one_row.linear(x, weight, out_features)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def input_gradient(dy: Tensor, weight: Packed, in_features: int) -> Tensor:
    """The operator nf4_linear_input_gradient."""
    weight = checked(weight, dy.shape[-1] * in_features)
    if not _is_one_row(dy, in_features, dy.shape[-1], weight):
        return panels.input_gradient(dy, weight, in_features, _decode_panel)
    out = one_row.input_gradient(dy, weight, in_features)
    return out.to(dy.dtype).view(*dy.shape[:-1], in_features)
