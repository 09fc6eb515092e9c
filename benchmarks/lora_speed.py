"""LoRA layers beside PEFT's in one process: `python -m benchmarks.lora_speed`.

Five questions, each with both sides taking turns, so that a noisy machine slows both:

    dispatch      a 64 x 64 layer, 4 rows: Python time above the bare nn.Linear
    LoRA          1024 x 1024, rank 16, 64 and 512 rows: forward, forward and backward
    DoRA          the same, also against our own LoRA
    mixed batch   64 rows that use 8 adapters, one product each way
    import        in fresh processes

Outputs are compared before anything is timed.
"""

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import minipeft as mp
from benchmarks.import_time import seconds as seconds_to_import
from benchmarks.output import save_result

RESULTS = Path(__file__).parent / "results"
SIZE, RANK, ALPHA = 1024, 16, 32
Run = Callable[[], Any]


def seconds(run: Run, least: float = 0.01) -> float:
    """Seconds of one call, over as many as take 10 ms."""
    count = 1
    while True:
        start = time.perf_counter()
        for _ in range(count):
            run()
        elapsed = time.perf_counter() - start
        if elapsed > least:
            return elapsed / count
        count *= 4


def in_turn(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        seconds(run)
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def ratio(times: dict[str, list[float]], a: str, b: str, less: str | None = None) -> list[float]:
    """Round by round, a / b; with `less` taken off both."""
    rest = times[less] if less else [0.0] * len(times[a])
    return [(x - r) / (y - r) for x, y, r in zip(times[a], times[b], rest, strict=True)]


def peft_linear(base: nn.Linear, rank: int, alpha: float, *, dora: bool = False) -> Any:
    """PEFT's layer over a linear one."""
    import peft
    from peft.tuners.lora.layer import Linear

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_dora=dora)
    layer = Linear(copy.deepcopy(base), "default", config=config, r=rank, lora_alpha=alpha)
    layer.base_layer.requires_grad_(False)  # as its model does
    return layer


def pair(size: int, rank: int, alpha: float, *, dora: bool = False) -> tuple[nn.Module, Any]:
    """Our layer and PEFT's with the same numbers."""
    base = nn.Linear(size, size)
    kind = mp.layers.DoRALinear if dora else mp.LoRALinear
    ours = kind(copy.deepcopy(base), rank, alpha)
    theirs = peft_linear(base, rank, alpha, dora=dora)
    with torch.no_grad():
        ours.lora_b.normal_(std=0.02)
        theirs.lora_A["default"].weight.copy_(ours.lora_a)
        theirs.lora_B["default"].weight.copy_(ours.lora_b)
    return ours, theirs


def agree(a: Tensor, b: Tensor, what: str) -> None:
    """Raise unless two outputs are equal but for the order of float32 sums."""
    if not torch.allclose(a, b, rtol=1e-4, atol=1e-4):
        raise RuntimeError(f"{what}: outputs differ by {(a - b).abs().max().item():.1e}")


def both_ways(layer: nn.Module, x: Tensor) -> Run:
    """Forward and backward, to the input too."""

    def run() -> None:
        layer(x).sum().backward()

    return run


def dispatch(rounds: int) -> dict[str, Any]:
    """Python time of one small layer, with gradients enabled."""
    ours, theirs = pair(64, 8, 8)
    bare, x = nn.Linear(64, 64), torch.randn(4, 64)
    agree(ours(x), theirs(x), "dispatch")
    times = in_turn(
        {"bare": lambda: bare(x), "ours": lambda: ours(x), "peft": lambda: theirs(x)}, rounds
    )
    return {"times": times, "ratio": ratio(times, "ours", "peft", less="bare")}


def layers(rows: int, rounds: int, *, dora: bool) -> dict[str, Any]:
    """A large layer, forward, and forward with backward."""
    ours, theirs = pair(SIZE, RANK, ALPHA, dora=dora)
    plain = mp.LoRALinear(copy.deepcopy(ours.base), RANK, ALPHA)
    x = torch.randn(rows, SIZE, requires_grad=True)
    agree(ours(x), theirs(x), f"{'DoRA' if dora else 'LoRA'} of {rows} rows")
    found = {}
    for what, wrap in (("forward", lambda m, x: lambda: m(x)), ("both ways", both_ways)):
        runs = {"ours": wrap(ours, x), "peft": wrap(theirs, x), "our LoRA": wrap(plain, x)}
        times = in_turn(runs, rounds)
        found[what] = {
            "times": times, "ratio": ratio(times, "ours", "peft"),
            "to LoRA": ratio(times, "ours", "our LoRA"),
        }  # fmt: skip
    return found


def mixed_batch(rounds: int, rows: int = 64, adapters: int = 8) -> dict[str, Any]:
    """A batch whose rows use different adapters; PEFT's `adapter_names` beside."""
    import peft

    names = [f"a{i}" for i in range(adapters)]
    model = nn.Sequential(nn.Linear(SIZE, SIZE))
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"]), "a0"
    )
    for name in names[1:]:
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
        theirs.add_adapter(name, config)
    theirs.eval()
    layer = theirs.base_model.model[0]
    for name in names:
        mp.inject_lora(model, ["0"], RANK, ALPHA, name=name)
        own = mp.adapter_state_dict(model, name=name)
        with torch.no_grad():
            own["0.lora_b"].normal_(std=0.02)
            layer.lora_A[name].weight.copy_(own["0.lora_a"])
            layer.lora_B[name].weight.copy_(own["0.lora_b"])
    model.eval()
    of_row = [names[i % adapters] for i in range(rows)]
    mp.use_adapters(model, rows=of_row)
    x = torch.randn(rows, SIZE)
    with torch.no_grad():
        agree(model(x), theirs(x, adapter_names=of_row), "mixed batch")
        base = nn.Linear(SIZE, SIZE)
        times = in_turn(
            {"ours": lambda: model(x), "peft": lambda: theirs(x, adapter_names=of_row),
             "base": lambda: base(x)}, rounds,
        )  # fmt: skip
    return {"times": times, "ratio": ratio(times, "ours", "peft"),
            "to base": ratio(times, "ours", "base")}  # fmt: skip


def import_seconds(rounds: int) -> dict[str, Any]:
    """Of torch, minipeft and peft, each in a fresh process."""
    times: dict[str, list[float]] = {"torch": [], "minipeft": [], "peft": []}
    for _ in range(rounds):
        for name, found in times.items():
            found.append(seconds_to_import(name))
    return {"times": times, "ratio": ratio(times, "minipeft", "peft"),
            "to torch": ratio(times, "minipeft", "torch")}  # fmt: skip


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def milliseconds(values: list[float]) -> str:
    """The median."""
    return f"{statistics.median(values) * 1e3:.3f}"


def main() -> int:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rounds = arguments.rounds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, Any] = {"dispatch, 64 x 64, 4 rows": dispatch(rounds)}
        for dora in (False, True):
            for rows in (64, 512):
                kind = "DoRA" if dora else "LoRA"
                for what, values in layers(rows, rounds, dora=dora).items():
                    found[f"{kind} {SIZE} x {SIZE}, {rows} rows, {what}"] = values
        found["mixed batch, 64 rows of 8 adapters"] = mixed_batch(rounds)
        found["import"] = import_seconds(max(3, rounds // 5))
    table = Table("case", "ours ms", "PEFT ms", "ours / PEFT (min-max)", "ours / other")
    for case, values in found.items():
        times = values["times"]
        other = next((k for k in ("to LoRA", "to base", "to torch") if k in values), None)
        table.add_row(
            case, milliseconds(times.get("ours", times.get("minipeft", []))),
            milliseconds(times["peft"]), spread(values["ratio"]),
            f"{spread(values[other])} {other}" if other else
            f"bare {milliseconds(times['bare'])} ms, taken off both",
        )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    options = {"rounds": rounds, "threads": arguments.threads}
    save_result(arguments.output, "lora_speed", options=options, cases=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
