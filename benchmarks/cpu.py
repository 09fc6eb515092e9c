"""4-bit weights on a CPU beside bitsandbytes and dense ones: `python -m benchmarks.cpu`.

    bits       decoded weights and codes against the plain functions, which must be equal
    decode     over a copy of the result, over bitsandbytes, and PyTorch's row over numba's
    quantize   over bitsandbytes, scales included
    product    11008 x 4096, over the dense float32 F.linear, forward and input gradient
    layer      LLaMA-7B's, forward and backward: QLoRA over PEFT + bitsandbytes and PEFT's LoRA
    step       SmolLM2's step with few tokens, over PEFT + bitsandbytes
    shared     x A^T of layers with one input in one product, over one for each
    half       a frozen 16-bit linear layer below LoRA, over torch's path (AVX2: --level avx2)
    overhead   a layer's call around an empty kernel, in calls of nn.Linear(64, 64)
    first      seconds of the first use with an empty and with a full cache

Each part runs in a process of its own, once for each number of threads.  Both sides of a ratio take
turns, and a ratio is taken within a turn.  `--level avx2` limits ATen, oneDNN, MKL and numba to
AVX2 by their environment variables; bitsandbytes has none, and uses what the CPU has.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.output import save_result
from minipeft.measure.report import WIDTH

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "bits": "cpu_products", "decode": "cpu_products", "quantize": "cpu_products",
    "product": "cpu_products", "layer": "cpu_layers", "step": "cpu_layers",
    "half": "cpu_layers", "shared": "cpu_layers", "overhead": "cpu_layers", "first": "cpu_layers",
}  # fmt: skip
LEVELS = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2", "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "",
    },
}  # fmt: skip
Line = dict[str, Any]  # what, over, and a ratio for each turn


def line(what: str, over: str, ratios: list[float]) -> Line:
    """A line of the table."""
    return {"what": what, "over": over, "ratios": [round(ratio, 4) for ratio in ratios]}


def in_a_process(part: str, threads: int, level: str, rounds: int) -> list[Line]:
    """The lines of one part."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu", "--parts", part, "--threads", str(threads),
         "--rounds", str(rounds), "--inside"],
        stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), **LEVELS[level],
             "PYTHONWARNINGS": "ignore::FutureWarning"},
    )  # fmt: skip
    lines: list[Line] = json.loads(done.stdout.splitlines()[-1])
    return lines


def inside(part: str, threads: int, rounds: int) -> None:
    """Measure one part here, and print its lines."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(json.dumps(getattr(import_module(f"benchmarks.{PARTS[part]}"), part)(rounds)))


def shown(lines: list[Line], title: str) -> None:
    """The table of one part."""
    table = Table("what", "over", "median", "least", "most", title=title, title_justify="left")
    for row in lines:
        ratios = row["ratios"]
        figures = (statistics.median(ratios), min(ratios), max(ratios))
        table.add_row(row["what"], row["over"], *(f"{figure:.3g}" for figure in figures))
    wide = Console()
    (wide if wide.width >= WIDTH else Console(width=WIDTH)).print(table)


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--level", choices=list(LEVELS), default="native")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--output", type=Path, default=None, help="a folder for the JSON")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        inside(given.parts[0], given.threads[0], given.rounds)
        return 0
    limits = " ".join(f"{name}={value}" for name, value in LEVELS[given.level].items())
    print(f"level {given.level}" + (f": {limits}" if limits else ""))
    found: list[dict[str, Any]] = []
    for part in given.parts:
        for threads in given.threads:
            lines = in_a_process(part, threads, given.level, given.rounds)
            shown(lines, f"{part}, threads: {threads}, level: {given.level}")
            found.append({"part": part, "threads": threads, "lines": lines})
            if part in ("bits", "first"):
                break  # once
    if given.output is not None:
        save_result(given.output, "cpu", level=given.level, limits=LEVELS[given.level], parts=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
