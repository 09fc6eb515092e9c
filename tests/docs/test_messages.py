"""Each message that the troubleshooting page quotes is one that the source raises or warns with."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^### `(.+)`$", PAGE.read_text(), re.MULTILINE)


def text_of(node: ast.AST) -> str | None:
    """A string as the source has it, with … for what is put in; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp):  # "..." + reason
        return f"{text_of(node.left) or '…'}{text_of(node.right) or '…'}"
    return None


def raised() -> str:
    """All messages of exceptions and warnings in minipeft/, a line each."""
    found = []
    for path in (ROOT / "minipeft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.search(
                r"(Error|Warning|warn|CannotExpress)$", ast.unparse(node.func)
            ):
                found += [text_of(argument) for argument in node.args]
    return "\n".join(text.replace("\n", " ") for text in found if text)


MESSAGES = raised()


def test_the_page_quotes_messages():
    assert len(QUOTED) >= 20


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_stands_in_the_source(quoted):
    assert re.search(rf"^{re.escape(quoted)}", MESSAGES, re.MULTILINE), quoted


def test_text_of_reads_every_form_of_a_message():
    parsed = ast.parse('f"a {x}: " "b" + "; ".join(y)').body[0]
    assert text_of(parsed.value) == "a …: b…"
