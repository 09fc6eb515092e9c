"""Notes of the course and code of the numbered files have the same names; pictures are computed."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def module(name):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, made)
    spec.loader.exec_module(made)
    return made


notes = module("notes")
SOURCE = '''"""Head."""

import math

X = 1


# why
@math.cached
def first():
    return 1


Y = first()


class Second:
    a: int

    def one(self):
        return 1

    def two(self):
        return 2
'''


@pytest.mark.parametrize("file", notes.NUMBERED)
def test_every_function_has_a_note_and_every_note_a_function(file):
    source = (ROOT / "minipeft" / f"{file}.py").read_text()
    introduction, sections = notes.notes_of((notes.NOTES / f"{file}.md").read_text())
    notes.check(file, source, sections)
    assert introduction.startswith("# ")


def test_a_missing_note_and_a_note_for_nothing_are_refused():
    have = dict.fromkeys(["first", "Second", "Second.two", "Exercise"], "text")
    notes.check("x", SOURCE, have)
    for name in ("first", "Second", "Exercise"):
        with pytest.raises(ValueError, match=rf"no section .* for \['{name}'\]"):
            notes.check("x", SOURCE, {key: text for key, text in have.items() if key != name})
        with pytest.raises(ValueError, match=rf"no section .* for \['{name}'\]"):
            notes.check("x", SOURCE, {**have, name: ""})
    for name in ("third", "Second.three", "one"):
        with pytest.raises(ValueError, match=rf"sections for \['{name}'\], which"):
            notes.check("x", SOURCE, {**have, name: "text"})


def test_parts_hold_every_line_once_and_in_order():
    parts = notes.parts_of(SOURCE, {"first", "Second", "Second.two"})
    assert [part.name for part in parts] == ["", "first", "Second", "Second.two"]
    lines = SOURCE.splitlines()
    assert [n for part in parts for n in range(part.first, part.last + 1)] == [
        *range(1, len(lines) + 1)
    ]
    assert [lines[part.first - 1] for part in parts[1:]] == [
        "# why", "class Second:", "    def two(self):"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pictures():
    pytest.importorskip("matplotlib")
    return module("pictures")


def test_pictures_are_small_and_drawn_for_light_and_dark_pages(pictures):
    made = pictures.make()
    assert len(made) == 2 * len(pictures.PICTURES)
    for name in pictures.PICTURES:
        light, dark = made[f"{name}-light.svg"], made[f"{name}-dark.svg"]
        assert light != dark
        assert len(light) < 100_000 > len(dark)


def test_the_course_shows_every_picture(pictures):
    text = "".join(path.read_text() for path in notes.NOTES.glob("*.md"))
    assert set(re.findall(r"pictures/(\w+)\.svg", text)) == set(pictures.PICTURES)


def test_the_learnt_singular_values_are_the_largest_ones(pictures):
    """The best approximation of rank r keeps the r largest; training ends near it."""
    wanted, learnt = pictures._learnt_values()
    assert sorted(learnt) == [2, 4, 8]
    for rank, values in learnt.items():
        # what is drawn on a logarithmic axis: within a marker's size, a tenth of the value
        assert ((values - wanted[:rank]).abs() < 0.1 * wanted[:rank]).all()
