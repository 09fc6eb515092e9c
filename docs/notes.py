"""Which lines of a numbered file a section of its notes explains.

docs/course/notes/<file>.md has a section

    ## name                   for each function and class at the top of minipeft/<file>.py,
    ## Class.method           for the methods that need a note of their own, and
    ## Exercise               at the end.

What stands before the first section is the introduction.  A section for a name that the file does
not have, or a name without a section, is an error, so code and notes cannot drift apart.
"""

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

NOTES = Path(__file__).parent / "course" / "notes"
NUMBERED = ["lora", "inject", "nf4", "double_quant", "qlora", "prefix"]
_SECTION = re.compile(r"^## `?([\w.]+)`?$", re.MULTILINE)


class Part(NamedTuple):
    """Lines of a file that one note explains."""

    name: str
    first: int  # counted from 1
    last: int


def definitions(tree: ast.AST) -> list[Any]:
    """The functions and classes right below this node."""
    kinds = ast.FunctionDef | ast.ClassDef
    return [node for node in ast.iter_child_nodes(tree) if isinstance(node, kinds)]


def names_of(text: str) -> tuple[list[str], list[str]]:
    """The functions and classes of a file, which need notes, and their methods, which may have."""
    tops = definitions(ast.parse(text))
    methods = [f"{top.name}.{node.name}" for top in tops for node in definitions(top)]
    return [top.name for top in tops], methods


def parts_of(text: str, noted: set[str]) -> list[Part]:
    """The file cut before each function, class and noted method; first its head, named ''."""
    tree, lines = ast.parse(text), text.splitlines()
    starts = {"": 1}
    for top in definitions(tree):
        starts[top.name] = _first_line(top, lines)
        for node in definitions(top):
            if f"{top.name}.{node.name}" in noted:
                starts[f"{top.name}.{node.name}"] = _first_line(node, lines)
    ends = [*list(starts.values())[1:], len(lines) + 1]
    return [
        Part(name, first, end - 1) for (name, first), end in zip(starts.items(), ends, strict=True)
    ]


def _first_line(node: Any, lines: list[str]) -> int:
    """The line of the first decorator, or of the comments right above it."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    while lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first


def notes_of(text: str) -> tuple[str, dict[str, str]]:
    """The introduction and the sections of a page of notes."""
    introduction, *rest = _SECTION.split(text)
    return introduction.strip(), dict(
        zip(rest[::2], (part.strip() for part in rest[1::2]), strict=True)
    )


def check(file: str, source: str, notes: dict[str, str]) -> None:
    """Raise ValueError unless notes and code have the same names."""
    needed, possible = names_of(source)
    where = f"docs/course/notes/{file}.md"
    if missing := [name for name in [*needed, "Exercise"] if not notes.get(name)]:
        raise ValueError(f"{where}: no section (## name) for {missing}")
    if unknown := [name for name in notes if name not in {*needed, *possible, "Exercise"}]:
        raise ValueError(f"{where}: sections for {unknown}, which minipeft/{file}.py does not have")
