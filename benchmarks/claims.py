"""What the papers claim, measured on this machine: `python -m benchmarks claims`.

Every method of the library on two tasks, each with its own learning rate, chosen on validation
data, and three seeds; then a table of claims, judged by the rules of claims_rules.py.  Every run is
kept in the state file when it ends, so the job can be stopped and started again.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import claims_chat, claims_ner, claims_types
from benchmarks.claims_arms import ARMS, BY_NAME, PARTS
from benchmarks.claims_page import tally, verdicts, write
from benchmarks.claims_queue import Done, run_all
from benchmarks.output import save_result

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, Any] = {
    "types": claims_types.Sizes(), "ner": claims_ner.Sizes(), "chat": claims_chat.Sizes()
}  # fmt: skip
QUICK = {**SIZES, "ner": claims_ner.Sizes(train=16, valid=8, test=8, epochs=1)}
QUICK_ARMS = ("ner: full", "ner: LoRA")
# of one run on one thread of a machine with AVX-512 that is also busy otherwise
SECONDS = {"types": 12, "ner": 30, "chat": 60}
RUNS = {"types": 3, "ner": 5.5, "chat": 5.5}  # of one arm: rates, perhaps one more, two seeds


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks claims", description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="two methods, sixteen sentences")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=240, help="no run starts after them")
    parser.add_argument("--state", type=Path, default=None,
                        help="a file of finished runs, with which a stopped job goes on; "
                        "default: none is kept")  # fmt: skip
    parser.add_argument("--page", action="store_true",
                        help="train nothing: docs/claims.md from the newest result")  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.minutes < 0:
        parser.error("--workers must be at least 1, --minutes at least 0")
    return options


def write_page(folder: Path) -> int:
    """The page of the newest result; exit status 2 if there is none."""
    found = sorted(folder.glob("claims-2*.json"))
    if not found:
        print(f"claims: no claims-*.json in {folder.name}/; run the job first", file=sys.stderr)
        return 2
    write(json.loads(found[-1].read_text()), found[-1].name)
    print(f"written: docs/claims.md, from {found[-1].name}")
    return 0


def save(done: Done, sizes: dict[str, Any], folder: Path) -> None:
    """Print the verdicts and write the result: each run without what is the same for all."""
    runs = [{k: v for k, v in run.items() if k != "sizes"} for run in done.values()]
    told = verdicts(done)
    shown = Table("claim", "task", "measured", "verdict")
    for row in told:
        shown.add_row(row["claim"], row["task"], row["measured"], row["verdict"])
    Console(width=140).print(shown)
    print(tally([row["verdict"] for row in told]))
    save_result(folder, "claims", sizes=sizes, runs=runs, claims=told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done, print the verdicts and write the result; 1 if an arm raised."""
    options = parse(arguments)
    if options.page:
        return write_page(options.output)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arms = [arm for part in options.parts for arm in ARMS if arm.part == part]
    if options.quick:
        arms = [BY_NAME[name] for name in QUICK_ARMS]
    chosen = QUICK if options.quick else SIZES
    sizes = {task: size._asdict() for task, size in chosen.items()}
    if not options.quick:
        seconds = sum(SECONDS[arm.task] * RUNS[arm.task] for arm in arms) / options.workers
        print(f"{len(arms)} arms, about {seconds / 60:.0f} minutes if nothing is done yet")
    with tempfile.TemporaryDirectory() as folder:
        state = options.state or Path(folder) / "state.jsonl"
        done, failed = run_all(
            arms, sizes, state, workers=options.workers, minutes=options.minutes
        )  # fmt: skip
    save(done, sizes, options.output)
    for name, error in failed.items():
        print(f"{name} was given up: {error}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
