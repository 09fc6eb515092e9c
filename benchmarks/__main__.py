"""One door to all jobs.

python -m benchmarks                 the jobs: what each one asks, minutes, last result
python -m benchmarks NAME ...        one job; NAME --help says what it can be told
python -m benchmarks all --quick     every job, small; --only NAMES takes some
python -m benchmarks report FILE     table and plot of a result of `methods`
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import save_result
from benchmarks.jobs import GROUPS, JOBS, last_result

ROOT = Path(__file__).parent.parent


def show_jobs() -> None:
    """The table of jobs, in groups."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "job", "what it asks", "minutes", "last result", title="python -m benchmarks NAME"
    )
    for group in GROUPS:
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]")
        for name, job in JOBS.items():
            if job.group == group:
                table.add_row(name, job.question, f"{job.minutes:g}", last_result(name))
    wide = Console()
    (wide if wide.width >= 120 else Console(width=120)).print(table)


def run_job(name: str, words: list[str]) -> int:
    """One job in this process; its exit status."""
    sys.argv = [f"python -m benchmarks {name}", *words]
    return int(importlib.import_module(f"benchmarks.{JOBS[name].module}").main() or 0)


def run_all(words: list[str]) -> int:
    """Every job in a process of its own, small; a line for each, and JSON of times and statuses."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks all")
    parser.add_argument("--quick", action="store_true", required=True,
                        help="small runs; whole ones take hours: start them by name")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--output", type=Path, default=None, help="a folder for the JSON")
    given = parser.parse_args(words)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            if (quick := JOBS[name].quick) is None:
                print(f"{name}: not in a quick run", flush=True)
                continue
            command = [sys.executable, "-m", "benchmarks", name, *quick]
            if takes_output(name):
                command += ["--output", folder]
            start = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                                  env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
            seconds = time.perf_counter() - start
            runs.append({"name": name, "seconds": round(seconds, 1), "status": done.returncode})
            print(
                f"{name}: {seconds:.0f} s"
                + (
                    f", exit status {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}"
                    if done.returncode
                    else ""
                ),
                flush=True,
            )
    total = sum(run["seconds"] for run in runs)
    failed = [run["name"] for run in runs if run["status"]]
    print(f"{len(runs)} jobs in {total / 60:.1f} minutes; failed: {failed or 'none'}")
    if given.output:
        save_result(given.output, "all-quick", seconds=total, runs=runs)
    return 1 if failed else 0


def takes_output(name: str) -> bool:
    """Whether a job has --output for a folder of results."""
    text = (Path(__file__).parent / f"{JOBS[name].module}.py").read_text()
    return '"--output"' in text and name != "families"


def show_report(words: list[str]) -> int:
    """Table and plot of a result file."""
    from benchmarks import report

    parser = argparse.ArgumentParser(prog="python -m benchmarks report")
    parser.add_argument("file", type=Path)
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args(words)
    try:
        found = report.load(given.file)
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if given.markdown:
        print(found.markdown())
        return 0
    found.show()
    found.plot(given.file.with_suffix(".png"))
    return 0


def main() -> int:
    """Parse the first word and run what it names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__ if words else "", end="")
        show_jobs()
        return 0
    name, rest = words[0], words[1:]
    if name in JOBS:
        return run_job(name, rest)
    if name in ("all", "report"):
        return (run_all if name == "all" else show_report)(rest)
    print(f"benchmarks: no job {name!r}; python -m benchmarks shows them all", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
