"""Every behaviour with a prefix on every architecture: `python -m benchmarks.prefix_matrix`.

Small random models of transformers' real classes.  Each cell is the largest difference between
numbers that ought to be equal (prefix_behaviours.py says which), "-" where the architecture has no
such behaviour.  Beside it PEFT's prefix tuning on the same model, where PEFT has the behaviour; an
error is named.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.output import save_result
from minipeft.adapters.progress import Progress
from tests.peers.peft_prefix import IN_PEFT
from tests.prefix_behaviours import BEHAVIOURS
from tests.prefix_families import FAMILIES

RESULTS = Path(__file__).parent / "results"
Cell = float | str | None


def measured(measure: Callable[[str], float | None], family: str) -> Cell:
    """The difference, or the name of the error."""
    try:
        return measure(family)
    except Exception as error:
        return type(error).__name__


def shown(cell: Cell) -> str:
    """For the table."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return "0" if cell == 0 else "inf" if cell == float("inf") else f"{cell:.0e}"


def table_of(title: str, found: dict[str, dict[str, Cell]], columns: list[str]) -> Table:
    """A row for each architecture."""
    table = Table("architecture", *columns, title=title)
    for family, row in found.items():
        table.add_row(family, *(shown(row.get(column)) for column in columns))
    return table


def main() -> int:
    """Print both tables and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--peft", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    ours: dict[str, dict[str, Cell]] = {}
    peft: dict[str, dict[str, Cell]] = {}
    for family in Progress(arguments.families, desc="architectures", leave=False):
        torch._dynamo.reset()
        ours[family] = {name: measured(m, family) for name, m in BEHAVIOURS.items()}
        if arguments.peft:
            peft[family] = {name: measured(m, family) for name, m in IN_PEFT.items()}
    console = Console(width=200)
    console.print(table_of("minipeft", ours, list(BEHAVIOURS)))
    if peft:
        console.print(table_of("PEFT", peft, list(IN_PEFT)))
    numbers = [v for row in ours.values() for n, v in row.items()
               if isinstance(v, float) and n != "bf16, fp16"]  # fmt: skip
    print(f"{len(numbers)} cells in float32, the largest {max(numbers):.1e}")
    save_result(arguments.output, "prefix_matrix", minipeft=ours, peft=peft)
    return 0


if __name__ == "__main__":
    sys.exit(main())
