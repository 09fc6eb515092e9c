"""Every python block of the README runs, and prints what the text block after it says."""

import operator
import re
from pathlib import Path

import pytest

import minipeft
from tests.blocks import blocks_of, run

README = Path(__file__).parent.parent / "README.md"
BLOCKS = blocks_of(README)


def test_the_readme_has_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
def test_block(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(block)


def test_every_relative_link_leads_to_a_file():
    for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md"):
        page = README.parent / name
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{name}: {target}"


def test_the_methods_table_is_what_its_result_file_says():
    pytest.importorskip("rich")
    from benchmarks import report

    text = README.read_text()
    (name,) = set(re.findall(r"\[(benchmarks/results/methods-[\w-]+\.json)\]", text))
    assert report.load(README.parent / name).markdown().strip() in text


def test_every_public_name_in_the_readme_exists():
    names = set(re.findall(r"\bmp\.([a-zA-Z_][\w.]*\w)", README.read_text()))
    assert len(names) > 40
    for name in names:
        operator.attrgetter(name)(minipeft)


def test_every_public_name_is_in_the_readme_or_an_example():
    pages = [README, *(README.parent / "examples").glob("*.py")]
    text = "\n".join(page.read_text() for page in pages)
    used = set(re.findall(r"\b(?:mp|minipeft)\.(\w+)", text))
    assert set(minipeft.__all__) - used - {"__version__"} == set()
