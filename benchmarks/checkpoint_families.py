"""4-bit checkpoints of many families, each direction: `python -m benchmarks.checkpoint_families`.

Small random models of transformers' real classes.  A cell is the largest difference of logits from
a reference that decodes the same codes by itself (tests/checkpoint_trips.py); every tensor is
compared in every bit before that.  An error is named.  The exit status is 1 if minipeft refuses a
file that minipeft wrote.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.output import save_result
from minipeft.adapters.progress import Progress
from tests.checkpoint_families import FAMILIES
from tests.checkpoint_trips import OWN, TRIPS, measured

RESULTS = Path(__file__).parent / "results"


def shown(cell: float | str) -> str:
    """For the table."""
    if isinstance(cell, str):
        return cell.partition(":")[0]
    return "0" if cell == 0 else f"{cell:.0e}"


def main() -> int:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, dict[str, float | str]] = {}
    for family in Progress(arguments.families, desc="families", leave=False):
        with tempfile.TemporaryDirectory() as folder:
            found[family] = measured(family, Path(folder))
    table = Table("family", *TRIPS)
    for family, row in found.items():
        table.add_row(family, *map(shown, row.values()))
    equal = {trip: sum(row[trip] == 0 for row in found.values()) for trip in TRIPS}
    table.add_section()
    table.add_row("equal in every bit", *(f"{equal[t]} of {len(found)}" for t in TRIPS))
    console = Console(width=160)
    console.print(table)
    for family, row in found.items():
        for trip, cell in row.items():
            if isinstance(cell, str):
                console.print(f"{family}, {trip}: {cell[:300]}", markup=False)
    refused = [f for f, row in found.items() if any(isinstance(row[trip], str) for trip in OWN)]
    print(f"families whose own files minipeft refuses: {len(refused)} {refused}")
    save_result(arguments.output, "checkpoint_families", families=found, equal=equal)
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
