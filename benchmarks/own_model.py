"""A GPT of one's own by mp.benchmark beside the methods job, for the same work.

examples/12_benchmark_own_model.py writes LLaMA's architecture in plain PyTorch.  It is measured
through three doors: one call of mp.benchmark; the methods job with --model FILE:make_model; and the
same job on transformers' LLaMA of the same sizes, with random tokens of the same shape.
FLOPs must be equal, and the peaks of memory within 5 % of each other; the exit status says so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import minipeft as mp
from benchmarks.compare import from_file, module_of, positive
from benchmarks.models import require
from benchmarks.output import save_result
from minipeft.measure.report import Report, megabytes

ROOT = Path(__file__).parent.parent
FILE = ROOT / "examples" / "12_benchmark_own_model.py"
DOORS = ("mp.benchmark", "methods, its file", "methods, transformers")
MOST = 0.05  # of a peak: by how much it may differ from mp.benchmark's


def job(words: list[str], methods: list[str], rank: int, threads: int) -> Report:
    """The report of the methods job, run as from a shell.

    Raises:
        ValueError: it gave no result; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", "methods", *words, "--methods", *methods,
             "--rank", str(rank), "--steps", "3", "--rounds", "1", "--threads", str(threads),
             "--output", folder],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        files = list(Path(folder).glob("*.json"))
        if not files:
            raise ValueError(f"the methods job: {(done.stdout + done.stderr).strip()[-600:]}")
        return Report(json.loads(files[0].read_text()))


def measured(methods: list[str], rank: int, threads: int) -> dict[str, Report]:
    """A report for each door."""
    own: Any = module_of(str(FILE))
    model, batch, loss = from_file(f"{FILE}:make_model")
    sizes = {
        "hidden": own.WIDTH, "intermediate": own.INNER, "layers": own.LAYERS, "heads": own.HEADS,
        "kv-heads": own.HEADS, "vocabulary": own.VOCABULARY, "batch": own.BATCH,
        "length": own.LENGTH,
    }  # fmt: skip
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    return {
        DOORS[0]: mp.benchmark(
            model, batch, methods, loss=loss, head="head", rank=rank, alpha=2 * rank, steps=3,
            rounds=1, threads=threads,
        ),
        DOORS[1]: job(
            ["--model", f"{FILE}:make_model", "--head", "head"], methods, rank, threads
        ),
        DOORS[2]: job(["--model", "llama", "--dtype", "fp32", *words], methods, rank, threads),
    }  # fmt: skip


def rows_of(reports: dict[str, Report], methods: list[str]) -> list[dict[str, Any]]:
    """FLOPs and peaks of each method through each door, and each peak / mp.benchmark's.

    Raises:
        ValueError: a method gave no figures; says why.
    """
    rows: list[dict[str, Any]] = []
    for method in methods:
        for door, report in reports.items():
            if why := report.why_not(method):
                raise ValueError(f"{door}, {method}: {why}")
            rows.append({
                "method": method, "door": door, "flops": report.runs(method)[0]["flops"],
                "peak_bytes": report.peak(method),
                "step_peak_bytes": report.peak(method, "step_peak_bytes"),
            })  # fmt: skip
            first = next(row for row in rows if row["method"] == method)
            for name in ("peak_bytes", "step_peak_bytes"):
                rows[-1][f"{name} / mp.benchmark"] = rows[-1][name] / first[name]
    return rows


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """Where FLOPs are not equal, or a peak is off by more than it may be."""
    found = []
    for row in rows:
        first = next(other for other in rows if other["method"] == row["method"])
        where = f"{row['method']}, {row['door']}"
        if row["flops"] != first["flops"]:
            found.append(f"{where}: {row['flops']:,} FLOPs, mp.benchmark counts {first['flops']:,}")
        if abs(row["peak_bytes / mp.benchmark"] - 1) > MOST:
            found.append(f"{where}: {row['peak_bytes / mp.benchmark']:.3f} of mp.benchmark's peak")
    return found


def main() -> int:
    """Measure, print, write; the exit status is 1 where the doors disagree."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks own_model", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=["full", "lora", "qlora"],
                        default=["full", "lora", "qlora"])  # fmt: skip
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    try:
        require("transformers", "hf")
        rows = rows_of(measured(given.methods, given.rank, given.threads), given.methods)
    except (ImportError, ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    print(f"{'method':8}{'door':24}{'FLOPs':>16}{'peak MB':>10}{'step MB':>10}{'peak / first':>14}")
    for row in rows:
        print(
            f"{row['method']:8}{row['door']:24}{row['flops']:>16,}{megabytes(row['peak_bytes']):>10}"
            f"{megabytes(row['step_peak_bytes']):>10}{row['peak_bytes / mp.benchmark']:>14.3f}"
        )
    found = differences(rows)
    print(*found, sep="\n", end="\n" if found else "")
    save_result(given.output, "own_model", options={"rank": given.rank, "threads": given.threads},
                most=MOST, rows=rows, differences=found)  # fmt: skip
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
