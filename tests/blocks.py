"""The python blocks of a Markdown page, run as its reader would; README and docs/ share this."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

# code, and what the text block right after it says that the code prints
_BLOCK = re.compile(
    r"^```python[^\n]*\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE
)
_OPTIONAL = ("transformers", "peft", "bitsandbytes")


class Block(NamedTuple):
    """One block of a page."""

    page: Path
    line: int  # where its code starts
    code: str
    expected: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page in their order."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, match.start(1)), match[1], match[2] or "")
        for match in _BLOCK.finditer(text)
    ]


def run(block: Block) -> None:
    """Run it in the current folder; what it prints must be what the page says, and no warning."""
    for package in _OPTIONAL:
        if re.search(rf"^(?:import|from) {package}\b", block.code, re.MULTILINE):
            pytest.importorskip(package)
    printed = io.StringIO()
    code = "\n" * block.line + block.code  # so that an error shows the page's own line
    with redirect_stdout(printed):
        exec(compile(code, str(block.page), "exec"), {"__name__": "__main__"})
    found = printed.getvalue()
    assert found == block.expected, f"it printed:\n{found}\nthe page says:\n{block.expected}"
