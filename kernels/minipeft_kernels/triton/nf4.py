"""NF4 dequantisation with double-quantised scales, in one pass over the packed weight.

A program decodes a tile of ROWS x WIDTH bytes.  No row crosses a block, so that a row has one
scale: with a flat index every byte would load its own.  A thread gets 4 bytes of a row and stores
8 neighbouring weights, 16 bytes in a 16-bit dtype; TILE is four such turns of every thread, so that
its loads are under way together.

In every bit what minipeft.nf4 computes: float32 products, rounded once.  The compiler must not
fuse value * scale + offset into one rounding (`enable_fp_fusion`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipeft.double_quant import ABSMAX_BLOCK_SIZE
from minipeft.ops import Packed
from minipeft_kernels.triton.codes import decoded_scales, values
from minipeft_kernels.triton.launch import can_permute, lanes_of, launch, on, pointers

TILE = 2048  # bytes a program decodes: 16 for each of 128 threads
THREADS = 128


@triton.jit
def dequantize_kernel(
    packed, absmax, scale, offset, codebook, dynamic, out, n,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, PERMUTE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[i] = codebook[code i] * scale of its block, for i < n; n may exceed 2**31."""
    first = tl.program_id(0).to(tl.int64) * ROWS  # row
    rows = tl.arange(0, ROWS)
    block = (first + rows) // (BLOCK // (2 * WIDTH))
    bytes_ = rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    weights = rows[:, None] * (2 * WIDTH) + tl.arange(0, 2 * WIDTH)[None, :]
    packed += first * WIDTH
    out += first * (2 * WIDTH)
    left = n - first * (2 * WIDTH)
    if left >= ROWS * 2 * WIDTH:  # no masks: they would split stores unless n is a multiple of 16
        codes = tl.load(packed + bytes_)
        scales = decoded_scales(
            tl.load(absmax + block), block, scale, offset, dynamic, NESTED, GROUP
        )
        decoded = values(codes, codebook, tl.float32, PERMUTE) * scales[:, None]
        tl.store(out + weights, decoded.to(out.dtype.element_ty))
    else:
        block = tl.where(rows * (2 * WIDTH) < left, block, 0)
        codes = tl.load(packed + bytes_, mask=2 * bytes_ < left, other=0)
        scales = decoded_scales(
            tl.load(absmax + block), block, scale, offset, dynamic, NESTED, GROUP
        )
        decoded = values(codes, codebook, tl.float32, PERMUTE) * scales[:, None]
        tl.store(out + weights, decoded.to(out.dtype.element_ty), mask=weights < left)


def tile_of(block_size: int) -> tuple[int, int]:
    """ROWS and WIDTH for a block size: rows of 32 bytes, or of the block if it is smaller."""
    width = min(32, block_size // 2)
    return TILE // width, width


def dequantize(weight: Packed, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The operator `dequantize_nf4`, on CUDA and ROCm devices (or with TRITON_INTERPRET=1).

    Raises:
        RuntimeError: another device.
    """
    out = torch.empty(shape, dtype=dtype, device=weight.packed.device)
    dequantize_into(out, weight)
    return out


def dequantize_into(out: Tensor, weight: Packed) -> None:
    """Write the weights into `out`, contiguous, of as many elements (the last code may be padding).

    Raises:
        RuntimeError: another device.
        ValueError: `out` is not contiguous.
    """
    if not out.is_contiguous():
        raise ValueError(f"dequantize_into: out has strides {out.stride()}; expected contiguous")
    n = out.numel()
    rows, width = tile_of(weight.block_size)
    with on(weight.packed, out, weight.absmax):
        if n == 0:
            return
        launch(
            dequantize_kernel, (-(-n // (2 * TILE)), 1, 1), (*pointers(weight), out, n),
            {
                "NESTED": weight.scale is not None, "BLOCK": weight.block_size,
                "GROUP": ABSMAX_BLOCK_SIZE, "PERMUTE": can_permute(weight),
                "ROWS": rows, "WIDTH": width,
            },
            THREADS // lanes_of(out.device), 1,
        )  # fmt: skip
