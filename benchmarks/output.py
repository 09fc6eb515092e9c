"""Where a job's figures go: the two options of its command line, and the JSON."""

import argparse
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.jobs import RESULTS
from minipeft.measure.machine import hardware, versions

WIDTH = 120  # of a line of JSON


def commit() -> str | None:
    """The commit of the code, with '+changes' where the tree differs from it."""
    root = Path(__file__).parent.parent
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def levels(value: Any) -> int:
    """How deep lists and objects lie in each other: 0 for a number, 1 for a list of numbers."""
    inside = value.values() if isinstance(value, dict) else value
    return 1 + max(map(levels, inside), default=0) if isinstance(value, dict | list) else 0


def text_of(value: Any, depth: int = 0) -> str:
    """JSON with a line for each list of numbers and for each case, an object of at most two levels.

    >>> print(text_of({"cases": [{"seconds": [1.5, 1.25]}, {"seconds": [2.5]}]}))
    {"cases": [{"seconds": [1.5, 1.25]}, {"seconds": [2.5]}]}
    """
    line = json.dumps(value)
    if depth + len(line) <= WIDTH or levels(value) <= (2 if isinstance(value, dict) else 1):
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {text_of(v, depth + 1)}" for key, v in value.items()]
    else:
        parts = [text_of(v, depth + 1) for v in value]
    pad, (first, last) = " " * depth, "{}" if isinstance(value, dict) else "[]"
    return f"{first}\n" + ",\n".join(f"{pad} {text}" for text in parts) + f"\n{pad}{last}"


def save_result(folder: Path, job: str, **content: Any) -> Path:
    """Write a job's figures with when, where and on which code they were measured; says so."""
    now = datetime.now(UTC)
    result = {
        "job": job, "when": now.isoformat(timespec="seconds"), "commit": commit(),
        "hardware": hardware(), "versions": versions(), **content,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{job}-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(text_of(result) + "\n")
    print(f"written: {path.name} in {path.parent.name}/")
    return path


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add --output, a folder for the JSON, and --print-only, which writes none."""
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder for the JSON")
    parser.add_argument("--print-only", action="store_true", help="write no file of results")


def keep(arguments: argparse.Namespace, job: str, **content: Any) -> None:
    """Write the figures into the folder of `arguments`, unless they say --print-only."""
    if not arguments.print_only:
        save_result(arguments.output, job, **content)
