"""One row of x times a 4-bit weight: nothing is kept of what is decoded.

A panel that is multiplied once is not worth writing.  A group of blocks is looked up and multiplied
from the first cache: by x, and added up (forward), or by one number of dy, and added to a part of
the result (input gradient).  For float32 a block's scale multiplies its sum; for other dtypes
weights are rounded first, as everywhere.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from minipeft.fast.nf4 import pairs_of
from minipeft.ops import Packed
from minipeft_kernels.cpu.compiled import LOOP, address_of, arguments_of, array, compiled
from minipeft_kernels.cpu.decode import (
    FLOAT32,
    GROUP,
    ROUNDED,
    SCALES,
    addresses_of_scales,
    look_up,
    scale_of,
    write_rounded,
)  # fmt: skip
from minipeft_kernels.cpu.threads import run

ROWS = 16  # rows of the weight that a thread takes at a time
Arguments, RECORD = arguments_of(
    "kind block_size row_blocks piece_blocks rows pairs packed x out absmax scale offset dynamic"
)


@njit(fastmath={"reassoc", "contract"})
def _dot(x, y, size):
    """The sum of products, in any order: lanes of a vector are added at the end."""
    a, b, total = array(x, size, types.float32), array(y, size, types.float32), np.float32(0)
    for i in range(size):
        total += a[i] * b[i]
    return total


@njit(fastmath={"contract"})
def _add_product(out, factor, values, size):
    """Add a factor times the values, where product and sum may be one instruction."""
    a, b = array(out, size, types.float32), array(values, size, types.float32)
    for i in range(size):
        a[i] += factor * b[i]


@njit
def _look_up_group(a, block, count, scratch):
    """Values of `count` blocks into scratch, and the factors that they still lack."""
    size, factors = a.block_size, array(scratch + SCALES, GROUP, types.float32)
    look_up(a.pairs, a.packed + block * (size // 2), count * size, scratch)
    for b in range(count):
        factors[b] = scale_of(a, block + b)
    if a.kind != FLOAT32:
        write_rounded(a.kind, scratch, factors, size, count * size, scratch)
        for b in range(count):
            factors[b] = np.float32(1)
    return factors


@compiled(*LOOP)
def _forward(address: Any, piece: Any, scratch: Any) -> None:
    """Some rows of the weight, each times x."""
    a = array(address, 1, RECORD)[0]
    size, blocks, x, out = a.block_size, a.row_blocks, a.x, array(a.out, a.rows, types.float32)
    group = max(1, GROUP // size)
    for row in range(piece * ROWS, min((piece + 1) * ROWS, a.rows)):
        total = np.float32(0)
        for start in range(0, blocks, group):
            count = min(group, blocks - start)
            factors = _look_up_group(a, row * blocks + start, count, scratch)
            for b in range(count):
                place = 4 * b * size
                total += factors[b] * _dot(scratch + place, x + 4 * start * size + place, size)
        out[row] = total


@compiled(*LOOP)
def _backward(address: Any, piece: Any, scratch: Any) -> None:
    """Some columns: each row's part times its number of dy, added up."""
    a = array(address, 1, RECORD)[0]
    size, blocks, dy = a.block_size, a.row_blocks, array(a.x, a.rows, types.float32)
    group, first = max(1, GROUP // size), piece * a.piece_blocks
    last = min(first + a.piece_blocks, blocks)
    for row in range(a.rows):
        for start in range(first, last, group):
            count, out = min(group, last - start), a.out + 4 * start * size
            factors = _look_up_group(a, row * blocks + start, count, scratch)
            for b in range(count):
                place = 4 * b * size
                _add_product(out + place, np.float32(factors[b] * dy[row]), scratch + place, size)


def _run(loop: Any, x: Tensor, weight: Packed, rows: int, out: Tensor, cut: int) -> Tensor:
    """Run a loop on a row of x; `cut` is how many rows, or blocks of a row, a thread takes."""
    row_blocks, wide = weight.absmax.numel() // rows, x.reshape(-1).float().contiguous()
    pairs = pairs_of(weight)
    arguments = Arguments(
        0, -(-(rows if loop is _forward else row_blocks) // cut), 0,
        ROUNDED.get(x.dtype, FLOAT32), weight.block_size, row_blocks, cut, rows,
        address_of(pairs), address_of(weight.packed), address_of(wide), address_of(out),
        *addresses_of_scales(weight),
    )  # fmt: skip
    run(loop, arguments, rows * row_blocks * weight.block_size)
    return out


def linear(x: Tensor, weight: Packed, out_features: int) -> Tensor:
    """x W^T for one row of x; float32, flat.  Rows of the weight hold whole blocks."""
    return _run(
        _forward, x, weight, out_features, torch.empty(out_features, dtype=torch.float32), ROWS
    )


def input_gradient(dy: Tensor, weight: Packed, in_features: int) -> Tensor:
    """dy W for one row of dy; float32, flat.  Rows of the weight hold whole blocks."""
    columns = -(-in_features // weight.block_size // torch.get_num_threads())
    out = torch.zeros(in_features, dtype=torch.float32)
    return _run(_backward, dy, weight, dy.numel(), out, max(1, columns))
