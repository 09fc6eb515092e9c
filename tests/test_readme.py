"""Every python block of the README runs, and prints what the text block after it says."""

import operator
import re
import tomllib
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


SOURCE = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]["urls"]["Source"]
RAW = SOURCE.replace("https://github.com", "https://raw.githubusercontent.com") + "/main/"


def targets_of(name):
    """What a page links to and shows, without anchors."""
    text = (README.parent / name).read_text()
    return [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]


def test_every_relative_link_leads_to_a_file():
    for name in ("CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md"):
        for target in targets_of(name):
            if target and not target.startswith("http"):
                assert ((README.parent / name).parent / target).exists(), f"{name}: {target}"


def test_the_readmes_links_are_absolute_and_lead_to_files():
    """A package index shows the README without the repository around it."""
    own = 0
    for target in targets_of("README.md"):
        assert target.startswith("https://"), target
        for start in (f"{SOURCE}/blob/main/", RAW):
            if target.startswith(start):
                assert (README.parent / target.removeprefix(start)).exists(), target
                own += 1
    assert own > 20


def test_the_docs_own_addresses_lead_to_files():
    pages = [page for page in (README.parent / "docs").rglob("*.md") if "notes" not in page.parts]
    for page in pages:
        for target in re.findall(rf"{re.escape(SOURCE)}/blob/main/([\w./-]+)", page.read_text()):
            assert (README.parent / target).exists(), f"{page}: {target}"


def test_every_file_of_results_that_is_named_exists():
    pages = [README, *README.parent.glob("*/*.md")]
    for page in pages:
        for name in re.findall(r"benchmarks/results/([a-z][\w-]+\.\w+)", page.read_text()):
            assert (README.parent / "benchmarks" / "results" / name).exists(), f"{page}: {name}"


def test_the_methods_table_is_what_its_result_file_says():
    pytest.importorskip("rich")
    from benchmarks import report

    text = README.read_text()
    (name,) = set(re.findall(r"\[(benchmarks/results/methods-[\w-]+\.json)\]", text))
    assert report.load(README.parent / name).markdown().strip() in text


def test_every_public_name_in_the_readme_and_the_docs_exists():
    pages = [
        README,
        *(README.parent / "docs").glob("*.md"),
        *(README.parent / "docs").glob("*/*.md"),
    ]
    text = "\n".join(page.read_text() for page in pages)
    names = set(re.findall(r"\bmp\.([a-zA-Z_][\w.]*\w)", text))
    assert len(names) > 40
    for name in names:
        operator.attrgetter(name)(minipeft)


def test_every_public_name_is_used_in_a_page_or_an_example():
    """Or stands in the table of what each name is for."""
    docs = README.parent / "docs"
    pages = [README, *docs.glob("*.md"), *docs.glob("howto/*.md"), docs / "reference" / "index.md"]
    pages += (README.parent / "examples").glob("*.py")
    text = "\n".join(page.read_text() for page in pages)
    used = set(re.findall(r"\b(?:mp|minipeft)\.(\w+)", text))
    assert set(minipeft.__all__) - used - {"__version__"} == set()
