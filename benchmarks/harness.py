"""Runs in rounds: every method once, then every method again, one process at a time.

The first round trains and validates; later rounds only time a few steps.  Drift of a shared
machine thus hits all methods alike, and a ratio is taken within a round.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import Batches, chat_batches, random_batches
from benchmarks.methods import METHODS
from benchmarks.models import LlamaSizes, load_tokenizer, require, training_dtype

Result = dict[str, Any]
TIMED_STEPS = 3  # of the later rounds; the first is not counted
PARAMETERS = 134.5e6  # of SmolLM2-135M, for the estimate


# each limits one library to less than the processor has
LIMITS = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
)  # fmt: skip


def hardware() -> dict[str, Any]:
    """What the figures depend on: processor and its level, cores, memory, accelerator.

    `cpu_capability` is what ATen uses; `cpu_amx` whether there are AMX tiles, which oneDNN uses for
    bfloat16; `cpu_limits` the variables that keep libraries from using what there is.
    """
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    found: dict[str, Any] = {"processor": name, "cores": os.cpu_count()}
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    found["cpu_amx"] = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    found["cpu_limits"] = {name: os.environ[name] for name in LIMITS if os.environ.get(name)}
    try:
        import psutil

        found["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    except ImportError:
        pass
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str | None]:
    """Versions of everything whose version can change a figure."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("minipeft", "torch", "transformers", "peft", "bitsandbytes", "numpy", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


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
    return chat_batches(load_tokenizer(), **rows)


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


def run_worker(config: Result, on_progress: Callable[[Result], None], folder: Path) -> Result:
    """Run one configuration in a process of its own and return its result."""
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    root = Path(__file__).parent.parent
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with (folder / "errors.txt").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(path)],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=root,
        )  # fmt: skip
        result: Result | None = None
        assert process.stdout is not None  # a pipe was asked for
        try:
            for line in process.stdout:
                kind, _, body = line.partition(" ")
                if kind == "progress":
                    on_progress(json.loads(body))
                elif kind == "result":
                    result = json.loads(body)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
            process.wait()
        if result is None:
            errors.seek(0)
            tail = errors.read().strip().splitlines()[-3:]
            reason = "killed (out of memory?)" if process.returncode == -9 else " | ".join(tail)
            result = {"failed": f"exit status {process.returncode}: {reason}"}
    return result


def run_all(options: Result, on_progress: Callable[[str, Result], None]) -> Result:
    """All runs of the job; the report's input, as it goes into results/*.json."""
    require("safetensors", "hf")
    from safetensors.torch import save_file

    start = time.perf_counter()
    train, validation = make_batches(options)
    runs: list[Result] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = {f"train.{k}": v.contiguous() for k, v in train._asdict().items()}
        tensors |= {f"validation.{k}": v.contiguous() for k, v in validation._asdict().items()}
        save_file(tensors, folder / "batches.safetensors")
        shared = {**options, "batches": str(folder / "batches.safetensors")}

        def work(method: str, number: int) -> Result:
            steps = options["steps"] if number == 0 else TIMED_STEPS
            config = {**shared, "method": method, "steps": steps, "validate": number == 0}
            on_progress("start", {"method": method, "round": number})
            result = run_worker(config, lambda event: on_progress("step", event), folder)
            on_progress("end", {"method": method, "round": number, "result": result})
            return {"method": method, "round": number, **result}

        base = work("base", 0)
        stopped = set()
        for number in range(options["rounds"]):
            for method in options["methods"]:
                if method not in stopped:
                    runs.append(work(method, number))
                    if "step_seconds" not in runs[-1]:
                        stopped.add(method)
    check_counts(runs)
    return {
        "job": "methods",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "options": options,
        "batches": {"train": train.digest(), "validation": validation.digest()},
        "seconds": time.perf_counter() - start,
        "base": base,
        "runs": runs,
    }


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
    sizes = None
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
