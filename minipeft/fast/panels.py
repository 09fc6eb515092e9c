"""Products with a 4-bit weight in panels: a part of the weight is decoded, then multiplied.

The plain products of qlora.py decode the whole weight first, and read it again from memory.  A
panel is small enough to stay in the cache: it is written into one buffer, again and again, and
multiplied from there.  So what goes through memory is 4 bits a weight, and a product can take less
time than with a dense weight.

On a CPU without products of 16 bits (adapters/products.py) panels are float32 numbers that are
rounded to the dtype of x: the products of float32 are then those of the other dtype.
"""

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.adapters import products
from minipeft.ops import Packed
from minipeft.qlora import decode

PANEL_BYTES = 8 * 2**20
GPU_PANEL_BYTES = 256 * 2**20

# (out, weight, (rows of the weight, first, last), (first block, last) of each row, dtype)
DecodePanel = Callable[[Tensor, Packed, tuple[int, int, int], tuple[int, int], torch.dtype], None]


def _panel_bytes(device: torch.device) -> int:
    """How much of the weight to decode at a time for a product.

    On a CPU larger panels leave the cache before they are multiplied, and smaller ones make thin
    products and more hand-overs between threads (a product of 11008 x 4096 with 16 rows takes 0.8
    of the time with 8 MiB as with 4 on two threads, and as much on one); elsewhere it is a bound on
    memory, seldom reached.
    """
    return PANEL_BYTES if device.type == "cpu" else GPU_PANEL_BYTES


def _dtype_inside(x: Tensor) -> torch.dtype:
    return torch.float32 if products.is_slow(x.dtype, x.device) else x.dtype


def _turned(flat: Tensor) -> bool:
    """Whether W x^T is faster than x W^T, for rows in float32 on a CPU."""
    return flat.device.type == "cpu" and flat.dtype == torch.float32 and len(flat) <= 64


def _turned_gradient(flat: Tensor) -> bool:
    """Whether W^T dy^T is faster than dy W."""
    enough = 256 if torch.get_num_threads() == 1 else 32
    return flat.device.type == "cpu" and flat.dtype == torch.float32 and len(flat) >= enough


_kept = threading.local()  # a buffer for the panels of each thread


def _buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for numbers of a panel, whose values are anything.

    On a CPU it is kept: fresh memory comes from the system in pages that it first fills with
    zeros, which takes longer than decoding into it.
    """
    wanted = size * dtype.itemsize
    if device.type != "cpu" or wanted > PANEL_BYTES:
        return torch.empty(size, dtype=dtype, device=device)
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or len(room) < wanted:
        with torch.inference_mode(False):  # a tensor made within cannot be written outside
            room = _kept.room = torch.empty(PANEL_BYTES, dtype=torch.uint8)
    return room[:wanted].view(dtype)


def panel_rows(features: int, inside: torch.dtype, device: torch.device) -> int:
    """How many rows of the weight a panel of this dtype holds."""
    return max(1, _panel_bytes(device) // max(1, features * inside.itemsize))


def fits(x: Tensor, in_features: int, out_features: int) -> bool:
    """Whether the whole weight is one panel.

    The product has then the bits of the plain one, where the CPU multiplies this dtype.
    """
    return out_features <= panel_rows(in_features, _dtype_inside(x), x.device)


def checked(bias: Tensor | None, x: Tensor, out_features: int) -> Tensor | None:
    """The bias, one number for each output.

    Raises:
        RuntimeError: it has not the dtype of x, as everywhere in torch.
    """
    if bias is None:
        return None
    if bias.dtype != x.dtype:
        raise RuntimeError(f"expected a bias of {x.dtype}, got {bias.dtype}")
    return bias.expand(out_features)


def linear(
    x: Tensor, weight: Packed, bias: Tensor | None, out_features: int, decode_panel: DecodePanel
) -> Tensor:
    """x W^T + bias, in panels of the weight's rows."""
    in_features, inside = x.shape[-1], _dtype_inside(x)
    if in_features % weight.block_size or not in_features:
        return products.linear(x, decode(weight, [out_features, in_features], x.dtype), bias)
    rows = min(panel_rows(in_features, inside, x.device), out_features)
    room = _buffer(rows * in_features, inside, x.device)
    buffer, columns = room.view(rows, in_features), in_features // weight.block_size
    bias = checked(bias, x, out_features)
    wide_bias = None if bias is None else products.cast(bias, inside)
    if rows == out_features:
        decode_panel(buffer, weight, (rows, 0, rows), (0, columns), x.dtype)
        return products.cast(F.linear(products.cast(x, inside), buffer, wide_bias), x.dtype)
    # contiguous: bits and time of a product can depend on the layout, and each panel has one
    flat = products.cast(x.reshape(-1, in_features), inside).contiguous()
    turned = _turned(flat)
    out = flat.new_empty((out_features, len(flat)) if turned else (len(flat), out_features))
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        panel = buffer[: last - first]
        decode_panel(panel, weight, (out_features, first, last), (0, columns), x.dtype)
        if turned:
            torch.mm(panel, flat.t(), out=out[first:last])
        elif wide_bias is None:
            torch.mm(flat, panel.t(), out=out[:, first:last])
        else:
            torch.addmm(wide_bias[first:last], flat, panel.t(), out=out[:, first:last])
    if turned:
        out = out.t().contiguous()
        out = out if wide_bias is None else out.add_(wide_bias)
    return products.cast(out, x.dtype).view(*x.shape[:-1], out_features)


def input_gradient(
    dy: Tensor, weight: Packed, in_features: int, decode_panel: DecodePanel
) -> Tensor:
    """dy W: sums over panels of rows in float32 and wider, panels of columns in 16 bits.

    The sums of 16-bit products would be rounded once for each panel.
    """
    out_features, inside, size = dy.shape[-1], _dtype_inside(dy), weight.block_size
    if in_features % size or not in_features or not out_features:
        return products.linear(dy, decode(weight, [out_features, in_features], dy.dtype).t())
    blocks = in_features // size
    if fits(dy, in_features, out_features):
        panel = _buffer(out_features * in_features, inside, dy.device).view(out_features, -1)
        decode_panel(panel, weight, (out_features, 0, out_features), (0, blocks), dy.dtype)
        return products.cast(torch.matmul(products.cast(dy, inside), panel), dy.dtype)
    flat = products.cast(dy.reshape(-1, out_features), inside).contiguous()
    by = _by_columns if inside.itemsize == 2 else _by_rows
    out = by(flat, weight, blocks, dy.dtype, decode_panel)
    return products.cast(out, dy.dtype).view(*dy.shape[:-1], in_features)


def _by_columns(
    flat: Tensor, weight: Packed, blocks: int, dtype: torch.dtype, decode_panel: DecodePanel
) -> Tensor:
    """dy W, a panel of columns at a time: each gives its part of the result."""
    out_features, size = flat.shape[-1], weight.block_size
    room = _panel_bytes(flat.device) // flat.element_size() // 2  # the result wants room beside it
    columns = min(blocks, max(1, room // (out_features * size)))
    out = flat.new_empty(len(flat), blocks * size)
    buffer = _buffer(out_features * columns * size, flat.dtype, flat.device)
    for first in range(0, blocks, columns):
        last = min(first + columns, blocks)
        panel = buffer[: out_features * (last - first) * size].view(out_features, -1)
        decode_panel(panel, weight, (out_features, 0, out_features), (first, last), dtype)
        torch.mm(flat, panel, out=out[:, first * size : last * size])
    return out


def _by_rows(
    flat: Tensor, weight: Packed, blocks: int, dtype: torch.dtype, decode_panel: DecodePanel
) -> Tensor:
    """dy W, a panel of rows at a time: each is added to the whole result."""
    out_features, in_features = flat.shape[-1], blocks * weight.block_size
    room = _panel_bytes(flat.device) // flat.element_size() // 2  # the sums want room beside it
    rows = min(out_features, max(1, room // in_features))
    turned = _turned_gradient(flat)
    buffer = _buffer(rows * in_features, flat.dtype, flat.device).view(rows, in_features)
    out = flat.new_empty((in_features, len(flat)) if turned else (len(flat), in_features))
    given = flat.t().contiguous() if turned else flat
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        panel = buffer[: last - first]
        decode_panel(panel, weight, (out_features, first, last), (0, blocks), dtype)
        pair = (panel.t(), given[first:last]) if turned else (given[:, first:last], panel)
        torch.addmm(out, *pair, beta=min(first, 1), out=out)
    return out.t().contiguous() if turned else out
