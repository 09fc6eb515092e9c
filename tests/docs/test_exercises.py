"""The exercises of the course fail as they are handed out, and their solutions pass their tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "docs" / "course" / "exercises"
NAMES = ["1_lora", "2_inject", "3_nf4", "4_double_quant", "5_qlora", "6_prefix"]


def outcome(solutions: str) -> tuple[int, str]:
    """pytest's exit status on the exercises, run as a reader runs them, and what it printed."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=line", str(FOLDER)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "SOLUTIONS": solutions, "PYTHONPATH": paths},
    )  # fmt: skip
    return done.returncode, done.stdout


def test_there_is_an_exercise_for_each_numbered_file():
    assert {path.stem for path in FOLDER.glob("[1-9]*.py")} == set(NAMES)
    assert {path.stem for path in (FOLDER / "solutions").glob("*.py")} == set(NAMES)
    assert {path.stem for path in FOLDER.glob("test_*.py")} == {f"test_{name}" for name in NAMES}


def test_every_solution_passes():
    code, printed = outcome("1")
    assert code == 0, printed
    assert int(re.search(r"(\d+) passed", printed)[1]) >= len(NAMES)


def test_every_exercise_fails_as_it_is_handed_out():
    code, printed = outcome("")
    assert code == 1, printed
    assert printed.count("NotImplementedError") >= int(re.search(r"(\d+) failed", printed)[1]) > 0
    assert " passed" not in printed
