"""The reference has an entry for every public name, and for no other."""

import operator
import re
from pathlib import Path

import pytest

import minipeft as mp

PAGES = Path(__file__).parent.parent.parent / "docs" / "reference"
ENTRIES = [
    entry for page in sorted(PAGES.glob("*.md"))
    for entry in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]  # fmt: skip
GROUPS = {
    "minipeft": mp, "minipeft.layers": mp.layers, "minipeft.starts": mp.starts,
    "minipeft.optim": mp.optim, "minipeft.io": mp.io,
    "minipeft.integrations.transformers": mp.integrations.transformers,
    **{f"minipeft.io.{name}": getattr(mp.io, name) for name in mp.io.__all__},
}  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_every_public_name_has_an_entry(group):
    names = getattr(GROUPS[group], "__all__", [])
    on_top = set(ENTRIES).intersection(f"minipeft.{name}" for name in mp.__all__)  # theirs is there
    missing = [
        name for name in names
        if f"{group}.{name}" not in ENTRIES and f"minipeft.{name}" not in on_top
    ]  # fmt: skip
    assert missing == [], f"add `::: {group}.<name>` to a page of docs/reference/"


def test_every_entry_is_a_public_name_and_stands_once():
    assert len(ENTRIES) == len(set(ENTRIES))
    for entry in ENTRIES:
        operator.attrgetter(entry.removeprefix("minipeft."))(mp)
