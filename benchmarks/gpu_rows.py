"""LoRA by row on a GPU: the kernel, and PyTorch's form, which multiplies by all that is loaded."""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timers import eager_seconds, graph_seconds
from minipeft.layers import bank

# adapters loaded, rows of the batch, tokens in each; 4096 x 4096, rank 16
CASES = ((8, 8, 1), (32, 8, 1), (8, 32, 1), (32, 32, 1), (8, 4, 512), (32, 4, 512))
COPIES = 4  # of factors, taken in turn
# of the largest element, against float64: the result's rounding, and h's, which is rounded too
ALLOWED = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def inputs(
    capacity: int, rows: int, each: int, size: int = 4096, rank: int = 16,
    dtype: torch.dtype = torch.bfloat16, unused: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out, x, a, b and a gate in which row i uses adapter i, or with `unused` none in row 0."""
    out, x = (torch.randn(rows, each, size, device="cuda", dtype=dtype) for _ in range(2))
    a, b = (torch.randn(capacity, rank, size, device="cuda") / size**0.5 for _ in range(2))
    gate = torch.zeros(rows, capacity, device="cuda")
    gate[torch.arange(rows), torch.arange(rows) % capacity] = 0.5
    if unused:
        gate[0] = 0
    return out, x, a, b, gate


def gate_rows() -> list[dict[str, Any]]:
    """The kernel against float64 on this card; a line each."""
    from minipeft_kernels.triton import rows as kernel

    found = []
    for dtype, allowed in ALLOWED.items():
        for case in (*CASES, (64, 3, 20), (3, 5, 1)):
            for rank, size in ((16, 4096), (8, 1000), (200, 320)):
                given = inputs(*case, size, rank, dtype, unused=True)
                made = kernel.add_rows(*given)
                expected = bank.add_rows(*(t.to(dtype).double() for t in given))
                error = ((made.double() - expected).abs().max() / expected.abs().max()).item()
                right = error <= allowed and torch.equal(made[0], given[0][0])
                failures = [] if right else [f"{case} {rank} {size}: {error:.1e}"]
                found.append(
                    {"dtype": str(dtype), "case": [*case, rank, size], "error": error,
                     "failures": failures}
                )  # fmt: skip
        mine = [entry for entry in found if entry["dtype"] == str(dtype)]
        failures = [text for entry in mine for text in entry["failures"]]
        print(f"rows {dtype}: worst {max(e['error'] for e in mine):.1e} of the largest element, "
              f"{len(failures)} of {len(mine)} cases fail {failures[:3]}", flush=True)  # fmt: skip
    return found


def time_rows() -> list[dict[str, Any]]:
    """Seconds of a call in a CUDA graph and from Python, kernel and PyTorch's form; a line each."""
    from minipeft_kernels.triton import rows as kernel

    cells = []
    for capacity, rows, each in CASES:
        given = [inputs(capacity, rows, each) for _ in range(COPIES)]
        cell: dict[str, Any] = {"capacity": capacity, "rows": rows, "each": each}
        for name, function in (("kernel", kernel.add_rows), ("pytorch", bank.add_rows)):
            calls = [functools.partial(function, *g) for g in given]
            cell[name] = {"graph": graph_seconds(calls), "eager": eager_seconds(calls)}
        cells.append(cell)
        print(f"{capacity} adapters, {rows} rows of {each}: " + "; ".join(
            f"{name} {cell[name]['graph'] * 1e6:.1f} us ({cell[name]['eager'] * 1e6:.0f})"
            for name in ("kernel", "pytorch")
        ) + f", {cell['kernel']['graph'] / cell['pytorch']['graph']:.2f}", flush=True)  # fmt: skip
    return cells
