"""Every python block of every page runs, and prints what the page says."""

from pathlib import Path

import pytest

from tests.blocks import blocks_of, run

PAGES = sorted((Path(__file__).parent.parent.parent / "docs").rglob("*.md"))
BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def test_there_are_pages_with_blocks():
    assert len(PAGES) >= 20
    assert len(BLOCKS) >= 20


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.stem} {block.line}")
def test_block(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_hides_from_the_tests(page):
    """Blocks stand at the margin, where the pattern of tests/blocks.py finds them."""
    assert page.read_text().count("```python") == len(blocks_of(page))
