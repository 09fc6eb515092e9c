"""Every job, small, each in a process of its own that may take so long: `... all --quick`.

A job that fails or takes too long does not end the others.  The table at the end and the JSON tell
of each job its seconds (on the clock, and of all processors together), exit status and result.
What the jobs write goes into a temporary folder, so that no figure of a small run stands beside
those of whole ones.
"""

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.jobs import JOBS
from benchmarks.output import save_result

ROOT = Path(__file__).parent.parent
SECONDS = 300.0  # the limit of a job: machines are shared
TAIL = 2000  # characters of a failed job's output


def run_all(words: list[str]) -> int:
    """Run the jobs, print a line for each and the table, write the JSON; 1 if any failed."""
    given = parser().parse_args(words)
    runs = []
    for name in given.only:
        runs.append(run_one(name, given.timeout))
        print(line(runs[-1]), flush=True)
    show(runs)
    total = sum(run["seconds"] for run in runs)
    failed = [run["job"] for run in runs if run["exit"]]
    done = sum(run["exit"] is not None for run in runs)
    print(f"{done} jobs in {total / 60:.1f} minutes; failed: {', '.join(failed) or 'none'}")
    save_result(given.output, "all-quick", seconds=round(total, 1), timeout=given.timeout,
                failed=failed, runs=runs)  # fmt: skip
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    found.add_argument("--quick", action="store_true", required=True,
                       help="small runs; whole ones take hours: start them by name")  # fmt: skip
    found.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    found.add_argument("--timeout", type=float, default=SECONDS, help="seconds of one job")
    found.add_argument("--output", type=Path, default=ROOT / "build", help="a folder for the JSON")
    return found


def run_one(name: str, timeout: float) -> dict[str, Any]:
    """One small run: its seconds, its exit status (None: it was not started) and its result.

    The result of a job that succeeds is the last line of words or figures that it printed; of one
    that fails, why, with the end of what it printed as `output`.
    """
    job = JOBS[name]
    if job.quick is None:
        return {"job": name, "seconds": 0.0, "cpu_seconds": 0.0, "exit": None,
                "result": f"not run: needs {job.needs}"}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        words = [word.replace("FOLDER", folder) for word in job.quick]
        command = [sys.executable, "-m", "benchmarks", name, *words, "--output", folder]
        start, before = time.perf_counter(), processor_seconds()
        status, said = finished(command, timeout)
        seconds = round(time.perf_counter() - start, 1)
        busy = round(processor_seconds() - before, 1)
    found = {"job": name, "seconds": seconds, "cpu_seconds": busy,
             "exit": -signal.SIGKILL if status is None else status}  # fmt: skip
    if status == 0:
        lines = [text.strip(" │|") for text in said.splitlines() if any(map(str.isalnum, text))]
        told = [text for text in lines if not text.startswith("written:")]
        return {**found, "result": told[-1][:200] if told else ""}
    why = f"took more than {timeout:g} s" if status is None else f"exit status {status}"
    return {**found, "result": f"failed: {why}", "output": said[-TAIL:]}


def finished(command: list[str], timeout: float) -> tuple[int | None, str]:
    """Exit status and output of a command; None: it was killed after `timeout` seconds."""
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                   start_new_session=True, env=environment())  # fmt: skip
        status = None
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where this process is interrupted
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
                process.wait()
        out.seek(0)
        return status, out.read()


def processor_seconds() -> float:
    """What processes that have ended took of all cores; of a killed one, itself alone."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def environment() -> dict[str, str]:
    """The jobs' environment: nothing is fetched."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def line(run: dict[str, Any]) -> str:
    """What is printed of a job as it ends."""
    text = f"{run['job']}: {run['seconds']:.0f} s, {run['result']}"
    return f"{text}\n{run['output']}" if "output" in run else text


def show(runs: list[dict[str, Any]]) -> None:
    """The table of all."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("job", "seconds", "CPU s", "exit", "result")
    for run in runs:
        status = "-" if run["exit"] is None else str(run["exit"])
        table.add_row(run["job"], f"{run['seconds']:.0f}", f"{run['cpu_seconds']:.0f}", status,
                      Text(run["result"]))  # fmt: skip
    wide = Console()
    (wide if wide.width >= 120 else Console(width=120)).print(table)
