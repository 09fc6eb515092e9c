"""NF4 dequantisation with double-quantised scales, in one pass over the packed weight.

A program decodes a tile of ROWS x WIDTH bytes.  No row crosses a block, so that a row has one
scale: with a flat index every byte would load its own.  A thread gets 4 bytes of a row and stores
8 neighbouring weights, 16 bytes in a 16-bit dtype.  The code is looked up in a table of 16 floats,
which one cache line holds; comparing with each value instead takes twice the instructions.

In every bit what minipeft.nf4 computes: float32 products, rounded once.  The compiler must not
fuse value * scale + offset into one rounding (`enable_fp_fusion`).
"""

import functools
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipeft.double_quant import ABSMAX_BLOCK_SIZE, dynamic_codebook
from minipeft.nf4 import NF4_CODEBOOK
from minipeft.ops import Packed

TILE = 512  # bytes a program decodes: 4 for each of 128 threads
THREADS = 128


@triton.jit
def _block_scales(
    absmax, scale, offset, dynamic, block, mask, NESTED: tl.constexpr, GROUP: tl.constexpr
):
    """float32 scales of the blocks with these numbers; where masked off, anything."""
    if not NESTED:
        return tl.load(absmax + block, mask=mask)
    code = tl.load(absmax + block, mask=mask)
    group = tl.load(scale + block // GROUP, mask=mask)
    return tl.load(dynamic + code) * group + tl.load(offset)


@triton.jit
def _values(packed, codebook, bytes_, mask, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The codebook's values for a tile of bytes, (ROWS, 2 * WIDTH): the high nibble comes first."""
    codes = tl.load(packed + bytes_, mask=mask)
    high, low = tl.load(codebook + (codes >> 4)), tl.load(codebook + (codes & 15))
    return tl.join(high, low).reshape(ROWS, 2 * WIDTH)


@triton.jit
def dequantize_kernel(
    packed, absmax, scale, offset, codebook, dynamic, out, n,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
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
        scales = _block_scales(absmax, scale, offset, dynamic, block, None, NESTED, GROUP)
        values = _values(packed, codebook, bytes_, None, ROWS, WIDTH) * scales[:, None]
        tl.store(out + weights, values.to(out.dtype.element_ty))
    else:
        mask = rows * (2 * WIDTH) < left
        scales = _block_scales(absmax, scale, offset, dynamic, block, mask, NESTED, GROUP)
        values = _values(packed, codebook, bytes_, 2 * bytes_ < left, ROWS, WIDTH) * scales[:, None]
        tl.store(out + weights, values.to(out.dtype.element_ty), mask=weights < left)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    codebook = torch.tensor(NF4_CODEBOOK, dtype=torch.float32, device=device)
    return codebook, torch.tensor(dynamic_codebook(), dtype=torch.float32, device=device)


def tile_of(block_size: int) -> tuple[int, int]:
    """ROWS and WIDTH for a block size: rows of 32 bytes, or of the block if it is smaller."""
    width = min(32, block_size // 2)
    return TILE // width, width


def dequantize(weight: Packed, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The operator `dequantize_nf4`, on CUDA and ROCm devices (or with TRITON_INTERPRET=1).

    Raises:
        RuntimeError: another device.
    """
    packed, absmax, block_size, scale, offset, codebook = weight
    if not packed.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"minipeft_kernels.triton: the weight is on {packed.device.type}; these kernels run on "
            "CUDA and ROCm devices, or anywhere in a process started with TRITON_INTERPRET=1"
        )
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    n = out.numel()
    if n == 0:
        return out
    rows, width = tile_of(block_size)
    values, dynamic = _tables(packed.device)
    values = values if codebook is None else codebook.contiguous()
    nested = scale is not None
    on_device = torch.cuda.device(packed.device) if packed.is_cuda else nullcontext()
    with on_device:
        dequantize_kernel[(triton.cdiv(n, 2 * TILE),)](
            packed.contiguous(), absmax.contiguous(), scale if nested else absmax,
            offset if nested else absmax, values, dynamic, out, n,
            NESTED=nested, BLOCK=block_size, GROUP=ABSMAX_BLOCK_SIZE, ROWS=rows, WIDTH=width,
            num_warps=THREADS // (64 if torch.version.hip else 32), enable_fp_fusion=False,
        )  # fmt: skip
    return out
