"""minipeft.benchmark: the methods compared on a model of your own."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from minipeft.adapters.protocol import whole
from minipeft.adapters.targets import Head, Target
from minipeft.measure.display import Display
from minipeft.measure.loss import Loss, own_loss
from minipeft.measure.machine import hardware, versions
from minipeft.measure.methods import Method, chosen
from minipeft.measure.processes import CHILD, Result, packed, rounds_of
from minipeft.measure.report import Report
from minipeft.measure.run import Case

LATER_STEPS = 3  # of rounds after the first


def benchmark(
    make_model: Callable[[], Any],
    make_batch: Callable[[int], Any],
    methods: Sequence[str] | Mapping[str, Method | Callable[[Any], Any] | None] = (
        "full",
        "lora",
        "qlora",
    ),
    *,
    loss: Loss = own_loss,
    target: Target = "all-linear",
    head: Head = None,
    rank: int = 16,
    alpha: float | None = None,
    prefix_length: int = 16,
    learning_rate: float | None = None,
    steps: int = 8,
    rounds: int = 3,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    seed: int = 0,
    after: Callable[[Any], dict[str, float]] | None = None,
    progress: bool | None = None,
) -> Report:
    """Train a model with each method, and compare memory, time, FLOPs and losses.

    `make_model()` gives a new model, `make_batch(step)` the batch of a step: a mapping, a tuple or
    a tensor, which the model is called with.  Both run in a process of their own for each method,
    so they must be functions at the top of a module or script, and a script calls this below
    `if __name__ == "__main__":`.  `loss(model, batch)` gives the number to train on; by default the
    model's own (`.loss`).  `target` and `head` are those of `inject_lora`.  `methods` are names
    ("full", "lora", "dora", "qlora", "ptuning"), or a mapping from names to functions that change a
    model in place: {"mine": my_function, "lora": None}.

    A method runs `steps` steps of AdamW in the first of `rounds` rounds, and three in each later
    one; the first step of a run warms up and is not counted, so `steps=1` makes two.  The first
    round measures memory, with MALLOC_MMAP_THRESHOLD_=65536, without which the GNU C library keeps
    what is freed; that setting makes steps slower, so the later rounds run without it, and times
    are theirs where there are any.  The table's last lines say so.

    A gate comes before the figures: off, an adapter changes no bit of the loss, and an untrained
    LoRA changes none either; what trains has finite gradients and nothing else has any; frozen
    weights have the checksum that they had.  A method whose refusal minipeft raises is
    "unsupported" in the table, with the reason; any other error is "failed", and `report.data` has
    its traceback.

    `peak MB` is the highest resident memory above the process after its imports and a small step:
    the model made, prepared and trained; `step MB` is that of the steps alone; on CUDA, of
    allocations.  `predicted MB` is what `predict_memory` says of the step's peak, where model and
    loss read no values (they run without any); the last lines say why it says none.  FLOPs are of
    one forward and backward, by torch's counter, with attention on a CPU.

    `device` is a device's name or a torch.device.  `after(model)` gives more figures of each
    trained model for `report.data`; one named "validation_loss" gets a column.  `progress` None: a
    bar on a terminal, else a line for each run.

    Raises:
        TypeError: `make_model`, `make_batch`, `loss` or `after` is no function, `device` no device.
        ValueError: no such method or device; functions that another process cannot import; numbers
            below 1.  All these before any process starts.  And, as soon as the first process has
            computed it, a loss of the untouched model that is not one finite number.
        RuntimeError: called while a process imports the script (see above).

    The whole of it, for a GPT of your own, whose forward returns the loss:

        import minipeft as mp
        from my_gpt import make_batch, make_model

        if __name__ == "__main__":
            report = mp.benchmark(make_model, make_batch, ["full", "lora", "qlora"])
            print(report)
            report.save("methods.json")
            report.plot("methods.png")
    """
    if os.environ.get(CHILD):
        raise RuntimeError(
            "benchmark: called while a process imports this script; put the call below if __name__ "
            '== "__main__":'
        )
    for name, value in {"steps": steps, "rounds": rounds, "rank": rank,
                        "prefix_length": prefix_length}.items():  # fmt: skip
        whole("benchmark", name, value)
    settings = {
        "target": target, "head": head, "rank": rank, "alpha": rank if alpha is None else alpha,
        "prefix_length": prefix_length,
    }  # fmt: skip
    if threads is not None:
        whole("benchmark", "threads", threads)
    for name, rate in {"learning_rate": learning_rate, "alpha": alpha}.items():
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"benchmark: {name}={rate!r}; expected a number above 0")
    device = _device(device)
    functions = {"make_model": make_model, "make_batch": make_batch, "loss": loss, "after": after}
    for name, function in functions.items():
        _expect_function(name, function)
    found = chosen(methods)
    cases = {
        name: Case(
            method, make_model, make_batch, loss, steps=steps, settings=settings,
            learning_rate=learning_rate, device=device, threads=threads, seed=seed, after=after,
        )
        for name, method in found.items()
    }  # fmt: skip
    for name, case in cases.items():
        packed(name, case)  # what cannot run is refused before the first run
    options = {
        **settings, "target": str(target), "head": str(head), "learning_rate": learning_rate,
        "steps": steps, "rounds": rounds, "device": device, "threads": threads, "seed": seed,
    }  # fmt: skip
    data: Result = {
        "job": "benchmark",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "about": f"{_name(make_model)}, {steps} steps, rank {rank}",
        "hardware": hardware(),
        "versions": versions(),
        "options": options,
        "methods": described(found),
    }
    display = Display(data["methods"], rounds * len(cases), shown=progress)
    try:
        data["runs"] = rounds_of(cases, rounds, LATER_STEPS, display)
    finally:
        display.close()
    return Report(data)


def described(methods: Mapping[str, Method]) -> dict[str, Result]:
    """What the report says of methods."""
    return {
        name: {"title": m.title, "peer": m.peer, "is_peer": m.is_peer}
        for name, m in methods.items()
    }  # fmt: skip


def _device(device: str | torch.device) -> str:
    """The device's name, if this machine has it."""
    if not isinstance(device, str | torch.device):
        raise TypeError(f"benchmark: device={device!r}; expected a name or a torch.device")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"benchmark: device={device!r}; expected a name as 'cpu' or 'cuda:0'"
        ) from error
    if found.type == "meta":
        raise ValueError("benchmark: device='meta' computes nothing; expected 'cpu' or 'cuda:0'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"benchmark: device={str(found)!r}; torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return str(found)


def _expect_function(name: str, function: object) -> None:
    if isinstance(function, nn.Module):
        raise TypeError(
            f"benchmark: {name} is a {type(function).__name__}; give a function that makes a new "
            "one, since each method gets a model of its own"
        )
    if not callable(function) and not (name == "after" and function is None):
        raise TypeError(f"benchmark: {name}={function!r}; expected a function")


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)
