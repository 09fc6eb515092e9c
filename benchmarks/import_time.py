"""What `import minipeft` costs beside `import torch`: `python -m benchmarks.import_time`.

Fresh processes in turn, so that a busy machine slows both; the median of each and the spread.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.output import add_output, keep

SCRIPT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def seconds(name: str) -> float:
    """The time that a fresh process takes to import `name`."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", SCRIPT.format(name)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    return float(done.stdout)


def main() -> int:
    """Print both times and their ratio, and write the raw times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    add_output(parser)
    arguments = parser.parse_args()
    pairs = [(seconds("torch"), seconds("minipeft")) for _ in range(arguments.rounds)]
    torch_alone, ours = zip(*pairs, strict=True)
    ratios = [b / a for a, b in pairs]
    print(f"import torch {median(torch_alone):.2f} s, import minipeft {median(ours):.2f} s")
    print(f"ratio {median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    keep(arguments, "import_time", rounds=arguments.rounds, ratio=median(ratios),
         seconds={"torch": torch_alone, "minipeft": ours})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
