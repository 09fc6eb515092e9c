"""A Markdown extension: $...$ in a line and $$...$$ on lines of their own become MathML.

Browsers draw MathML themselves, so a page needs no script and no font for its formulas.
"""

import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

_BLOCK = re.compile(r"^\$\$(.+?)\$\$$", re.DOTALL)


class _InLine(InlineProcessor):
    """$formula$, with no space inside its dollars."""

    def handleMatch(self, m: re.Match[str], data: str) -> Any:
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)


class _OnItsOwn(BlockProcessor):
    """A paragraph that is one $$formula$$."""

    def test(self, parent: Any, block: str) -> bool:
        return bool(_BLOCK.match(block.strip()))

    def run(self, parent: Any, blocks: list[str]) -> None:
        match = _BLOCK.match(blocks.pop(0).strip())
        assert match is not None
        formula = convert(" ".join(match[1].split()), display="block")
        child = ElementTree.SubElement(parent, "div", {"class": "formula"})
        child.text = self.parser.md.htmlStash.store(formula)


class Formulas(Extension):
    """Adds both forms."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.parser.blockprocessors.register(_OnItsOwn(md.parser), "formula", 175)
        # above backslash escapes (180), below code in backticks (190)
        md.inlinePatterns.register(_InLine(r"\$(?! )([^$\n]+?)(?<! )\$", md), "formula", 185)
