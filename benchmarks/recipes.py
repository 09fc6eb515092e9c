"""Every recipe in a process of its own: `python -m benchmarks.recipes`.

Prints seconds and what the recipe prints; a run of all recipes writes the table into
examples/recipes/README.md too, unless --print-only is given.  The exit status is 1 where a recipe
fails, or where its loss does not fall.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.output import add_output, keep

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "recipes"
SHARED = {"common.py", "glm.py"}
LOSSES = re.compile(r"(\d+\.\d+) -> (\d+\.\d+)")
PAGE = """# Recipes

One file for each system, on small random weights of the true architecture and real conversations:
its template and loss mask, its targets, rank, alpha and rates, its special steps. Run one from the
project's folder, for example `python examples/recipes/vicuna.py`. `lr=` is the authors' rate;
`faster=` multiplies it, so that some steps of a tiny model show a falling loss.
[common.py](common.py) holds the templates, the masks and the training loop, [glm.py](glm.py) the
architecture of ChatGLM-6B.

Written by `python -m benchmarks.recipes`; seconds on two cores, imports included.

| recipe | seconds | loss before > after, for each of its trainings |
|---|---:|---|
{rows}
"""


def run(path: Path) -> tuple[float, str]:
    """Seconds, and what the recipe printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{path.name}: {done.stderr}")
    return time.perf_counter() - start, done.stdout


def main() -> int:
    """Run all or those that are named, print, write the JSON and the page."""
    paths = {p.stem: p for p in sorted(FOLDER.glob("*.py")) if p.name not in SHARED}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--names", nargs="+", choices=list(paths), help="default: all")
    add_output(parser)
    arguments = parser.parse_args()
    rows, rising, figures = [], [], {}
    for name in arguments.names or paths:
        path = paths[name]
        seconds, text = run(path)
        losses = LOSSES.findall(text)
        if not losses or any(float(after) >= float(before) for before, after in losses):
            rising.append(path.name)
        figures[name] = {"seconds": seconds, "losses": [list(map(float, pair)) for pair in losses]}
        shown = ", ".join(f"{before} > {after}" for before, after in losses)
        rows.append(f"| [{path.stem}]({path.name}) | {seconds:.0f} | {shown} |")
        print(rows[-1], flush=True)
    keep(arguments, "recipes", recipes=figures)
    if not arguments.names and not arguments.print_only:
        (FOLDER / "README.md").write_text(PAGE.format(rows="\n".join(rows)))
    if rising:
        print(f"no loss that falls: {rising}")
    return int(bool(rising))


if __name__ == "__main__":
    sys.exit(main())
