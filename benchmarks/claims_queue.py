"""The runs of the claims job: which come next, two at a time, each kept in a file when it ends.

The file has one JSON object a line.  A job that is started again with the same file and the same
sizes goes on after its last line.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.claims_arms import BY_NAME, HIGHER_IS_BETTER, SEEDS, STEP, Arm
from minipeft.adapters.progress import Progress
from minipeft.measure.machine import hardware

Result = dict[str, Any]


class Run(NamedTuple):
    """One training: which arm, at which rate, with which seed."""

    arm: str
    rate: float
    seed: int


Done = dict[Run, Result]


def better(task: str, a: float | None, b: float | None) -> bool:
    """Whether score a is better than b; None, a run that ended without a number, is the worst."""
    if a is None or b is None:
        return b is None and a is not None
    return a > b if HIGHER_IS_BETTER[task] else a < b


def best_rate(arm: Arm, done: Mapping[Run, Result], tried: Iterable[float]) -> float:
    """The rate whose run with seed 0 is best on validation data; the first of equals."""
    rates = list(tried)
    best = rates[0]
    for rate in rates[1:]:
        scores = [done[Run(arm.name, r, SEEDS[0])]["valid"] for r in (rate, best)]
        if better(arm.task, *scores):
            best = rate
    return best


def beyond(rates: tuple[float, ...], best: float) -> float | None:
    """One more rate beyond the edge where the best is; None: it is inside, or the only one."""
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    return float(f"{best * (STEP if best == rates[-1] else 1 / STEP):.3g}")


def chosen_rate(arm: Arm, done: Mapping[Run, Result]) -> float | None:
    """The rate that the arm is reported at; None while its runs with seed 0 are not all done."""
    if any(Run(arm.name, rate, SEEDS[0]) not in done for rate in arm.rates):
        return None
    best = best_rate(arm, done, arm.rates)
    more = beyond(arm.rates, best)
    if more is None:
        return best
    if Run(arm.name, more, SEEDS[0]) not in done:
        return None
    return best_rate(arm, done, (best, more))


def wanted(arm: Arm, done: Mapping[Run, Result]) -> list[Run]:
    """The runs of an arm that can be started now, given those that are done."""
    first = [Run(arm.name, rate, SEEDS[0]) for rate in arm.rates]
    if missing := [run for run in first if run not in done]:
        return missing
    rate = chosen_rate(arm, done)
    if rate is None:
        more = beyond(arm.rates, best_rate(arm, done, arm.rates))
        assert more is not None  # else the rate would be chosen
        return [Run(arm.name, more, SEEDS[0])]
    every = [Run(arm.name, rate, seed) for seed in SEEDS]
    return [run for run in every if run not in done]


def read(path: Path, sizes: Result) -> Done:
    """The runs in a state file; a line that was cut off by a kill is left out.

    Raises:
        ValueError: the file is of other sizes, whose scores say something else.
    """
    done: Done = {}
    if not path.exists():
        return done
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["sizes"] != sizes[BY_NAME[entry["arm"]].task]:
            raise ValueError(
                f"{path.name}: a run of {entry['arm']} has sizes {entry['sizes']}, asked for are "
                f"{sizes[BY_NAME[entry['arm']].task]}; give another --state"
            )
        done[Run(entry["arm"], entry["rate"], entry["seed"])] = entry
    return done


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def work(run: Run, sizes: Result) -> Result:
    """One run, in a process of the pool."""
    arm = BY_NAME[run.arm]
    module = import_module(f"benchmarks.claims_{arm.task}")
    begun = time.perf_counter()
    found = module.run(arm, run.rate, run.seed, module.Sizes(**sizes[arm.task]))
    seconds = time.perf_counter() - begun
    machine = hardware()  # a state file may go on elsewhere
    return {**run._asdict(), "sizes": sizes[arm.task], **found, "seconds": seconds,
            "processor": f"{machine['processor']}, {machine['cpu_capability']}"}  # fmt: skip


def run_all(
    arms: list[Arm], sizes: Result, state: Path, *, workers: int, minutes: float
) -> tuple[Done, dict[str, str]]:
    """Run what is not done yet, arms in their order; no run starts after `minutes`.

    Returns all runs that are done, and the errors of arms that raised, by name: such an arm is
    given up, the others go on.
    """
    done, failed = read(state, sizes), {}
    deadline = time.monotonic() + 60 * minutes
    flying: dict[Future[Result], Run] = {}
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, _prepare_worker) as pool,
        Progress(total=None, unit="run") as bar,
    ):
        while True:
            open_runs = [
                run for arm in arms if arm.name not in failed for run in wanted(arm, done)
                if run not in flying.values()
            ]  # fmt: skip
            if time.monotonic() < deadline:
                for run in open_runs[: workers - len(flying)]:
                    flying[pool.submit(work, run, sizes)] = run
            if not flying:
                break
            ended, _ = wait(flying, return_when=FIRST_COMPLETED)
            for future in ended:
                run = flying.pop(future)
                try:
                    entry = future.result()
                except Exception as error:
                    failed[run.arm] = f"{type(error).__name__}: {error}"
                    print(f"{run}: {failed[run.arm]}", flush=True)
                    continue
                with state.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                done[run] = entry
                bar.set_description(f"{run.arm}, rate {run.rate:g}, seed {run.seed}")
                bar.update()
    return done, failed
