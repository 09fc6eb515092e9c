"""NF4 by tables, a chunk at a time: the bits of nf4.py in a quarter of the time.

Encoding looks a weight up instead of searching among 15 midpoints, decoding looks up a whole byte
instead of two codes, and both work on chunks whose float32 temporaries are small.
"""

import functools
import math

import torch
from torch import Tensor

from minipeft.double_quant import decoded_absmax
from minipeft.nf4 import NF4_CODEBOOK, check_finite, codebook_on, pack_pairs, scaled_blocks
from minipeft.ops import Packed

_BINS = 4096  # of the encoding table; the narrowest gap between midpoints is 334 bins wide


@functools.cache
def _encoding_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each bin of [-1, 1]: the code at its lower edge, and the midpoint above that code.

    A bin is narrower than any gap between midpoints, so one comparison with that midpoint gives
    the code.  A bin's number is computed in float32 and off by up to 2e-7, so edges are taken 1e-6
    lower: the code at the edge is then never above that of a value in the bin.
    """
    values = torch.tensor(NF4_CODEBOOK, dtype=torch.float32)
    midpoints = (values[1:] + values[:-1]) / 2
    edges = torch.arange(_BINS, dtype=torch.float64) * (2 / _BINS) - 1 - 1e-6
    lower = torch.bucketize(edges, midpoints.double())
    above = torch.cat([midpoints, midpoints.new_tensor([math.inf])])[lower]
    return lower.to(torch.uint8).to(device), above.to(device)


def _pair_table(values: Tensor) -> Tensor:
    """For each byte the two float32 values it stands for, as one int64 each: 256 entries.

    There may be fewer than sixteen values (integers of 4 bits: fifteen).
    """
    values = torch.nn.functional.pad(values, (0, 16 - len(values)))
    high, low = values.repeat_interleave(16), values.repeat(16)
    return torch.stack([high, low], dim=1).view(torch.int64).flatten()


@functools.cache
def _nf4_pairs(device: torch.device) -> Tensor:
    return _pair_table(codebook_on(device))


def pairs_of(weight: Packed) -> Tensor:
    """The table of pairs for the values of this weight."""
    own = weight.codebook
    return _nf4_pairs(weight.packed.device) if own is None else _pair_table(own)


def chunk_elements(device: torch.device) -> int:
    """How many weights to work on at a time.

    On a CPU the float32 temporaries of a chunk stay in a core's cache.  On other devices chunks are
    larger, for few launches, and temporaries still below 64 MiB.
    """
    return 2**18 if device.type == "cpu" else 2**21


def quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The operator quantize_nf4."""
    w, n = w.detach(), w.numel()
    packed = torch.empty(math.ceil(n / 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(math.ceil(n / block_size), dtype=torch.float32, device=w.device)
    step = max(block_size, chunk_elements(w.device))  # powers of two: whole blocks
    for first in range(0, n, step):
        part, scales = _encode(flat_range(w, first, min(first + step, n)), block_size)
        absmax[first // block_size :][: scales.numel()] = scales
        rest = packed[first // 2 :]
        rest[: part.numel()] = part[: rest.numel()]
    check_finite("quantize_nf4", w, absmax)
    return packed, absmax


def _encode(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Bytes and absmax of a chunk, as whole blocks."""
    lower, above = _encoding_table(x.device)
    blocks, absmax = scaled_blocks(x, block_size)
    scaled = blocks.flatten()
    bins = ((scaled + 1) * (_BINS / 2)).int().clamp_(0, _BINS - 1)
    step_up = scaled > above.index_select(0, bins)
    return pack_pairs(lower.index_select(0, bins) + step_up.view(torch.uint8)), absmax


def flat_range(w: Tensor, first: int, last: int) -> Tensor:
    """w.flatten()[first:last]; if w is not contiguous, only the rows in this range are copied."""
    while w.dim() > 1 and not w.is_contiguous():
        row = w[0].numel()
        top, bottom = first // row, max(first // row + 1, math.ceil(last / row))
        if bottom - top > 1:
            return w[top:bottom].reshape(-1)[first - top * row : last - top * row]
        w, first, last = w[top], first - top * row, last - top * row
    return w.reshape(-1)[first:last]


def dequantize(weight: Packed, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The operator dequantize_nf4."""
    out = torch.empty(shape, dtype=dtype, device=weight.packed.device)
    decode_into(out, weight)
    return out


def decode_into(out: Tensor, weight: Packed) -> None:
    """Write code * absmax into `out` (contiguous, any float dtype), rounding each product once.

    Values are looked up where they will stay, if they are float32.
    """
    flat, packed, block_size = out.view(-1), weight.packed.reshape(-1), weight.block_size
    absmax, table = decoded_absmax(weight).reshape(-1), pairs_of(weight)
    n, step = flat.numel(), max(block_size, chunk_elements(out.device))
    whole = n - n % block_size
    in_place = flat.dtype == torch.float32 and flat.data_ptr() % table.element_size() == 0
    count = min(step, whole) // 2
    pairs = flat[:whole].view(table.dtype) if in_place else table.new_empty(count)
    index = packed.new_empty(count, dtype=torch.int32)
    for first in range(0, whole, step):
        last = min(first + step, whole)
        count, start = (last - first) // 2, first // 2
        number = index[:count].copy_(packed[start : start + count])
        found = pairs[start : start + count] if in_place else pairs[:count]
        torch.index_select(table, 0, number, out=found)
        blocks = found.view(torch.float32).view(-1, block_size)
        blocks.mul_(absmax[first // block_size : last // block_size, None])
        if not in_place:
            flat[first:last].view(-1, block_size).copy_(blocks)
    if whole < n:
        values = table.index_select(0, packed[whole // 2 :].int()).view(torch.float32)
        flat[whole:] = values[: n - whole] * absmax[-1]
