"""One model trained with every method, beside other libraries: `python -m benchmarks methods`.

SmolLM2 on chit-chat by default.  `--model FOLDER` takes a Hugging Face model, and
`--data FILE.jsonl` other texts.  `--model file.py:make_model` takes a model of your own, whose file
has `make_batch(step)` and, where the model returns no loss, `loss(model, batch)` too;
minipeft.benchmark, which runs them all, says what they are.
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

import torch

import minipeft as mp
from benchmarks.harness import estimate_own, estimate_seconds, options_from, run_all
from benchmarks.methods import METHODS
from benchmarks.models import LlamaSizes, require, smollm2_folder
from benchmarks.output import commit, text_of
from minipeft.measure.benchmark import LATER_STEPS
from minipeft.measure.loss import own_loss
from minipeft.measure.methods import METHODS as OURS
from minipeft.measure.report import Report

RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    job = argparse.ArgumentParser(
        prog="python -m benchmarks methods", description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    job.add_argument(
        "--model", default="smollm2",
        help="smollm2; llama: random weights, sizes below; a folder with any causal language "
        "model of transformers and its tokenizer; file.py:function, see above",
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
    job.add_argument(
        "--device",
        type=device_name,
        default="cpu",
        help="cpu, cuda, or one of several GPUs, as cuda:1",
    )
    job.add_argument("--batch", type=positive, default=3, help="conversations in a batch")
    job.add_argument("--length", type=positive, default=256, help="tokens in a conversation")
    job.add_argument("--steps", type=positive, default=8, help="of the first round")
    job.add_argument(
        "--rounds",
        type=positive,
        default=3,
        help=f"the first measures memory, each later one times {LATER_STEPS} steps",
    )
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


def device_name(text: str) -> str:
    """A device as torch names it."""
    try:
        return str(torch.device(text))
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: cpu, cuda, cuda:1") from None


SIZES = tuple(LlamaSizes.__dataclass_fields__)
# options that do nothing with a kind of model
IDLE = {
    "a model from a file": (*SIZES, "data", "batch", "length", "validation_rows", "dtype", "peers",
                            "checkpointing", "chunked_loss"),
    "smollm2": (*SIZES, "head"),
    "llama": ("data", "head"),
    "a folder": (*SIZES, "head"),
}  # fmt: skip


def kind_of(model: str) -> str:
    """The kind of model that --model names, a key of IDLE."""
    if ".py:" in model:
        return "a model from a file"
    return model if model in IDLE else "a folder"


def refuse_idle_options(words: list[str]) -> None:
    """Refuse options that would change nothing.

    Raises:
        ValueError: some were given; names them.
    """
    job = parser()
    given = job.parse_args(words)
    kind = kind_of(given.model)
    unset = object()
    job.set_defaults(**dict.fromkeys(vars(given), unset))
    said = {name for name, value in vars(job.parse_args(words)).items() if value is not unset}
    if idle := [f"--{name.replace('_', '-')}" for name in IDLE[kind] if name in said]:
        why = "; the file decides this itself" if kind == "a model from a file" else ""
        raise ValueError(f"{', '.join(idle)}: of no effect with {kind}; leave it out{why}")


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
    seconds = estimate_own(
        model, batch, loss, steps=arguments.steps, rounds=arguments.rounds, methods=len(methods)
    )
    announce(methods, arguments, seconds)
    report = mp.benchmark(
        model, batch, methods, loss=loss, head=arguments.head, rank=arguments.rank,
        alpha=2 * arguments.rank if arguments.alpha is None else arguments.alpha,
        prefix_length=arguments.prefix_length, learning_rate=arguments.learning_rate,
        steps=arguments.steps, rounds=arguments.rounds, device=arguments.device,
        threads=arguments.threads, seed=arguments.seed,
    )  # fmt: skip
    report.data["about"] = (
        f"{arguments.model.rpartition('/')[2]}, {arguments.steps} steps, rank {arguments.rank}"
    )
    report.data["commit"] = commit()
    return report


def announce(methods: list[str], arguments: argparse.Namespace, seconds: float | None) -> None:
    """Say what is going to run, and about how long it takes."""
    time = (
        "its step cannot be counted before it runs, so the time is not known" if seconds is None
        else f"about {max(1, round(seconds / 60))} minutes"
    )  # fmt: skip
    print(
        f"{len(methods)} methods ({', '.join(methods)}), {arguments.steps} training steps each, "
        f"{arguments.rounds} rounds, one process at a time; {time}.",
        flush=True,
    )


def compared(arguments: argparse.Namespace) -> Report:
    """The methods and their peers on SmolLM2, a LLaMA or a folder's model."""
    options = options_from(arguments)
    announce(options["methods"], arguments, estimate_seconds(options))
    if options["sizes"] is None and options["folder"] is None:
        smollm2_folder()  # converted once, outside any timing
    return run_all(options)


def main() -> int:
    """Compare, print, write; the exit status is 1 where a method of ours gave no figures."""
    arguments = parser().parse_args()
    try:
        refuse_idle_options(sys.argv[1:])
        require("rich", "bench")
        require("matplotlib", "bench")
        report = (own_model if ".py:" in arguments.model else compared)(arguments)
    except (ImportError, ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = f"methods-{datetime.now():%Y%m%d-%H%M%S}"
    file, picture = arguments.output / f"{name}.json", arguments.output / f"{name}.png"
    file.write_text(text_of(report.data) + "\n")
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
