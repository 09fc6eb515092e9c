"""Where a job's figures go: the two options of its command line, and the JSON."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.harness import save_result
from benchmarks.jobs import RESULTS


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add --output, a folder for the JSON, and --print-only, which writes none."""
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder for the JSON")
    parser.add_argument("--print-only", action="store_true", help="write no file of results")


def keep(arguments: argparse.Namespace, job: str, **content: Any) -> None:
    """Write the figures into the folder of `arguments`, unless they say --print-only."""
    if not arguments.print_only:
        save_result(arguments.output, job, **content)
