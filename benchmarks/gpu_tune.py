"""Which plan is best for each shape and number of rows: what the fixed table is written from."""

import functools
import multiprocessing
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timers import copies_for, graph_seconds
from minipeft.ops import Packed
from minipeft_kernels.triton import gradient, product
from minipeft_kernels.triton.selection import Plan, plan_for, rows_of, save_plans

OPERATORS = ("nf4_linear", "nf4_linear_input_gradient")
TILES = ((16, 4, 4), (16, 8, 8), (32, 4, 4), (32, 8, 8), (64, 4, 4), (64, 1, 4), (128, 1, 4))
STAGES = (3, 5)
PARTS = (1, 2, 4, 8)
ROWS = (1, 8, 16, 32, 64)


def random_weight(n: int, k: int) -> Packed:
    """A double-quantised weight of random codes; blocks of 64."""

    def draw(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, device="cuda", dtype=torch.uint8)

    scale = torch.rand(-(-n * k // 64 // 256), device="cuda") * 0.01
    return Packed(draw(n, k // 2), draw(n, k // 64), 64, scale, torch.full((1,), 0.05).cuda())


def candidates(operator: str, m: int, n: int, k: int) -> Iterator[Plan]:
    """Plans worth a try: enough programs to fill the card, and at least two steps each."""
    forward = operator == "nf4_linear"
    rows = rows_of(m) if forward else max(16, rows_of(m))
    for tile, slices, warps in TILES if forward else TILES[2:]:
        for stages in STAGES:
            for parts in PARTS:
                programs = (-(-n // tile) if forward else k // 64) * parts
                step = slices * (64 if forward else tile)
                steps = -(-(k if forward else n) // (step * parts))
                if 64 <= programs <= 4096 and steps >= 2 and tile * rows <= 64 * 128:
                    yield Plan(rows, tile, slices, warps, stages, parts)


def call(operator: str, x: torch.Tensor, weight: Packed, n: int, k: int, plan: Plan) -> Any:
    """One product or gradient."""
    if operator == "nf4_linear":
        return product.product(x, weight, None, n, plan=plan)
    return gradient.gradient(x, weight, k, plan=plan)


def _kernel_key(operator: str, n: int, k: int, plan: Plan) -> tuple[Any, ...]:
    total, step = (
        (k, plan.slices * 64) if operator == "nf4_linear" else (n, plan.slices * plan.tile)
    )
    return operator, *plan[:5], plan.parts > 1, total % (step * plan.parts) == 0


def _compile(tasks: list[tuple[str, int, int, int, Plan]]) -> int:
    """In a process of its own: compile by running once; the files go to Triton's cache."""
    failed = 0
    for operator, m, n, k, plan in tasks:
        try:
            x = torch.randn(m, k if operator == "nf4_linear" else n, device="cuda").bfloat16()
            call(operator, x, random_weight(n, k), n, k, plan)
            torch.cuda.synchronize()
        except Exception:
            failed += 1
    return failed


def compile_all(shapes: list[tuple[int, int]], workers: int) -> None:
    """Every kernel that `tune` will run, in parallel."""
    tasks = {}
    for operator in OPERATORS:
        for n, k in shapes:
            for m in ROWS:
                for plan in candidates(operator, m, n, k):
                    key = _kernel_key(operator, n, k, plan)
                    tasks.setdefault(key, (operator, m, n, k, plan))
    queue = list(tasks.values())
    print(f"{len(queue)} kernels to compile, {workers} processes", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        batches = [queue[i :: 4 * workers] for i in range(4 * workers)]
        done = [pool.submit(_compile, batch) for batch in batches if batch]
        failed = 0
        for future in as_completed(done):
            try:
                failed += future.result()
            except Exception as problem:
                print(f"a compiling process failed: {problem!r}", flush=True)
    print(f"compiled; {failed} failed", flush=True)


def tune(shapes: list[tuple[int, int]], plans: Path) -> list[dict[str, Any]]:
    """The times of every candidate in a CUDA graph; prints the best, and those near it.

    The best plan for the most rows of each bucket goes into the file `plans`.
    """
    report, best = [], {}
    for operator in OPERATORS:
        for n, k in shapes:
            weights = [random_weight(n, k) for _ in range(copies_for(n * k // 2))]
            for m in ROWS:
                width = k if operator == "nf4_linear" else n
                x = torch.randn(m, width, device="cuda").bfloat16()
                found, failed = [], []
                for plan in [plan_for(operator, m, n, k), *candidates(operator, m, n, k)]:
                    calls = [functools.partial(call, operator, x, w, n, k, plan) for w in weights]
                    try:
                        found.append((graph_seconds(calls, rounds=3) * 1e6, plan))
                    except Exception as problem:
                        failed.append((list(plan), repr(problem)[:200]))
                        if len(failed) == 1:
                            traceback.print_exc()
                if not found:
                    continue
                shipped = found[0][0]
                found.sort()
                line = "; ".join(f"{t:.2f} {tuple(p)}" for t, p in found[:4])
                print(f"{operator} {n}x{k} m={m}: shipped {shipped:.2f} us; {line}; "
                      f"{len(failed)} failed", flush=True)  # fmt: skip
                best[operator, n, k, rows_of(m)] = found[0][1]
                save_plans(plans, best)
                report.append({
                    "operator": operator, "n": n, "k": k, "m": m, "shipped_us": shipped,
                    "best": [[round(t, 3), *p] for t, p in found], "failed": failed[:5],
                })  # fmt: skip
            del weights
    return report
