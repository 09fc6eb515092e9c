"""What the papers claim, measured on this machine: `python -m benchmarks claims`.

Every method of the library on two tasks, each with its own learning rate, chosen on validation
data, and three seeds; then a table of claims, each with a rule that was written before the run.
Every run is kept in the state file when it ends, so the job can be stopped and started again.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import claims_chat, claims_ner, claims_types
from benchmarks.claims_arms import ARMS, PARTS
from benchmarks.claims_queue import run_all

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, Any] = {
    "types": claims_types.Sizes(), "ner": claims_ner.Sizes(), "chat": claims_chat.Sizes()
}  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks claims", description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=240, help="no run starts after them")
    parser.add_argument("--state", type=Path, default=Path("claims_state.jsonl"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done."""
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arms = [arm for part in options.parts for arm in ARMS if arm.part == part]
    sizes = {task: size._asdict() for task, size in SIZES.items()}
    _, failed = run_all(
        arms, sizes, options.state, workers=options.workers, minutes=options.minutes
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
