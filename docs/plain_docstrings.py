"""An extension of Griffe: docstrings are plain text with doctests, and the site wants Markdown."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_OUTSIDE_CODE = re.compile(r"(```.*?^```|`[^`\n]*`|^ {4}.*?$)|\*", re.DOTALL | re.MULTILINE)


def as_markdown(text: str) -> str:
    """Doctests become blocks of code; shapes such as (*batch, rank) are no emphasis."""
    text = _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", text)
    return _OUTSIDE_CODE.sub(lambda match: match[1] or r"\*", text)


class PlainDocstrings(griffe.Extension):
    """Does that to all that is collected."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
