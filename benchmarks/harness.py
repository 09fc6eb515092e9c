"""The methods job: minipeft's methods and other libraries', on the same batches.

minipeft.benchmark runs them, in rounds, each in a process of its own; here are the job's model,
batches, loss and validation, and the untouched model's loss beside them.
"""

import os
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import minipeft as mp
from benchmarks.data import Batches, chat_batches, random_batches
from benchmarks.loss import MakeBatch, MakeModel, Validation, loss_of
from benchmarks.methods import METHODS
from benchmarks.models import LlamaSizes, load_tokenizer, require, training_dtype
from benchmarks.output import commit
from minipeft.measure.benchmark import LATER_STEPS
from minipeft.measure.display import Display
from minipeft.measure.figures import count_flops
from minipeft.measure.loss import Loss, moved
from minipeft.measure.processes import in_a_process
from minipeft.measure.report import Report
from minipeft.measure.run import Case

Result = dict[str, Any]
PARAMETERS = 134.5e6  # of SmolLM2-135M, for the estimate
SECONDS = 12  # that a process takes to start, for the estimate


def make_batches(options: Result) -> tuple[Batches, Batches]:
    """The batches that every method gets."""
    rows = {
        "train_rows": options["batch"] * max(options["steps"], LATER_STEPS),
        "validation_rows": options["validation_rows"],
        "length": options["length"],
        "seed": options["seed"],
    }
    if options["sizes"] is not None:
        return random_batches(options["sizes"]["vocabulary"], **rows)
    return chat_batches(load_tokenizer(options["folder"]), data=options["data"], **rows)


def estimate_seconds(options: Result) -> float:
    """About how long all runs take: 6 FLOPs a parameter and token, and 12 s to start a process."""
    sizes = options["sizes"]
    parameters = PARAMETERS
    if sizes is not None:
        width, kv = sizes["hidden"], sizes["hidden"] * sizes["kv_heads"] // sizes["heads"]
        layer = 2 * width * (width + kv) + 3 * width * sizes["intermediate"]
        parameters = sizes["layers"] * layer + sizes["vocabulary"] * width
    elif options["folder"] is not None:
        parameters = sum(p.numel() for p in mp.meta_model(options["folder"]).parameters())
    row = 6 * parameters * options["length"] / rate(options["dtype"])
    step = row * options["batch"]
    steps = steps_of(options["steps"], options["rounds"])
    processes = 1 + options["rounds"] * len(options["methods"])
    validation = options["validation_rows"] * row / 3
    return SECONDS * processes + len(options["methods"]) * (steps * step + validation)


def rate(dtype: str) -> float:
    """FLOPs a second of two-core machines: with AMX in bfloat16, with AVX-512, and with AVX2.

    On another machine the progress bar knows better after the first run.
    """
    wide = torch.backends.cpu.get_cpu_capability() != "AVX2"
    return 5e11 if dtype == "bfloat16" else 1.8e11 if wide else 1e11


def steps_of(first: int, rounds: int) -> int:
    """Steps of a method in all rounds, and one a round for its gate and its FLOPs."""
    return max(first, 2) + (rounds - 1) * LATER_STEPS + rounds


def estimate_own(
    make_model: MakeModel, make_batch: MakeBatch, loss: Loss, *, steps: int, rounds: int,
    methods: int,
) -> float | None:  # fmt: skip
    """About how long the runs on a model of one's own take; None where that cannot be known before.

    The FLOPs of a step are counted on the meta device, where nothing is computed, so a model whose
    making or loss reads values has no estimate.
    """
    meta = torch.device("meta")
    try:
        with warnings.catch_warnings(action="ignore"), meta:
            model = make_model().requires_grad_(True)
        flops = count_flops(loss, model, moved(make_batch(0), meta))
    except Exception:  # whatever the model raises there; it says so itself where it runs
        return None
    return methods * (SECONDS * rounds + steps_of(steps, rounds) * flops / rate("float32"))


def run_all(options: Result) -> Report:
    """All runs of the job.

    Raises:
        ValueError: the untouched model gives no loss to compare with; says why.
    """
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
        base = untouched(replace(shared, method=METHODS["full"], steps=0, flops=False))
        report = mp.benchmark(
            shared.make_model, shared.make_batch,
            {name: METHODS[name] for name in options["methods"]}, loss=shared.loss,
            **shared.settings, learning_rate=shared.learning_rate, steps=shared.steps,
            rounds=options["rounds"], device=shared.device, threads=shared.threads,
            seed=shared.seed, after=shared.after,
        )  # fmt: skip
    check_counts(report.data["runs"])
    report.data |= {
        "job": "methods", "about": about(options), "commit": commit(), "options": options,
        "batches": {"train": train.digest(), "validation": validation.digest()},
        "seconds": time.perf_counter() - start, "base": base,
    }  # fmt: skip
    return report


def untouched(case: Case) -> Result:
    """The validation loss of the model before anything is added, in a process of its own."""
    display = Display({"base": {"title": "untouched model"}}, 1)

    def tell(kind: str, values: Result) -> None:
        display(kind, {"method": "base", "round": 0, **values})

    try:
        tell("start", {})
        base = in_a_process(case, tell, name="base")
        tell("end", {"result": base})
    finally:
        display.close()
    if base.pop("for_every_method", False):
        raise ValueError(base["failed"])
    return base


def case_of(options: Result, path: str) -> Case:
    """What every run of the job has in common; `path` has the batches."""
    sizes = None if options["sizes"] is None else LlamaSizes(**options["sizes"])
    dtype = getattr(torch, options["dtype"])
    model = MakeModel(sizes, dtype, options["seed"], options["checkpointing"], options["folder"])
    settings = {name: options[name] for name in ("rank", "alpha", "prefix_length")}
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
