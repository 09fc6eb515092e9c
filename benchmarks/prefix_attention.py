"""Prefix attention, merged against joined: `python -m benchmarks.prefix_attention`.

`merged_prefix_attention` beside `joined_attention`, in turns, one thread:

    square        t = s tokens, causal: forward; forward and backward
    frozen        the same, where only the prefix needs gradients (a frozen model's first layer)
    decoding      one query over s keys, no gradients

8 heads of 64 numbers, float32 and bfloat16, prefixes of 16 and 128.  `auto` says which of the two
`prefix_attention` picks.  Before a case is timed its result and gradients are compared with joined
attention in float64: merged may be off by what joined is, plus a rounding.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.output import save_result
from minipeft.fast.prefix import merge_is_faster, merged_prefix_attention
from minipeft.prefix import joined_attention

RESULTS = Path(__file__).parent / "results"
HEADS, HEAD_DIM = 8, 64
METHODS = {"joined": joined_attention, "merged": merged_prefix_attention}
LEAST = 0.004  # seconds of one measurement: fast calls are repeated


@dataclass(frozen=True)
class Case:
    """What is computed; `trained`: nothing, everything, or the prefix alone."""

    dtype: str
    queries: int
    keys: int
    prefix: int
    trained: str = "nothing"
    kv_heads: int = HEADS
    batch: int = 1

    @property
    def name(self) -> str:
        what = {"nothing": "forward", "everything": "both ways", "prefix": "both ways, frozen"}
        extra = "" if self.batch == 1 else f", batch {self.batch}"
        if self.kv_heads != HEADS:
            extra += f", {self.kv_heads} kv heads"
        return (
            f"{self.dtype} t={self.queries} s={self.keys} p={self.prefix}{extra}, "
            f"{what[self.trained]}"
        )


def all_cases() -> list[Case]:
    """The square ones, the frozen ones, decoding."""
    cases = []
    for dtype in ("float32", "bfloat16"):
        for prefix in (16, 128):
            for t in (128, 512, 2048):
                cases += [Case(dtype, t, t, prefix, how) for how in ("nothing", "everything")]
            cases += [Case(dtype, 1, 512, prefix, how) for how in ("nothing", "everything")]
            cases += [Case(dtype, t, t, prefix, "prefix") for t in (16, 128, 512)]
        for prefix, keys, kv_heads, batch in ((16, 2048, 8, 1), (16, 512, 8, 8), (16, 2048, 2, 1)):
            cases.append(Case(dtype, 1, keys, prefix, kv_heads=kv_heads, batch=batch))
    return cases


def make(case: Case) -> tuple[list[Tensor], Tensor]:
    """q, k, v, prefix_k, prefix_v (the prefix in float32, as it is trained) and the gradient."""
    b, g, dtype = case.batch, case.kv_heads, getattr(torch, case.dtype)
    q = torch.randn(b, HEADS, case.queries, HEAD_DIM).to(dtype)
    k, v = (torch.randn(b, g, case.keys, HEAD_DIM).to(dtype) for _ in range(2))
    prefix = [torch.randn(g, case.prefix, HEAD_DIM) for _ in range(2)]
    for x in (q, k, v):
        x.requires_grad_(case.trained == "everything")
    for x in prefix:
        x.requires_grad_(case.trained != "nothing")
    return [q, k, v, *prefix], torch.randn_like(q)


def compute(case: Case, tensors: list[Tensor], dy: Tensor, method: Any) -> list[Tensor]:
    """The result, and the gradients of what is trained."""
    y = method(*tensors, is_causal=case.queries > 1)
    trained = [x for x in tensors if x.requires_grad]
    return [y, *(torch.autograd.grad(y, trained, dy) if trained else ())]


def distances(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Norm of each error over the norm of the exact value."""
    return [
        float((a.detach().double() - e.detach()).norm() / e.detach().norm())
        for a, e in zip(found, exact, strict=True)
    ]


def gate(case: Case, tensors: list[Tensor], dy: Tensor) -> dict[str, list[float]]:
    """Errors of both methods against float64; raises where merging is the less exact one."""
    rounded = [*tensors[:3], *(x.to(tensors[0].dtype) for x in tensors[3:])]
    wide = [
        x.detach().double().requires_grad_(y.requires_grad)
        for x, y in zip(rounded, tensors, strict=True)
    ]
    exact = compute(case, wide, dy.double(), joined_attention)
    errors = {
        name: distances(compute(case, tensors, dy, method), exact)
        for name, method in METHODS.items()
    }
    # one more rounding of the result; and lse, a number up to 8 in float32, is an exponent
    rounding = torch.finfo(tensors[0].dtype).eps + 8 * torch.finfo(torch.float32).eps
    for merged, joined in zip(errors["merged"], errors["joined"], strict=True):
        if not merged <= joined + rounding:
            raise RuntimeError(f"{case.name}: errors of {merged:.1e} merged, {joined:.1e} joined")
    return errors


def repeated(run: Callable[[], Any], count: int) -> float:
    """Seconds a call; of this process alone where it has one thread, since machines are shared."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(count):
        run()
    return (clock() - start) / count


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """The gate, then both methods in turns; fewer rounds where one takes long."""
    tensors, dy = make(case)
    errors = gate(case, tensors, dy)
    runs = {
        name: lambda method=method: compute(case, tensors, dy, method)
        for name, method in METHODS.items()
    }
    once = {name: min(repeated(run, 1) for _ in range(2)) for name, run in runs.items()}
    counts = {name: max(1, int(LEAST / seconds)) for name, seconds in once.items()}
    rounds = max(7, min(rounds, int(1.5 / max(max(once.values()), LEAST))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):  # each method goes first every other round
        for name in list(runs)[:: -1 if number % 2 else 1]:
            times[name].append(repeated(runs[name], counts[name]))
    picks = merge_is_faster(*tensors, is_causal=case.queries > 1)
    return {
        "case": asdict(case), "errors": errors, "times": times,
        "auto": "merged" if picks else "joined",
        "ratio": [m / j for m, j in zip(times["merged"], times["joined"], strict=True)],
    }  # fmt: skip


def main() -> int:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=31, help="at most; at least 7")
    parser.add_argument("--longest", type=int, default=2048, help="cases of at most so many keys")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    start, found = time.perf_counter(), {}
    table = Table("case", "joined ms", "merged ms", "merged / joined (min-max)", "auto")
    cases = [case for case in all_cases() if case.keys <= arguments.longest]
    for case in cases:
        values = found[case.name] = measure(case, arguments.rounds)
        times = {name: statistics.median(x) * 1e3 for name, x in values["times"].items()}
        ratio = values["ratio"]
        table.add_row(
            case.name, f"{times['joined']:.3f}", f"{times['merged']:.3f}",
            f"{statistics.median(ratio):.2f} ({min(ratio):.2f}-{max(ratio):.2f})", values["auto"],
        )  # fmt: skip
    Console(width=130).print(table)
    options = {name: getattr(arguments, name) for name in ("rounds", "threads", "longest")}
    seconds = time.perf_counter() - start
    save_result(arguments.output, "prefix_attention", options=options, cases=found, seconds=seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
