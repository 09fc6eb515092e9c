"""The methods job: minipeft's methods and other libraries', on the same batches.

minipeft.measure runs them, in rounds, each in a process of its own.
"""

import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import Batches, chat_batches, random_batches
from benchmarks.loss import MakeBatch, MakeModel, Validation, loss_of
from benchmarks.methods import METHODS
from benchmarks.models import LlamaSizes, load_tokenizer, require, training_dtype
from minipeft.measure.benchmark import described
from minipeft.measure.machine import hardware, versions
from minipeft.measure.processes import Event, in_a_process, rounds_of
from minipeft.measure.report import Report
from minipeft.measure.run import Case

Result = dict[str, Any]
TIMED_STEPS = 3  # of the later rounds; the first is not counted
PARAMETERS = 134.5e6  # of SmolLM2-135M, for the estimate


def commit() -> str | None:
    """The commit of the code, with '+changes' where the tree differs from it."""
    root = Path(__file__).parent.parent
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def save_result(folder: Path, job: str, **content: Any) -> Path:
    """Write a job's figures with when, where and on which code they were measured; says so."""
    now = datetime.now(UTC)
    result = {
        "job": job, "when": now.isoformat(timespec="seconds"), "commit": commit(),
        "hardware": hardware(), "versions": versions(), **content,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{job}-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.name} in {path.parent.name}/")
    return path


def make_batches(options: Result) -> tuple[Batches, Batches]:
    """The batches that every method gets."""
    rows = {
        "train_rows": options["batch"] * max(options["steps"], TIMED_STEPS),
        "validation_rows": options["validation_rows"],
        "length": options["length"],
        "seed": options["seed"],
    }
    if options["sizes"] is not None:
        return random_batches(options["sizes"]["vocabulary"], **rows)
    return chat_batches(load_tokenizer(options["folder"]), data=options["data"], **rows)


def estimate_seconds(options: Result) -> float:
    """About how long all runs take: 6 FLOPs a parameter and token, and 12 s to start a process.

    The rates are those of two-core machines with AVX-512 and AMX, and with AVX2; on another, the
    progress bar knows better after the first run.
    """
    sizes = options["sizes"]
    parameters = PARAMETERS
    if sizes is not None:
        width, kv = sizes["hidden"], sizes["hidden"] * sizes["kv_heads"] // sizes["heads"]
        layer = 2 * width * (width + kv) + 3 * width * sizes["intermediate"]
        parameters = sizes["layers"] * layer + sizes["vocabulary"] * width
    wide = torch.backends.cpu.get_cpu_capability() != "AVX2"
    rate = 5e11 if options["dtype"] == "bfloat16" else 1.8e11 if wide else 1e11
    row = 6 * parameters * options["length"] / rate
    step = row * options["batch"]
    train = options["steps"] * step + options["validation_rows"] * row / 3 + step
    later = (options["rounds"] - 1) * (TIMED_STEPS + 1) * step
    processes = 1 + options["rounds"] * len(options["methods"])
    return 12 * processes + len(options["methods"]) * (train + later)


def run_all(options: Result, on_event: Event) -> Report:
    """All runs of the job."""
    require("safetensors", "hf")
    from safetensors.torch import save_file

    start = time.perf_counter()
    train, validation = make_batches(options)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as name:
        path = str(Path(name) / "batches.safetensors")
        tensors = {f"train.{k}": v.contiguous() for k, v in train._asdict().items()}
        tensors |= {f"validation.{k}": v.contiguous() for k, v in validation._asdict().items()}
        save_file(tensors, path)
        shared = case_of(options, path)
        untouched = replace(shared, method=METHODS["full"], steps=0, flops=False)
        on_event("start", {"method": "base", "round": 0})
        base = in_a_process(untouched, lambda values: on_event("step", values))
        on_event("end", {"method": "base", "round": 0, "result": base})
        cases = {name: replace(shared, method=METHODS[name]) for name in options["methods"]}
        runs = rounds_of(cases, options["rounds"], TIMED_STEPS, on_event)
    check_counts(runs)
    return Report({
        "job": "methods",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "about": about(options),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "options": options,
        "batches": {"train": train.digest(), "validation": validation.digest()},
        "seconds": time.perf_counter() - start,
        "methods": described({name: METHODS[name] for name in options["methods"]}),
        "base": base,
        "runs": runs,
    })  # fmt: skip


def case_of(options: Result, path: str) -> Case:
    """What every run of the job has in common; `path` has the batches."""
    sizes = None if options["sizes"] is None else LlamaSizes(**options["sizes"])
    dtype = getattr(torch, options["dtype"])
    model = MakeModel(sizes, dtype, options["seed"], options["checkpointing"], options["folder"])
    settings = {name: options[name] for name in ("rank", "alpha", "prefix_length", "checkpointing")}
    return Case(
        METHODS["full"], model, MakeBatch(path, options["batch"]),
        partial(loss_of, chunked=options["chunked_loss"]), steps=options["steps"],
        settings={"target": "all-linear", **settings}, learning_rate=options["learning_rate"],
        device=options["device"], threads=options["threads"], seed=options["seed"],
        after=Validation(path, options["batch"], options["device"]),
    )  # fmt: skip


def about(options: Result) -> str:
    """Model and settings in one line."""
    model = "SmolLM2-135M" if options["sizes"] is None else f"LLaMA {options['sizes']}"
    if options.get("folder"):
        model = Path(options["folder"]).name
    rank = f"rank {options['rank']}"
    if {"ptuning", "peft-prefix"} & set(options["methods"]):
        rank += f", prefix {options['prefix_length']}"
    return (
        f"{model}, {options['dtype']}, {options['steps']} steps of {options['batch']} x "
        f"{options['length']} tokens, {rank}"
    )


def check_counts(runs: list[Result]) -> None:
    """A method and its peer train the same number of parameters, or both fail the gate."""
    counts = {run["method"]: run.get("trainable_parameters") for run in runs if run["round"] == 0}
    for name, method in METHODS.items():
        ours, theirs = counts.get(name), counts.get(method.peer or "")
        if ours is None or theirs is None or ours == theirs:
            continue
        for run in runs:
            if run["method"] in (name, method.peer):
                run.pop("step_seconds", None)
                run["failed"] = f"gate: {name} trains {ours} parameters, {method.peer} {theirs}"


def options_from(arguments: Any) -> Result:
    """The parsed command line as the plain dictionary that workers and the report get."""
    sizes, folder = None, None
    if arguments.model not in ("smollm2", "llama"):
        folder = arguments.model
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"--model {folder}: expected smollm2, llama, a folder with a config.json, or "
                "file.py:function"
            )
    if arguments.model == "llama":
        names = LlamaSizes.__dataclass_fields__
        sizes = {name: getattr(arguments, name) for name in names}
    methods = arguments.methods or [
        name for name, method in METHODS.items() if arguments.peers or not method.is_peer
    ]
    dtype = training_dtype(arguments.dtype, arguments.device)
    if arguments.chunked_loss and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise ValueError(f"--chunked-loss needs torch 2.13; this is {torch.__version__}")
    if arguments.chunked_loss and dtype != torch.float32:
        raise ValueError(
            f"--chunked-loss rounds the loss to the model's dtype, {dtype}; add --dtype fp32"
        )
    return {
        "sizes": sizes,
        "folder": folder,
        "data": str(arguments.data) if arguments.data else None,
        "methods": methods,
        "dtype": str(dtype).removeprefix("torch."),
        "device": arguments.device,
        "batch": arguments.batch,
        "length": arguments.length,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "validation_rows": arguments.validation_rows,
        "rank": arguments.rank,
        "alpha": arguments.alpha if arguments.alpha is not None else 2 * arguments.rank,
        "prefix_length": arguments.prefix_length,
        "learning_rate": arguments.learning_rate,
        "checkpointing": arguments.checkpointing,
        "chunked_loss": arguments.chunked_loss,
        "threads": arguments.threads,
        "seed": arguments.seed,
    }
