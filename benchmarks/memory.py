"""Predicted memory beside measured, and which LLaMA fits where: `python -m benchmarks memory`.

Each case is a process of its own (memory_worker.py).  glibc keeps small blocks in a heap that only
shrinks from its end: there a freed activation stays with the process.  With
MALLOC_MMAP_THRESHOLD_=65536 every block from 64 KiB on goes back when it is freed, so figures say
what the step needs.  `--allocator both` measures both ways.

The buffer into which a CPU decodes parts of 4-bit weights is made once in a process and stays.  So
it is in the peak of anonymous memory, and not in what tensors grow by in a step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import minipeft as mp
from benchmarks.memory_cases import METHODS, MODELS, Case
from benchmarks.output import save_result
from minipeft.measure.machine import allocator_environment

ROOT = Path(__file__).parent.parent
SETTING = allocator_environment()
TOLERANCES = {"held": 0.05, "peak_tensors": 0.05, "peak_anonymous": 0.10}
SIZES = ("llama-7b", "llama-13b", "llama-30b", "llama-65b")
CARDS = (24, 48, 80)  # GB


def add_options(job: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks memory`."""
    job.add_argument("--models", nargs="+", choices=["smollm2", "llama-7b-layer", "tiny"],
                     default=["smollm2", "llama-7b-layer"])  # fmt: skip
    job.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    job.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    job.add_argument("--allocator", choices=["setting", "default", "both"], default="setting",
                     help="setting: MALLOC_MMAP_THRESHOLD_=65536; default: glibc")  # fmt: skip
    job.add_argument("--table-only", action="store_true", help="measure nothing")
    job.add_argument("--table", action=argparse.BooleanOptionalAction, default=True,
                     help="of 7B to 65B")  # fmt: skip
    job.add_argument("--batch", type=int, default=1, help="of the table")
    job.add_argument("--length", type=int, default=512, help="of the table")
    job.add_argument("--rank", type=int, default=16, help="of the table")
    job.add_argument("--output", type=Path, default=Path(__file__).parent / "results")


def measured(case: Case, setting: dict[str, str]) -> dict[str, int]:
    """One case in a process of its own.

    Raises:
        ValueError: the process failed; with the end of what it said.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | setting
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.json"
        file.write_text(json.dumps(vars(case)))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory_worker", str(file)],
            capture_output=True, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    if not lines:
        raise ValueError(f"{case}: the process failed: {done.stderr.strip()[-600:]}")
    found: dict[str, int] = json.loads(lines[-1].removeprefix("result "))
    return found


def predicted(case: Case) -> Any:
    """The prediction of the same step, from a model on the meta device."""
    dtype = getattr(torch, case.dtype)
    model = MODELS[case.model].empty(dtype)
    return mp.predict_memory(
        model, case.method, batch=case.batch, length=case.length, rank=16, prefix_length=16,
        checkpointing=case.checkpointing,
    )  # fmt: skip


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case, predicted and measured; prints a line for each."""
    both = {"setting": SETTING, "default": {}}
    chosen = list(both) if arguments.allocator == "both" else [arguments.allocator]
    rows: list[dict[str, Any]] = []
    print(f"{'MB (1e6 bytes): predicted / measured':52} {'held':>16} {'peak of tensors':>18} "
          f"{'peak anonymous':>18}")  # fmt: skip
    for model in arguments.models:
        for method in arguments.methods:
            for checkpointing in (False, True):
                sizes = MODELS[model]
                case = Case(
                    model, method, checkpointing, sizes.batch, sizes.length, arguments.dtype
                )
                prediction = predicted(case)
                for allocator in chosen:
                    figures = measured(case, both[allocator])
                    guess = {
                        "held": prediction.held,
                        "peak_tensors": prediction.peak - prediction.kernels,
                        "peak_anonymous": prediction.peak,
                    }  # fmt: skip
                    errors = {name: guess[name] / figures[name] - 1 for name in guess}
                    rows.append({
                        "case": vars(case), "allocator": allocator, "measured": figures,
                        "predicted": _fields(prediction), "errors": errors,
                    })  # fmt: skip
                    cells = [
                        f"{guess[n] / 1e6:.0f} / {figures[n] / 1e6:.0f} {errors[n]:+.1%}"
                        for n in guess
                    ]
                    name = f"{case}" + (" (glibc's default)" if allocator == "default" else "")
                    print(f"{name:52} {cells[0]:>16} {cells[1]:>18} {cells[2]:>18}", flush=True)
    if "setting" in chosen:
        print(f"measured with {' '.join(f'{n}={value}' for n, value in SETTING.items())}: glibc "
              "gives blocks from 64 KiB on back when they are freed")  # fmt: skip
    return rows


def _fields(prediction: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(prediction).items() if k != "notes"} | {"held": prediction.held}


def table(batch: int, length: int, rank: int) -> list[dict[str, Any]]:
    """What each LLaMA needs on a GPU in bfloat16, and on which cards that fits; printed."""
    rows = []
    print(f"\nLLaMA in bfloat16, {batch} x {length} tokens a device, rank {rank}, AdamW, "
          "checkpointing; GB (1e9 bytes)")  # fmt: skip
    print(f"{'':32}{'weights':>9}{'trained':>9}{'kept':>7}{'logits':>8}{'peak':>8}  fits")
    for name in SIZES:
        for method, world_size, sharding in (
            ("qlora", 1, None), ("qlora", 2, "fsdp2"), ("lora", 1, None), ("lora", 8, "fsdp2"),
            ("full", 1, None), ("full", 8, "fsdp2"),
        ):  # fmt: skip
            p = mp.predict_memory(
                name, method, batch=batch, length=length, rank=rank, checkpointing=True,
                device="cuda", world_size=world_size, sharding=sharding,
            )  # fmt: skip
            fits = {f"{card} GB": str(p.fits(card)) for card in CARDS}
            rows.append({"model": name, "predicted": _fields(p), "fits": fits})
            weights = p.dense + p.codes + p.scales
            trained = p.adapters + p.gradients + p.moments
            cells = (weights, trained, p.activations, p.logits_and_loss, p.peak)
            numbers = "".join(
                f"{size / 1e9:>{width}.2f}"
                for size, width in zip(cells, (9, 9, 7, 8, 8), strict=True)
            )
            where = ", ".join(f"{card}" for card in CARDS if p.fits(card)) or "none of the three"
            devices = f" on {world_size} (FSDP2)" if sharding else ""
            print(f"{name + ' ' + method + devices:32}{numbers}  {where}", flush=True)
    return rows


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; the exit status is 1 if a prediction is off by more than it may be."""
    rows = [] if arguments.table_only else compare(arguments)
    presets = table(arguments.batch, arguments.length, arguments.rank) if arguments.table else []
    save_result(
        arguments.output, "memory", setting=SETTING, tolerances=TOLERANCES, cases=rows,
        presets=presets,
    )  # fmt: skip
    off = [
        (row["case"], name) for row in rows if row["allocator"] == "setting"
        for name, most in TOLERANCES.items()
        # a tiny model's blocks are below 64 KiB, and lie where the warm-up's were
        if abs(row["errors"][name]) > most
        and (name != "peak_anonymous" or row["case"]["model"] != "tiny")
    ]  # fmt: skip
    for case, name in off:
        print(f"off by more than {TOLERANCES[name]:.0%}: {name} of {Case(**case)}")
    return int(bool(off))


def main() -> int:
    """The memory job; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    add_options(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
