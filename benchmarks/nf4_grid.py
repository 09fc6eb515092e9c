"""NF4 over dtype x block size x double quantisation x 40 shapes: `python -m benchmarks.nf4_grid`.

Codes, scales and decoded weights, bit by bit, against the numpy reference and against
bitsandbytes, and the bytes with one thread against those with two.  The causes of differences
from bitsandbytes are nf4_sweep's, and with double quantisation two more:

    mean order        its offset is torch.mean, whose rounding depends on the number of threads
    binned scales     its CPU code looks 8-bit codes up in 65,536 bins instead of taking the
                      nearest; computing the bins gives its codes exactly
"""

import argparse
import itertools
import sys
from collections import Counter
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.nf4_sweep import (
    BLOCK_SIZES,
    DTYPES,
    against_bitsandbytes,
    against_reference,
    reference,
    same,
)
from benchmarks.output import add_output, keep
from minipeft import dequantize_absmax, quantize_absmax, quantize_nf4
from minipeft.adapters.progress import Progress
from minipeft.double_quant import dynamic_codebook

SHAPES = [
    (0,), (1,), (2,), (7,), (31,), (32,), (33,), (63,), (64,), (65,), (101,), (127,), (1000,),
    (4095,), (4097,), (16384,), (65537,), (1, 1), (1, 64), (64, 1), (3, 5), (7, 33), (5, 48),
    (9, 80), (17, 63), (33, 65), (64, 64), (48, 100), (100, 48), (31, 192), (128, 256), (300, 400),
    (96, 448), (40, 1008), (257, 257), (2, 3, 5), (3, 7, 64), (4, 9, 33), (2, 2, 2, 65),
    (11, 4304),
]  # fmt: skip
MAP = np.array(dynamic_codebook(), dtype=np.float32)


def weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal weights with a zero row, exact ties and, from three axes on, no contiguous layout."""
    w = torch.randn(shape)
    if w.dim() > 2:
        w = w.transpose(0, -1)
    if w.dim() >= 2 and w.shape[0] > 3:
        w[2] = 0
    if w.numel() > 64:
        flat = w.reshape(-1)  # of a transposed weight a copy, which then stays as it is
        flat[1:16] = (torch.tensor(reference.NF4)[1:] + torch.tensor(reference.NF4)[:-1]) / 2
        flat[0] = 1.0
    return w.to(dtype)


def scales_against_reference(absmax: Tensor) -> Counter[str]:
    """Double quantisation of these scales, and numpy's."""
    code, scale, offset = quantize_absmax(absmax)
    if absmax.numel() == 0:
        return Counter()
    codes, scales, mean = reference.quantize_absmax(absmax.numpy(), MAP, 256)
    decoded = dequantize_absmax(code, scale, offset)
    values = reference.dequantize_absmax(codes, scales, mean, MAP, 256)
    return Counter({
        "scale codes": int((code.numpy() != codes).sum()),
        "scale scales": int((scale.numpy() != scales).sum()) + int(offset.item() != mean),
        "scale decoded": int((decoded.numpy() != values).sum()),
    })  # fmt: skip


def binned_codes(rest: Tensor, scale: Tensor) -> Tensor:
    """What bitsandbytes' CPU code makes of scales less their offset: nearest of a bin's value."""
    book = torch.from_numpy(MAP)
    midpoints = (book[1:] + book[:-1]) / 2
    of_bin = torch.bucketize(torch.arange(65536) / 65535 * 2 - 1, midpoints)
    spread = torch.where(scale == 0, 0.0, scale.reciprocal()).repeat_interleave(256)
    x = rest * spread[: len(rest)]
    return of_bin[((x + 1) * 0.5 * 65535 + 0.5).int().clamp(0, 65535)].to(torch.uint8)


def scales_against_bitsandbytes(absmax: Tensor) -> Counter[str]:
    """Differences of 8-bit scale codes by cause."""
    import bitsandbytes.functional as peer

    if absmax.numel() == 0:
        return Counter()
    mean = absmax.mean()
    rest = absmax - mean
    codes, state = peer.quantize_blockwise(rest, blocksize=256)
    code, scale, offset = quantize_absmax(absmax)
    differs = code != codes
    same_offset = bool(offset[0] == mean)
    binned = binned_codes(rest, state.absmax)
    as_binned = codes == binned
    if bool((state.absmax == 0).any()):  # a group without spread: any code decodes to the offset
        as_binned |= (state.absmax == 0).repeat_interleave(256)[: len(codes)]
    return Counter({
        "scales: mean order": int(differs.sum()) if not same_offset else 0,
        "scales: binned": int((differs & as_binned).sum()) if same_offset else 0,
        "unexplained": int((~as_binned).sum())
        + (int((scale != state.absmax).sum()) if same_offset else 0),
    })  # fmt: skip


def with_threads(count: int, w: Tensor, block_size: int) -> list[Tensor]:
    """All bytes that quantising makes, with this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        packed, absmax = quantize_nf4(w, block_size=block_size)
        return [packed, absmax, *quantize_absmax(absmax)]
    finally:
        torch.set_num_threads(before)


def case(
    w: Tensor, block_size: int, double_quant: bool, peers: bool
) -> tuple[Counter[str], Counter[str]]:
    """Differences of one cell: from the reference (and between threads), and from bitsandbytes."""
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    _, absmax = quantize_nf4(w, block_size=block_size)
    if double_quant:
        ours.update(scales_against_reference(absmax))
        ours["elements"] = absmax.numel()
        if peers:
            theirs.update(scales_against_bitsandbytes(absmax))
    else:
        ours.update(against_reference(w, block_size))
        if peers:
            theirs.update(against_bitsandbytes(w.contiguous(), block_size))
    pairs = zip(with_threads(1, w, block_size), with_threads(2, w, block_size), strict=True)
    ours["threads"] = sum(int((~same(a, b)).sum()) for a, b in pairs)
    return ours, theirs


def run(
    shapes: list[tuple[int, ...]], show: bool
) -> tuple[list[dict[str, Any]], Counter[str], Counter[str]]:
    """A row for each cell, and the totals against the reference and against bitsandbytes."""
    peers = find_spec("bitsandbytes") is not None
    rows = []
    ours_all: Counter[str] = Counter()
    theirs_all: Counter[str] = Counter()
    cells = list(itertools.product(DTYPES, BLOCK_SIZES, (False, True)))
    for dtype, block_size, double_quant in Progress(
        cells, shown=None if show else False, leave=False
    ):
        torch.manual_seed(block_size)
        ours: Counter[str] = Counter()
        theirs: Counter[str] = Counter()
        for shape in shapes:
            one, other = case(weight(shape, dtype), block_size, double_quant, peers)
            ours.update(one)
            theirs.update(other)
        ours_all.update(ours)
        theirs_all.update(theirs)
        rows.append({
            "dtype": str(dtype).removeprefix("torch."), "block_size": block_size,
            "scales": "8-bit" if double_quant else "float32", "compared": ours["elements"],
            "reference": sum(v for k, v in ours.items() if k not in ("elements", "threads")),
            "threads": ours["threads"],
            "bitsandbytes": {k: v for k, v in sorted(theirs.items()) if v} if peers else None,
        })  # fmt: skip
    return rows, ours_all, theirs_all


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows as they are printed."""
    table = Table("dtype", "block", "scales", "compared", "reference", "1 / 2 threads",
                  "bitsandbytes, by cause")  # fmt: skip
    for row in rows:
        causes = "not installed"
        if row["bitsandbytes"] is not None:
            causes = ", ".join(f"{k} {v:,}" for k, v in row["bitsandbytes"].items()) or "none"
        table.add_row(row["dtype"], str(row["block_size"]), row["scales"],
                      f"{row['compared']:,}", str(row["reference"]), str(row["threads"]),
                      causes)  # fmt: skip
    return table


def main() -> int:
    """Print the table and write it; exit status 1 if a difference has no cause."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many")
    add_output(parser)
    arguments = parser.parse_args()
    shapes = SHAPES[: arguments.shapes]
    rows, ours, theirs = run(shapes, show=True)
    Console(width=120).print(table_of(rows))
    cases = len(rows) * len(shapes)
    compared = ours.pop("elements")
    print(f"{cases} cases, {compared:,} weights and scales")
    print("differences from the numpy reference, and between 1 and 2 threads:", dict(ours))
    print("differences from bitsandbytes:", dict(theirs) or "not installed (minipeft[peers])")
    keep(arguments, "nf4_grid", shapes=shapes, cases=cases, compared=compared,
         reference=dict(ours), bitsandbytes=dict(theirs) if theirs else None,
         rows=rows)  # fmt: skip
    return int(any(ours.values()) or theirs["unexplained"] > 0)


if __name__ == "__main__":
    sys.exit(main())
