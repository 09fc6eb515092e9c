"""Encoding NF4, and the 8-bit codes of its scales.

The bits of nf4.py and double_quant.py.  A code is the number of midpoints below a scaled weight:
counted, not searched, so that there is no branch and eight weights are counted at once.  Sizes of
floats are ordered as their bits are, NaN after all: the largest is found among integers.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from minipeft import double_quant
from minipeft.fast.nf4 import flat_range
from minipeft.nf4 import check_finite, codebook_on
from minipeft_kernels.cpu.compiled import (
    LOOP,
    address_of,
    arguments_of,
    array,
    compiled,
    from_bits,
    to_bits,
)  # fmt: skip
from minipeft_kernels.cpu.decode import BFLOAT16, FLOAT32, KINDS
from minipeft_kernels.cpu.rounding import from_float16
from minipeft_kernels.cpu.threads import run

PIECE = 8192  # weights that a thread takes at a time
MOST = 4096  # numbers in a block, for which there is room in scratch
GROUP = 1024  # weights of whole blocks that each loop runs over
CODES = 4 * MOST  # where in scratch the codes of a block are
SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal  # a block below it counts as zero
CHUNK = 2**22  # weights of a tensor with gaps that are copied at a time
Arguments, RECORD = arguments_of(
    "kind block_size weights piece midpoints many x packed absmax offset"
)


@njit
def _to_float32(kind, x, size, out):
    """Numbers of a dtype as float32."""
    wide = array(out, size, types.float32)
    if kind == FLOAT32:
        own = array(x, size, types.float32)
        for i in range(size):
            wide[i] = own[i]
    elif kind == BFLOAT16:
        narrow = array(x, size, types.uint16)
        for i in range(size):
            wide[i] = from_bits(np.uint32(np.uint32(narrow[i]) << np.uint32(16)))
    else:
        narrow = array(x, size, types.uint16)
        for i in range(size):
            wide[i] = from_float16(narrow[i])


@njit
def _largest(x, size):
    """The largest magnitude; not finite if any number is not."""
    values, largest = array(x, size, types.float32), np.int32(0)
    for i in range(size):
        bits = np.int32(to_bits(values[i]) & np.uint32(0x7FFFFFFF))
        largest = max(largest, bits)
    return from_bits(np.uint32(largest))


@njit
def _count_below(x, size, midpoints, many, codes):
    """For each number the count of midpoints below it, five at a time; all are below NaN."""
    values, edges = array(x, size, types.float32), array(midpoints, many, types.float32)
    counts = array(codes, size, types.int32)
    for i in range(size):
        counts[i] = 0
    for j in range(0, many, 5):  # there are 15, or 255
        a, b, c, d, e = edges[j], edges[j + 1], edges[j + 2], edges[j + 3], edges[j + 4]
        for i in range(size):
            v = values[i]
            low = np.int32(not v <= a) + np.int32(not v <= b)
            high = np.int32(not v <= c) + np.int32(not v <= d) + np.int32(not v <= e)
            counts[i] += np.int32(low + high)


@njit
def _scale(x, count, size, absmax):
    """Divide blocks by their largest magnitudes, which are written to `absmax`."""
    largest_of = array(absmax, -(-count // size), types.float32)
    for first in range(0, count, size):
        here = min(size, count - first)  # the last block may be short
        largest, values = _largest(x + 4 * first, here), array(x + 4 * first, here, types.float32)
        if largest < SMALLEST_NORMAL:
            largest = np.float32(0)
        factor = np.float32(0) if largest == 0 else np.float32(np.float32(1) / largest)
        for i in range(here):
            values[i] *= factor
        largest_of[first // size] = largest


@compiled(*LOOP)
def _encode(address: Any, piece: Any, scratch: Any) -> None:
    """Some blocks of weights, a group at a time."""
    a = array(address, 1, RECORD)[0]
    size, width, step = a.block_size, 4 if a.kind == FLOAT32 else 2, max(a.block_size, GROUP)
    codes, counts = scratch + CODES, array(scratch + CODES, MOST, types.int32)
    for first in range(piece * a.piece, min((piece + 1) * a.piece, a.weights), step):
        count = min(step, a.weights - first)
        _to_float32(a.kind, a.x + width * first, count, scratch)
        _scale(scratch, count, size, a.absmax + 4 * (first // size))
        _count_below(scratch, count, a.midpoints, a.many, codes)
        if count % 2:
            counts[count] = 7  # the code of zero
        packed = array(a.packed + first // 2, (count + 1) // 2, types.uint8)
        for i in range((count + 1) // 2):
            packed[i] = np.uint8((counts[2 * i] << 4) | counts[2 * i + 1])


@compiled(*LOOP)
def _encode_scales(address: Any, piece: Any, scratch: Any) -> None:
    """Some blocks of scales, less their offset."""
    a = array(address, 1, RECORD)[0]
    size, counts = a.block_size, array(scratch + CODES, MOST, types.int32)
    offset, rest = array(a.offset, 1, types.float32)[0], array(scratch, MOST, types.float32)
    for first in range(piece * a.piece, min((piece + 1) * a.piece, a.weights), size):
        count = min(size, a.weights - first)
        x = array(a.x + 4 * first, count, types.float32)
        for i in range(count):
            rest[i] = x[i] - offset
        _scale(scratch, count, size, a.absmax + 4 * (first // size))
        _count_below(scratch, count, a.midpoints, a.many, scratch + CODES)
        codes = array(a.packed + first, count, types.uint8)
        for i in range(count):
            codes[i] = np.uint8(counts[i])


def quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The operator quantize_nf4."""
    w, n = w.detach(), w.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    values = codebook_on(w.device)
    step = max(1, n) if w.is_contiguous() else CHUNK
    for first in range(0, n, step):
        part = flat_range(w, first, min(first + step, n)).contiguous()
        encode_into(packed[first // 2 :], absmax[first // block_size :], part, block_size, values)
    check_finite("quantize_nf4", w, absmax)
    return packed, absmax


def encode_into(packed: Tensor, absmax: Tensor, x: Tensor, block_size: int, values: Tensor) -> None:
    """Write codes and scales of `x`, flat and contiguous, for these sixteen ascending values."""
    _run(_encode, x, block_size, (values[1:] + values[:-1]) / 2, packed, absmax)


def quantize_absmax(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operator quantize_absmax."""
    if block_size > MOST:
        return double_quant.encode(absmax, block_size)
    flat = absmax.detach().flatten().contiguous()
    offset, codes = double_quant.ordered_mean(flat), torch.empty_like(flat, dtype=torch.uint8)
    scale = flat.new_empty(-(-flat.numel() // block_size))
    midpoints = double_quant.dynamic_tables(flat.device)[1]
    _run(_encode_scales, flat, block_size, midpoints, codes, scale, offset)
    return codes.view(absmax.shape), scale, offset


def _run(
    loop: Any, x: Tensor, block_size: int, midpoints: Tensor, codes: Tensor, scales: Tensor,
    offset: Tensor | None = None,
) -> None:  # fmt: skip
    """Run a loop over the blocks of x, which is flat and contiguous."""
    piece = max(1, PIECE // block_size) * block_size
    arguments = Arguments(
        0, -(-x.numel() // piece), 0,
        KINDS[x.dtype], block_size, x.numel(), piece, address_of(midpoints),
        midpoints.numel(), address_of(x), address_of(codes), address_of(scales),
        address_of(offset),
    )  # fmt: skip
    run(loop, arguments, x.numel())
