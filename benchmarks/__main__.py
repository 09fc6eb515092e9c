"""One door to all jobs.

python -m benchmarks                 the jobs: what each one asks, minutes, last result
python -m benchmarks NAME ...        one job; NAME --help says what it can be told
python -m benchmarks all --quick     every job, small; --only NAMES takes some
python -m benchmarks markdown        the jobs, as the table of benchmarks/README.md
python -m benchmarks report FILE     table and plot of a result of `methods`
"""

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.jobs import GROUPS, JOBS, last_result, markdown


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
    if name == "markdown":
        print(markdown(), end="")
        return 0
    if name == "all":
        from benchmarks.quick import run_all

        return run_all(rest)
    if name == "report":
        return show_report(rest)
    print(f"benchmarks: no job {name!r}; python -m benchmarks shows them all", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
