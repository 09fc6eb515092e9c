"""The gate before times on a GPU: every kernel against float64, over shapes, dtypes and blocks."""

import math
import multiprocessing
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

import minipeft as mp
from minipeft.ops import Packed
from minipeft_kernels.triton import gradient, nf4, product
from minipeft_kernels.triton.selection import MOST_ROWS, Plan, plan_for

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# relative errors: of values rounded to the dtype (2^-9, 2^-12 of each) and of float32 sums
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
# (m, n, k, block size, double quantisation): tails of every kind
CASES = (
    (1, 4096, 4096, 64, True), (3, 1000, 1024, 64, True), (8, 257, 192, 64, False),
    (16, 512, 11008, 64, True), (17, 333, 320, 32, True), (33, 129, 512, 128, True),
    (64, 1024, 1024, 64, False), (5, 96, 4096, 4096, True), (2, 7, 64, 64, True),
)  # fmt: skip
GUARD = 4096


def packed_weight(n: int, k: int, block_size: int, nested: bool) -> Packed:
    """A weight of normal draws, quantised on the device."""
    packed, absmax = mp.quantize_nf4(torch.randn(n, k, device="cuda"), block_size=block_size)
    if not nested:
        return Packed(packed, absmax, block_size)
    code, scale, offset = mp.quantize_absmax(absmax)
    return Packed(packed, code, block_size, scale, offset)


def plans(operator: str, case: tuple[Any, ...], itemsize: int) -> list[Plan]:
    """The shipped plan; in two cases also others, that take every path of the kernel."""
    m, n, k, *_ = case
    own = plan_for(operator, m, n, k, itemsize)
    if case not in CASES[1:6:3] or itemsize == 4:
        return [own]
    rows = own.rows
    small = 16 if operator == "nf4_linear" else 32
    return [
        own, Plan(rows, 32, 4, 4, 2, 2), Plan(rows, 64, 1, 4, 3, 1), Plan(rows, small, 8, 8, 3, 1)
    ]  # fmt: skip


def _worst(results: list[torch.Tensor], expected: torch.Tensor) -> float:
    worst = 0.0
    for result in results:
        error = float((result.double() - expected).norm() / expected.norm())
        worst = max(worst, error) if error == error else float("nan")
        if worst != worst:
            break
    return worst


def _product(case: tuple[Any, ...], dtype: torch.dtype, exact: bool) -> float:
    m, n, k, block_size, nested = case
    weight = packed_weight(n, k, block_size, nested)
    dense = torch.empty(n, k, device="cuda")
    with mp.use_kernels(False):
        dense = torch.ops.minipeft.dequantize_nf4(*weight, [n, k], torch.float32)
    x, bias = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda").to(dtype)
    expected = x.double() @ dense.double().T + bias.double()
    found = [
        product.product(x, weight, bias, n, exact=exact, plan=plan)
        for plan in plans("nf4_linear", case, x.element_size())
    ]
    return _worst(found, expected)


def _gradient(case: tuple[Any, ...], dtype: torch.dtype, exact: bool) -> float:
    m, n, k, block_size, nested = case
    weight = packed_weight(n, k, block_size, nested)
    with mp.use_kernels(False):
        dense = torch.ops.minipeft.dequantize_nf4(*weight, [n, k], torch.float32)
    grad = torch.randn(m, n, device="cuda", dtype=dtype)
    expected = grad.double() @ dense.double()
    found = [
        gradient.gradient(grad, weight, k, exact=exact, plan=plan)
        for plan in plans("nf4_linear_input_gradient", case, grad.element_size())
    ]
    return _worst(found, expected)


def _dequantize(case: tuple[Any, ...], dtype: torch.dtype, exact: bool) -> float:
    """0 if every bit is right and nothing beyond the result was written, else 1."""
    _, n, k, block_size, nested = case
    weight = packed_weight(n, k, block_size, nested)
    with mp.use_kernels(False):
        expected = torch.ops.minipeft.dequantize_nf4(*weight, [n, k], dtype)
    around = torch.full((GUARD + n * k + GUARD,), float("nan"), device="cuda", dtype=dtype)
    nf4.dequantize_into(around[GUARD : GUARD + n * k], weight)
    inside = around[GUARD : GUARD + n * k].view(n, k)
    guards = torch.cat([around[:GUARD], around[GUARD + n * k :]])
    return float(not (torch.equal(inside, expected) and bool(guards.isnan().all())))


CHECKS = {"product": _product, "input gradient": _gradient, "dequantize": _dequantize}


def run_check(name: str, dtype: torch.dtype, exact: bool) -> dict[str, Any]:
    """One kernel in every case; a case that fails or raises is written down."""
    worst, failures = 0.0, []
    for case in CASES:
        if name != "dequantize" and case[0] > MOST_ROWS["nvidia"][dtype.itemsize]:
            continue
        try:
            error = CHECKS[name](case, dtype, exact)
        except Exception as problem:
            failures.append(f"{case}: {repr(problem)[:300]}")
            if len(failures) == 1:
                traceback.print_exc()
            continue
        if not error <= (0 if name == "dequantize" else BOUNDS[dtype]):
            failures.append(f"{case}: relative error {error:.2e}")
        worst = max(worst, error)
    kind, mode = str(dtype).removeprefix("torch."), "exact" if exact else "fast"
    return {"kernel": name, "dtype": kind, "mode": mode, "worst": worst, "failures": failures}


def gate(workers: int = 8) -> list[dict[str, Any]]:
    """All checks, each in a process of its own, since most of the time goes into compiling."""
    tasks = [
        (name, dtype, exact)
        for name in CHECKS
        for dtype in DTYPES
        for exact in (False, True)
        if exact or (name != "dequantize" and dtype != torch.float32)  # float32 is always exact
    ]
    context, report = multiprocessing.get_context("spawn"), []
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(run_check, *task): task for task in tasks}
        for future in as_completed(running):
            try:
                row = future.result()
            except Exception as problem:  # the process ended
                row = {"kernel": str(running[future]), "dtype": "", "mode": "", "worst": math.nan,
                       "failures": [repr(problem)]}  # fmt: skip
            print(f"{row['kernel']} {row['dtype']} {row['mode']}: worst {row['worst']:.2e}, "
                  f"{len(row['failures'])} of {len(CASES)} cases fail {row['failures'][:3]}",
                  flush=True)  # fmt: skip
            report.append(row)
    return report
