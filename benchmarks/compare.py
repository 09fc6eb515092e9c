"""One model trained with every method, beside other libraries: `python -m benchmarks methods`.

SmolLM2 on chit-chat by default.  `--model FOLDER` takes a Hugging Face model, and
`--data FILE.jsonl` other texts.  `--model file.py:make_model` takes a model of your own, whose file
has `make_batch(step)` and, where the model returns no loss, `loss(model, batch)` too;
minipeft.benchmark says what they are.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import minipeft as mp
from benchmarks.harness import TIMED_STEPS, estimate_seconds, options_from, run_all
from benchmarks.methods import METHODS
from benchmarks.models import LlamaSizes, require, smollm2_folder
from minipeft.measure.benchmark import Display, described
from minipeft.measure.methods import METHODS as OURS
from minipeft.measure.report import Report
from minipeft.measure.run import own_loss

RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    job = argparse.ArgumentParser(
        prog="python -m benchmarks methods", description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    job.add_argument(
        "--model", default="smollm2",
        help="smollm2; llama: random weights, sizes below; a folder of a Hugging Face model; "
        "file.py:function, see below",
    )  # fmt: skip
    job.add_argument("--data", type=Path, default=None,
                     help='JSON Lines of {"messages": [...]} or {"text": ...}')  # fmt: skip
    for name, field in LlamaSizes.__dataclass_fields__.items():
        job.add_argument(f"--{name.replace('_', '-')}", type=positive, default=field.default)
    job.add_argument("--methods", nargs="+", choices=list(METHODS), default=None,
                     help="default: all")  # fmt: skip
    job.add_argument("--head", nargs="+", default=None, help="of a model of your own: its output")
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
    return job


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


@cache
def module_of(path: str) -> ModuleType:
    """The module in a file, which is imported once.

    Raises:
        ValueError: there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"--model: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None  # the file is there and ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).parent))  # it may import its neighbours
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class FromFile:
    """A function of a file, which another process finds again."""

    path: str
    name: str

    def __call__(self, *args: Any) -> Any:
        return getattr(module_of(self.path), self.name)(*args)


def from_file(text: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """make_model, make_batch and the loss of `file.py:make_model`.

    Raises:
        ValueError: no such file, or it lacks one of the two functions.
    """
    path, _, name = text.rpartition(":")
    path = str(Path(path).resolve())
    module = module_of(path)
    for wanted in (name, "make_batch"):
        if not callable(getattr(module, wanted, None)):
            raise ValueError(f"--model: {Path(path).name} has no function {wanted!r}")
    loss = FromFile(path, "loss") if callable(getattr(module, "loss", None)) else own_loss
    return FromFile(path, name), FromFile(path, "make_batch"), loss


def own_model(arguments: argparse.Namespace) -> Report:
    """The methods on a model from a file, without other libraries."""
    model, batch, loss = from_file(arguments.model)
    methods = arguments.methods or [name for name in OURS if name in METHODS]
    if foreign := [name for name in methods if name not in OURS]:
        raise ValueError(
            f"--methods: {foreign} work on the models of this job; for a model of your own give "
            "mp.benchmark a function"
        )
    if arguments.data or arguments.chunked_loss or arguments.checkpointing:
        raise ValueError(
            "--data, --chunked-loss and --checkpointing: the file of your model decides this itself"
        )
    report = mp.benchmark(
        model, batch, methods, loss=loss, head=arguments.head, rank=arguments.rank,
        alpha=2 * arguments.rank if arguments.alpha is None else arguments.alpha,
        prefix_length=arguments.prefix_length, learning_rate=arguments.learning_rate,
        steps=arguments.steps, rounds=arguments.rounds, device=arguments.device,
        threads=arguments.threads, seed=arguments.seed,
    )  # fmt: skip
    report.data["about"] = f"{arguments.model.rpartition('/')[2]}, {report.data['about']}"
    return report


def compared(arguments: argparse.Namespace) -> Report:
    """The methods and their peers on SmolLM2, a LLaMA or a folder's model."""
    options = options_from(arguments)
    print(
        f"{len(options['methods'])} methods ({', '.join(options['methods'])}), "
        f"{options['steps']} training steps each, {options['rounds']} rounds, one process at a "
        f"time; about {estimate_seconds(options) / 60:.0f} minutes.",
        flush=True,
    )
    if options["sizes"] is None and options["folder"] is None:
        smollm2_folder()  # converted once, outside any timing
    methods = described({name: METHODS[name] for name in options["methods"]})
    titles = {"base": {"title": "untouched model"}, **methods}
    display = Display(titles, 1 + options["rounds"] * len(methods))
    try:
        return run_all(options, display)
    finally:
        display.close()


def main() -> int:
    """Compare, print, write; the exit status is 1 where a method of ours gave no figures."""
    arguments = parser().parse_args()
    try:
        require("rich", "bench")
        require("matplotlib", "bench")
        report = (own_model if ".py:" in arguments.model else compared)(arguments)
    except (ImportError, ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = f"methods-{datetime.now():%Y%m%d-%H%M%S}"
    file, picture = arguments.output / f"{name}.json", arguments.output / f"{name}.png"
    report.save(file)
    report.plot(picture)
    report.show()
    print(f"written: {file.name}, {picture.name} in {file.parent.name}/")
    wrong = [
        run for run in report.data["runs"]
        if "failed" in run
        or ("unsupported" in run and not report.methods[run["method"]]["is_peer"])
    ]  # fmt: skip
    return 1 if wrong or "failed" in report.data.get("base", {}) else 0


if __name__ == "__main__":
    sys.exit(main())
