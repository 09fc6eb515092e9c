"""The files of results: each is small and quoted, and has what a figure depends on."""

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.output import text_of

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "benchmarks" / "results"


def committed():
    """The files of results that belong to the project; without git, all that are there."""
    command = ["git", "ls-files", "--", str(FOLDER)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return sorted(FOLDER.iterdir())
    return [path for line in done.stdout.splitlines() if (path := ROOT / line).exists()]


FILES = committed()


def test_there_are_results():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_result_is_quoted(path):
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "kernels" / "README.md"]
    pages += (ROOT / "docs").rglob("*.md")
    assert any(path.name in page.read_text() for page in pages), (
        f"{path.name}: no page quotes it; link it beside the claim that it proves, or remove it"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_result_has_at_most_200_kb(path):
    assert path.stat().st_size <= 200_000


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".json"], ids=lambda p: p.name)
def test_a_result_has_no_thousands_of_lines(path):
    assert path.read_text().count("\n") <= 1000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_the_text_of_a_result_is_its_json(value):
    assert json.loads(text_of(value)) == value


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".json"], ids=lambda p: p.name)
def test_a_result_says_when_where_and_of_which_code(path):
    found = json.loads(path.read_text())
    for name in ("when", "hardware", "versions", "commit"):
        assert found[name], f"{path.name} has no {name}"
