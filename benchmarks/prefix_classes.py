"""Which transformers classes take a prefix, told by trying: `python -m benchmarks.prefix_classes`.

Every class of transformers' mappings of causal, masked and sequence-to-sequence language models
that can be made small, and classes of images and sounds (tests/prefix_audit.py says what is
compared).  "right" and "refused" are both true answers; "silent", "late" and "bare" are faults.
Of a class that cannot be made small the table says why.
"""

import argparse
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import transformers

from benchmarks.output import save_result
from minipeft.adapters.progress import Progress
from tests.prefix_audit import FAULTS, NOT_SMALL, Finding, audit, classes


class TooSlow(BaseException):
    """No Exception: what is asked must not catch it."""


def main() -> int:
    """Print a line for each class and the counts; 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("only", nargs="*", help="names of model classes; all unless given")
    parser.add_argument("--seconds", type=int, default=60, help="for each class")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    kinds = [k for k in classes() if not arguments.only or k.model in arguments.only]
    rows: list[dict[str, Any]] = []
    for kind in Progress(kinds, desc="classes"):
        signal.alarm(arguments.seconds)
        try:
            found = audit(kind)
        except TooSlow:
            found = Finding(NOT_SMALL, f"took longer than {arguments.seconds} s", {})
        finally:
            signal.alarm(0)
        rows.append({"model": kind.model, **found._asdict()})
        figures = ", ".join(f"{name} {value:.1e}" for name, value in found.figures.items() if value)
        Progress.write(
            f"{kind.model:44} {found.outcome:14} {found.why[:150] or figures}", file=sys.stdout
        )
    counts = Counter(row["outcome"] for row in rows)
    print(dict(counts))
    if not arguments.only:
        save_result(arguments.output, "prefix_classes", rows=rows, counts=counts)
    return int(any(counts[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
