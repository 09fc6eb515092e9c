"""The hook of MkDocs: course pages from the numbered files and their notes, pictures, formulas.

A course page is made while the site is built and is no file of the repository.  It shows the code
of minipeft/<file>.py beside the notes of docs/course/notes/<file>.md (notes.py).
"""

import ast
import re
from pathlib import Path
from typing import Any

import formulas
import pictures
from mkdocs.structure.files import File
from notes import NOTES, NUMBERED, check, notes_of, parts_of

ROOT = Path(__file__).parent.parent
EXERCISES = ROOT / "docs" / "course" / "exercises"
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]*pictures/\w+)\.svg\)")


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
    options = f' title="{title}"' if title else ""
    copying = " .no-copy" if language == "text" else ""  # prose needs no button for it
    return f"```{{ .{language}{copying}{options} }}\n{text.rstrip()}\n```"


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
