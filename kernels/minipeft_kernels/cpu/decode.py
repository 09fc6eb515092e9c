"""Decoding NF4: a byte is looked up as a pair, a block is multiplied by its scale and rounded.

The bits of nf4.py and double_quant.py, scales decoded on the way.  `decode_into` writes any
rectangle of whole blocks of a matrix into a given buffer, for products in panels.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from minipeft.double_quant import ABSMAX_BLOCK_SIZE, dynamic_tables
from minipeft.fast.nf4 import pairs_of
from minipeft.ops import Packed
from minipeft_kernels.cpu.compiled import (
    LOOP,
    address_of,
    arguments_of,
    array,
    compiled,
    from_bits,
)  # fmt: skip
from minipeft_kernels.cpu.rounding import from_float16, rounded_to_bfloat16, rounded_to_float16
from minipeft_kernels.cpu.threads import run

PIECE = 8192  # weights that a thread takes at a time
GROUP = 1024  # of these, looked up before they are multiplied: reading what was just stored waits
SCALES = 4 * 4096  # where they are in scratch, after the largest block
Arguments, RECORD = arguments_of(
    "kind block_size weights pieces_in_row piece_blocks row_blocks first_block blocks "
    "pairs packed out absmax scale offset dynamic"
)

SCALES_IN_GROUP = 256  # written out: the cache knows of changes in this folder alone
assert SCALES_IN_GROUP == ABSMAX_BLOCK_SIZE

# what is written: a dtype, or float32 numbers that are rounded to one (products.py: `is_slow`)
FLOAT32, BFLOAT16, FLOAT16, AS_BFLOAT16, AS_FLOAT16 = range(5)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
ROUNDED = {torch.bfloat16: AS_BFLOAT16, torch.float16: AS_FLOAT16}


@njit(inline="always")
def look_up(table, packed, count, values):
    """Write the float32 values of `count` codes, a pair at a time."""
    pairs_of_byte, pairs = array(table, 256, types.uint64), array(values, 4096, types.uint64)
    codes = array(packed, 4096, types.uint8)
    for i in range((count + 1) // 2):
        pairs[i] = pairs_of_byte[codes[i]]


@njit(inline="always")
def scale_of(a, block):
    """The float32 scale of a block; a product and a sum of 8-bit codes, each rounded."""
    if a.scale == 0:
        return array(a.absmax + 4 * block, 1, types.float32)[0]
    code = array(a.absmax + block, 1, types.uint8)[0]
    value = array(a.dynamic + 4 * np.int64(code), 1, types.float32)[0]
    group = array(a.scale + 4 * (block // SCALES_IN_GROUP), 1, types.float32)[0]
    return np.float32(np.float32(value * group) + array(a.offset, 1, types.float32)[0])


@njit(inline="always")
def _same(x):
    return x


@njit(inline="always")
def _bfloat16(x):
    return np.uint16(rounded_to_bfloat16(x))


@njit(inline="always")
def _as_bfloat16(x):
    return from_bits(np.uint32(rounded_to_bfloat16(x) << np.uint32(16)))


@njit(inline="always")
def _as_float16(x):
    return from_float16(rounded_to_float16(x))


def _writer(name: str, number: Any, convert: Any) -> Any:
    """The loop that multiplies blocks by their scales and writes `convert` of the products."""
    width = number.bitwidth // 8

    def write(values, scales, block_size, count, out):
        for first in range(0, count, block_size):
            size = min(block_size, count - first)
            x, scale = array(values + 4 * first, size, types.float32), scales[first // block_size]
            y = array(out + width * first, size, number)
            for i in range(size):
                y[i] = convert(x[i] * scale)

    write.__name__ = write.__qualname__ = name  # see compiled.py: names are what is linked
    return njit(write)


_write_float32 = _writer("_write_float32", types.float32, _same)
_write_bfloat16 = _writer("_write_bfloat16", types.uint16, _bfloat16)
_write_float16 = _writer("_write_float16", types.uint16, rounded_to_float16)
_write_as_bfloat16 = _writer("_write_as_bfloat16", types.float32, _as_bfloat16)
_write_as_float16 = _writer("_write_as_float16", types.float32, _as_float16)


@njit
def write_rounded(kind, values, scales, block_size, count, out):
    """Products, rounded to another dtype, as float32."""
    if kind == AS_BFLOAT16:
        _write_as_bfloat16(values, scales, block_size, count, out)
    else:
        _write_as_float16(values, scales, block_size, count, out)


@compiled(*LOOP)
def _decode(address: Any, piece: Any, scratch: Any) -> None:
    """Blocks that follow each other in a row, a group at a time: look up, then multiply."""
    a = array(address, 1, RECORD)[0]
    kind, size, out, packed, table = a.kind, a.block_size, a.out, a.packed, a.pairs
    row, first = piece // a.pieces_in_row, (piece % a.pieces_in_row) * a.piece_blocks
    last, group = min(first + a.piece_blocks, a.blocks), max(1, GROUP // size)
    scales = array(scratch + SCALES, GROUP, types.float32)
    for start in range(first, last, group):
        blocks, place = min(group, last - start), (row * a.blocks + start) * size
        block = row * a.row_blocks + a.first_block + start
        for b in range(blocks):
            scales[b] = scale_of(a, block + b)
        count = min(blocks * size, a.weights - place)  # the last block may be short
        look_up(table, packed + block * (size // 2), count, scratch)
        if kind == FLOAT32:
            _write_float32(scratch, scales, size, count, out + 4 * place)
        elif kind == BFLOAT16:
            _write_bfloat16(scratch, scales, size, count, out + 2 * place)
        elif kind == FLOAT16:
            _write_float16(scratch, scales, size, count, out + 2 * place)
        else:
            write_rounded(kind, scratch, scales, size, count, out + 4 * place)


def checked(weight: Packed, count: int) -> Packed:
    """The same weight, in tensors whose memory has no gaps.

    Raises:
        RuntimeError: a tensor has not the dtype or the size that `count` weights take.
    """
    doubled, blocks = weight.scale is not None, -(-count // weight.block_size)
    kinds = (torch.uint8, torch.uint8 if doubled else torch.float32, torch.float32, torch.float32)
    sizes = ((count + 1) // 2, blocks, -(-blocks // SCALES_IN_GROUP), 1)
    given = (weight.packed, weight.absmax, weight.scale, weight.offset)
    for tensor, kind, size in zip(given, kinds, sizes, strict=True):
        if tensor is not None and (tensor.dtype != kind or tensor.numel() != size):
            raise RuntimeError(
                f"{count} weights in blocks of {weight.block_size} take {size} numbers of {kind}; "
                f"got {tensor.numel()} of {tensor.dtype}"
            )
    values: Any = [v.contiguous() if isinstance(v, Tensor) else v for v in weight]
    return Packed(*values)


def addresses_of_scales(weight: Packed) -> tuple[int, int, int, int]:
    """What `scale_of` reads: absmax, and of 8-bit codes the scales, the offset and their values."""
    if weight.scale is None or weight.offset is None:
        return address_of(weight.absmax), 0, 0, 0
    values = dynamic_tables(weight.absmax.device)[0]  # kept by a cache
    return (
        address_of(weight.absmax), address_of(weight.scale), address_of(weight.offset),
        address_of(values),
    )  # fmt: skip


def decode_into(
    out: Tensor,
    weight: Packed,
    rows: tuple[int, int, int] = (1, 0, 1),
    columns: tuple[int, int] | None = None,
    kind: int | None = None,
) -> None:
    """Decode a rectangle into `out`, which is contiguous and has its size.

    The weight is a matrix of as many rows as the first number in `rows` says; of these the rows
    from the second up to the third are wanted, and of each the blocks from `columns[0]` up to
    `columns[1]`.  By default the weight is one row, and all of it is wanted.  `weight` must be
    `checked`.  `kind` rounds float32 numbers to another dtype (ROUNDED).
    """
    count, first_row, last_row = rows
    size, n_blocks = weight.block_size, weight.absmax.numel()
    row_blocks = n_blocks // count
    first, last = columns or (0, row_blocks)
    blocks = last - first
    if not blocks or not out.numel():
        return
    piece_blocks = min(blocks, max(1, PIECE // size))
    in_row = -(-blocks // piece_blocks)
    pairs = pairs_of(weight)
    arguments = Arguments(
        0, (last_row - first_row) * in_row, 0,
        KINDS[out.dtype] if kind is None else kind, size, out.numel(), in_row, piece_blocks,
        row_blocks, first_row * row_blocks + first, blocks,
        address_of(pairs), address_of(weight.packed), address_of(out),
        *addresses_of_scales(weight),
    )  # fmt: skip
    run(_decode, arguments, out.numel())


def dequantize(weight: Packed, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The operator dequantize_nf4."""
    out = torch.empty(shape, dtype=dtype)
    decode_into(out, checked(weight, out.numel()))
    return out
