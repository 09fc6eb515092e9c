"""The hook of MkDocs: course pages from the numbered files and their notes, pictures, formulas.

A course page is made while the site is built and is no file of the repository.  It shows the code
of minipeft/<file>.py beside the notes of docs/course/notes/<file>.md, which has a section

    ## name                   for each function and class at the top of the file,
    ## Class.method           for the methods that need a note of their own, and
    ## Exercise               at the end.

What stands before the first section is the introduction.  A section for a name that the file does
not have, or a name without a section, is an error, so code and notes cannot drift apart.
"""

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

import formulas
import pictures
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
NOTES = ROOT / "docs" / "course" / "notes"
EXERCISES = ROOT / "docs" / "course" / "exercises"
NUMBERED = ["lora", "inject", "nf4", "double_quant", "qlora", "prefix"]
_SECTION = re.compile(r"^## `?([\w.]+)`?$", re.MULTILINE)
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]*pictures/\w+)\.svg\)")


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


def page(number: int, file: str) -> str:
    """The Markdown of one course page."""
    source = (ROOT / "minipeft" / f"{file}.py").read_text()
    introduction, notes = notes_of((NOTES / f"{file}.md").read_text())
    check(file, source, notes)
    lines = source.splitlines()
    head, *parts = parts_of(source, set(notes))
    docstring = str(ast.get_docstring(ast.parse(source)))
    rest = "\n".join(lines[: head.last]).split('"""', 2)[2].strip("\n")
    above = pair(fenced(docstring, "text", f"minipeft/{file}.py"), introduction.partition("\n")[2])
    shown = [introduction.partition("\n")[0], above]
    shown += [folded(f"Imports and constants of {file}.py", "note", fenced(rest, "python"))]
    for part in parts:
        code = "\n".join(lines[part.first - 1 : part.last]).rstrip()
        title = f"{file}.py, lines {part.first} to {part.first + code.count(chr(10))}"
        heading = f"### `{part.name}` {{ #{part.name} }}"
        shown.append(pair(fenced(code, "python", title), f"{heading}\n\n{notes[part.name]}"))
    front = f"---\ntitle: {number}. {file}.py\nhide: [navigation, toc]\n---"
    return "\n\n".join([front, *shown, exercise(number, file, notes["Exercise"])]) + "\n"


def exercise(number: int, file: str, text: str) -> str:
    """The task, the file to complete, its test, and the solution, folded."""
    name = f"{number}_{file}"
    folder = "docs/course/exercises"
    task = (EXERCISES / f"{name}.py").read_text()
    test = (EXERCISES / f"test_{name}.py").read_text()
    solution = (EXERCISES / "solutions" / f"{name}.py").read_text()
    return "\n\n".join([
        "## Exercise", text, fenced(task, "python", f"{folder}/{name}.py"),
        f"Its test fails until you are done: `pytest {folder}/test_{name}.py`.",
        folded("The test", "example", fenced(test, "python", f"{folder}/test_{name}.py")),
        folded("A solution", "success", fenced(solution, "python")),
    ])  # fmt: skip


def fenced(text: str, language: str, title: str = "") -> str:
    """A block of code."""
    return (
        f'```{language} title="{title}"\n{text.rstrip()}\n```'
        if title
        else (f"```{language}\n{text.rstrip()}\n```")
    )


def folded(title: str, kind: str, content: str) -> str:
    """A block that opens by a click."""
    inner = "\n".join(f"    {line}" if line else "" for line in content.splitlines())
    return f'??? {kind} "{title}"\n\n{inner}'


def pair(code: str, note: str) -> str:
    """Code beside its note; on a narrow screen the note comes first."""
    return (
        '<div class="pair" markdown>\n<div class="note" markdown>\n\n'
        f"{note.strip()}\n\n</div>\n"
        f'<div class="code" markdown>\n\n{code}\n\n</div>\n</div>'
    )


def on_config(config: Any) -> Any:
    """Formulas become MathML while a page is rendered."""
    config.markdown_extensions.append(formulas.Formulas())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the course pages and the pictures."""
    for number, file in enumerate(NUMBERED, 1):
        made = File.generated(config, f"course/{file}.md", content=page(number, file))
        files.append(made)
    for name, content in pictures.make().items():
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name each picture twice: drawn for a light page, and for a dark one."""
    both = r"![\1](\2-light.svg#only-light) ![\1](\2-dark.svg#only-dark)"
    return _PICTURE.sub(both, markdown)
