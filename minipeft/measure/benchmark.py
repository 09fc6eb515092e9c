"""minipeft.benchmark: the methods compared on a model of your own."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from minipeft.adapters.progress import Progress
from minipeft.adapters.protocol import whole
from minipeft.adapters.targets import Head, Target
from minipeft.measure.machine import hardware, versions
from minipeft.measure.methods import Method, chosen
from minipeft.measure.processes import CHILD, Result, packed, rounds_of
from minipeft.measure.report import Report
from minipeft.measure.run import Case, Loss, own_loss

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
    rounds: int = 2,
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
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
    one; the first step of a run is not counted.  A gate comes before the figures: off, an adapter
    changes no bit of the loss, and an untrained LoRA changes none either; what trains has finite
    gradients and nothing else has any; frozen weights have the checksum that they had.  A method
    that refuses the model is "unsupported" in the table, with the reason.

    `predicted MB` is what `predict_memory` says of the step's peak, where model and loss read no
    values (they run without any).  `peak MB` is the highest resident memory above the process after
    its imports and a small step; on CUDA, of allocations.  FLOPs are of one forward and backward,
    by torch's counter.  `progress` None: a bar on a terminal, else a line for each run.

    Raises:
        ValueError: no such method; functions that another process cannot import; numbers below 1.
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
    found = chosen(methods)
    cases = {
        name: Case(
            method, make_model, make_batch, loss, steps=steps, settings=settings,
            learning_rate=learning_rate, device=device, threads=threads, seed=seed,
        )
        for name, method in found.items()
    }  # fmt: skip
    for case in cases.values():
        packed(case)  # what cannot run is refused before the first run
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


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)


class Display:
    """A bar on a terminal; elsewhere a line for each run, so that a log stays short."""

    def __init__(
        self, methods: Mapping[str, Result], runs: int, *, shown: bool | None = None
    ) -> None:
        self.titles = {name: entry["title"] for name, entry in methods.items()}
        self.bar = Progress(total=runs, unit="run", shown=shown)
        self.lines = shown is None and self.bar.disable

    def __call__(self, event: str, values: Result) -> None:
        if event == "step":
            self.bar.set_postfix_str(f"step {values['step']}, loss {values['loss']:.3f}", False)
            self.bar.update(0)
            return
        title = self.titles.get(values["method"], values["method"])
        if event == "start":
            self.bar.set_description_str(f"round {values['round'] + 1}: {title}", False)
            return
        self.bar.update()
        result = values["result"]
        reason = result.get("failed") or result.get("unsupported")
        if reason or self.lines:
            times = result.get("step_seconds") or []
            said = reason or f"{len(times)} steps in {sum(times):.1f} s"
            self.bar.write(f"round {values['round'] + 1}: {title}: {said}", file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
