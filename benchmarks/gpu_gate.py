"""The gate before times on a GPU: every kernel against float64, over shapes, dtypes and blocks."""

import math
import multiprocessing
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

import minipeft as mp
from minipeft.ops import Packed
from minipeft_kernels.triton import gradient, nf4, product, quantize
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


def _worst(
    results: list[torch.Tensor], expected: torch.Tensor, x: torch.Tensor, w: torch.Tensor
) -> float:
    """The largest error of results that should be x w^T, relative to the terms of its sums.

    A sum can be smaller than its terms, and few sums can all be: their rounding stays.
    """
    terms, worst = (x.double().square() @ w.double().square().T).sum().sqrt(), 0.0
    for result in results:
        error = float((result.double() - expected).norm() / torch.max(terms, expected.norm()))
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
    return _worst(found, expected, x, dense)


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
    return _worst(found, expected, grad, dense.T)


def _branch(case: tuple[Any, ...], dtype: torch.dtype, exact: bool) -> float:
    """The product with LoRA's branch, of rank 8 and 40, added to its sums."""
    m, n, k, block_size, nested = case
    weight = packed_weight(n, k, block_size, nested)
    with mp.use_kernels(False):
        dense = torch.ops.minipeft.dequantize_nf4(*weight, [n, k], torch.float32)
    x, worst = torch.randn(m, k, device="cuda", dtype=dtype), 0.0
    for rank in (8, 40):
        a, b = (torch.randn(size, device="cuda").to(dtype) / 8 for size in ((rank, k), (n, rank)))
        expected = x.double() @ (dense.double() + 0.5 * b.double() @ a.double()).T
        found = product.product_with_lora(x, weight, None, n, a, b, 0.5)
        worst = max(worst, _worst([found], expected, x, dense))
    return worst


def _quantize(case: tuple[Any, ...], dtype: torch.dtype, exact: bool) -> float:
    """0 if codes and scales have the PyTorch row's bits, else 1."""
    _, n, k, block_size, _ = case
    w = torch.randn(n, k, device="cuda", dtype=dtype)
    w[0] = 0
    found = quantize.quantize(w, block_size)
    with mp.use_kernels(False):
        expected = torch.ops.minipeft.quantize_nf4(w, block_size)
    return float(not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)))


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


CHECKS = {
    "product": _product, "input gradient": _gradient, "branch of LoRA": _branch,
    "dequantize": _dequantize, "quantize": _quantize,
}  # fmt: skip
OF_BITS = ("dequantize", "quantize")  # equal in every bit, whatever the rows of x


def run_check(name: str, dtype: torch.dtype, exact: bool) -> dict[str, Any]:
    """One kernel in every case; a case that fails or raises is written down."""
    worst, failures = 0.0, []
    for case in CASES:
        if name not in OF_BITS and case[0] > MOST_ROWS["nvidia"][dtype.itemsize]:
            continue
        try:
            error = CHECKS[name](case, dtype, exact)
        except Exception as problem:
            failures.append(f"{case}: {repr(problem)[:300]}")
            if len(failures) == 1:
                traceback.print_exc()
            continue
        if not error <= (0 if name in OF_BITS else BOUNDS[dtype]):
            failures.append(f"{case}: relative error {error:.2e}")
        worst = max(worst, error)
    kind, mode = str(dtype).removeprefix("torch."), "exact" if exact else "fast"
    return {"kernel": name, "dtype": kind, "mode": mode, "worst": worst, "failures": failures}


def modes(name: str, dtype: torch.dtype) -> tuple[bool, ...]:
    """Exact or not: float32 always is, and the branch of LoRA has the mode of layers alone."""
    if name in OF_BITS or dtype == torch.float32:
        return (True,)
    return (False,) if name == "branch of LoRA" else (False, True)


def gate(workers: int = 8) -> list[dict[str, Any]]:
    """All checks, each in a process of its own, since most of the time goes into compiling."""
    tasks = [
        (name, dtype, exact) for name in CHECKS for dtype in DTYPES for exact in modes(name, dtype)
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
