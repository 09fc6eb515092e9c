"""`methods` compares the methods, `gpu` times the kernels, `memory` predicts and measures memory,
`report FILE` draws a result again.
"""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import gpu, memory, report
from benchmarks.harness import TIMED_STEPS, estimate_seconds, options_from, run_all
from benchmarks.methods import METHODS
from benchmarks.models import LlamaSizes, require, smollm2_folder

RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    jobs = main.add_subparsers(dest="job", required=True)
    job = jobs.add_parser(
        "methods", help="train one model with every method and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    job.add_argument("--model", choices=["smollm2", "llama"], default="smollm2",
                     help="llama: random weights, sizes below")  # fmt: skip
    for name, field in LlamaSizes.__dataclass_fields__.items():
        job.add_argument(f"--{name.replace('_', '-')}", type=positive, default=field.default)
    job.add_argument("--methods", nargs="+", choices=list(METHODS), default=None,
                     help="default: all")  # fmt: skip
    job.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    job.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                     help="auto: float32 on a CPU without products of bfloat16")  # fmt: skip
    job.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    job.add_argument("--batch", type=positive, default=3, help="conversations in a batch")
    job.add_argument("--length", type=positive, default=256, help="tokens in a conversation")
    job.add_argument("--steps", type=positive, default=8, help="of the first round")
    job.add_argument("--rounds", type=positive, default=2,
                     help=f"the later ones time {TIMED_STEPS} steps")  # fmt: skip
    job.add_argument("--validation-rows", type=positive, default=8)
    job.add_argument("--rank", type=positive, default=16)
    job.add_argument("--alpha", type=float, default=None, help="default: twice the rank")
    job.add_argument("--prefix-length", type=positive, default=16, help="of P-tuning v2")
    job.add_argument("--learning-rate", type=float, default=None, help="default: each method's own")
    job.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    job.add_argument(
        "--chunked-loss",
        action="store_true",
        help="torch's linear_cross_entropy (2.13): less memory, more time; float32",
    )
    job.add_argument("--threads", type=positive, default=None)
    job.add_argument("--seed", type=int, default=0)
    job.add_argument("--output", type=Path, default=RESULTS)
    gpu.add_options(jobs.add_parser("gpu", help="time the kernels on a GPU beside F.linear"))
    memory.add_options(jobs.add_parser("memory", help="predicted memory beside measured"))
    again = jobs.add_parser("report", help="table and plot of a result file")
    again.add_argument("file", type=Path)
    again.add_argument("--markdown", action="store_true")
    return main


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


class Display:
    """A progress bar over all steps of all runs."""

    def __init__(self, options: dict[str, Any]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        later = (options["rounds"] - 1) * TIMED_STEPS
        total = len(options["methods"]) * (options["steps"] + later)
        self.progress = Progress(
            TextColumn("{task.description:38}"), BarColumn(), TextColumn("{task.completed:.0f}/"
            "{task.total:.0f} steps"), TimeElapsedColumn(), Remaining(), refresh_per_second=0.5,
        )  # fmt: skip
        self.task = self.progress.add_task("", total=total)
        self.label = ""

    def __call__(self, event: str, values: dict[str, Any]) -> None:
        if event == "start":
            known = METHODS.get(values["method"])
            title = known.title if known else "untouched model"
            self.label = f"round {values['round'] + 1}: {title}"
            self.progress.update(self.task, description=self.label)
        elif event == "step" and values["phase"] == "step":
            text = f"{self.label} {values['loss']:.2f}"
            self.progress.update(self.task, advance=1, description=text)
        elif event == "end":
            reason = values["result"].get("failed") or values["result"].get("unsupported")
            if reason:
                self.progress.console.print(f"{self.label}: {reason}")


def methods(arguments: argparse.Namespace) -> int:
    """The methods job; returns the exit status."""
    require("rich", "bench")
    require("matplotlib", "bench")
    options = options_from(arguments)
    print(
        f"{len(options['methods'])} methods ({', '.join(options['methods'])}), "
        f"{options['steps']} training steps each, {options['rounds']} rounds, one process at a "
        f"time; about {estimate_seconds(options) / 60:.0f} minutes.",
        flush=True,
    )
    if options["sizes"] is None:
        smollm2_folder()  # converted once, outside any timing
    display = Display(options)
    with display.progress:
        data = run_all(options, display)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = f"methods-{datetime.now():%Y%m%d-%H%M%S}"
    file, picture = arguments.output / f"{name}.json", arguments.output / f"{name}.png"
    file.write_text(json.dumps(data, indent=1) + "\n")
    report.plot(data, picture)
    report.print_table(data)
    print(f"{data['seconds']:.0f} s; written: {file.name}, {picture.name} in {file.parent.name}/")
    return 1 if any("failed" in run for run in [data["base"], *data["runs"]]) else 0


def main() -> int:
    """Parse and run."""
    arguments = parser().parse_args()
    try:
        if arguments.job == "methods":
            return methods(arguments)
        if arguments.job == "gpu":
            return gpu.run(arguments)
        if arguments.job == "memory":
            return memory.run(arguments)
        data = report.load(arguments.file)
    except (ImportError, ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if arguments.markdown:
        print(report.markdown(data))
    else:
        report.print_table(data)
        report.plot(data, arguments.file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
