"""NF4 quantisation: absmax, codes and packing in one pass over the weight.

A program takes ROWS blocks, as pairs of neighbouring weights, (ROWS, BLOCK / 2) of each parity, so
that a pair becomes one byte where it is.  A code is the number of midpoints below the scaled value:
fifteen comparisons, which cost less than reading the weight does.

In every bit what minipeft.nf4 computes: multiplied by the reciprocal of the block's absmax, which
is rounded to nearest (`div_rn`; Triton's `/` is off by up to two units); a block whose absmax is
below the normal float32 numbers is a zero block.  Plain twin: minipeft.nf4.encode.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipeft.nf4 import NF4_CODEBOOK, check_finite
from minipeft_kernels.triton.launch import launch, on

SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)
WEIGHTS = 4096  # of a program


def _midpoints() -> list[float]:
    values = torch.tensor(NF4_CODEBOOK, dtype=torch.float32)
    return [float(value) for value in (values[1:] + values[:-1]) / 2]


MIDPOINTS = tl.constexpr(tuple(_midpoints()))


@triton.jit
def _codes(w, factor, MIDS: tl.constexpr):
    """The number of midpoints that are strictly below w * factor: a tie goes to the lower code."""
    scaled = w * factor
    code = tl.zeros(scaled.shape, tl.int32)
    for i in tl.static_range(15):
        code += (scaled > MIDS[i]).to(tl.int32)
    return code


@triton.jit
def quantize_kernel(
    w, packed, absmax, n, MIDS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Bytes and absmax of the n weights of w, contiguous; beyond n they count as zeros."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows, pairs = tl.arange(0, ROWS), tl.arange(0, BLOCK // 2)
    left = n - first * BLOCK
    at = rows[:, None] * BLOCK + 2 * pairs[None, :]
    w += first * BLOCK
    high = tl.load(w + at, mask=at < left, other=0.0).to(tl.float32)
    low = tl.load(w + at + 1, mask=at + 1 < left, other=0.0).to(tl.float32)
    # 0, or NaN if a value is not finite: a maximum skips NaN
    finite = tl.sum(high * 0.0 + low * 0.0, axis=1)
    largest = tl.max(tl.maximum(tl.abs(high), tl.abs(low)), axis=1) + finite
    largest = tl.where(largest < SMALLEST_NORMAL, 0.0, largest)
    factor = tl.where(largest == 0, 0.0, tl.div_rn(1.0, tl.where(largest == 0, 1.0, largest)))
    codes = _codes(high, factor[:, None], MIDS) * 16 + _codes(low, factor[:, None], MIDS)
    tl.store(packed + first * (BLOCK // 2) + at // 2, codes.to(tl.uint8), mask=at < left)
    tl.store(absmax + first + rows, largest, mask=rows * BLOCK < left)


def quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The operator `quantize_nf4`, on CUDA and ROCm devices (or with TRITON_INTERPRET=1)."""
    w, n = w.detach().contiguous(), w.numel()
    packed = torch.empty(math.ceil(n / 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(math.ceil(n / block_size), dtype=torch.float32, device=w.device)
    rows = max(1, WEIGHTS // block_size)
    with on(w):
        if n:
            launch(
                quantize_kernel, (-(-n // (rows * block_size)), 1, 1), (w, packed, absmax, n),
                {"MIDS": MIDPOINTS.value, "BLOCK": block_size, "ROWS": rows}, 4, 1,
            )  # fmt: skip
    check_finite("quantize_nf4", w, absmax)
    return packed, absmax
