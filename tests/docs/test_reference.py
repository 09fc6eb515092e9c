"""The reference has an entry for every public name, and for no other."""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import minipeft as mp

ROOT = Path(__file__).parent.parent.parent
PAGES = ROOT / "docs" / "reference"
ENTRIES = [
    entry for page in sorted(PAGES.glob("*.md"))
    for entry in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]  # fmt: skip
GROUPS = {
    "minipeft": mp, "minipeft.layers": mp.layers, "minipeft.starts": mp.starts,
    "minipeft.optim": mp.optim, "minipeft.io": mp.io, "minipeft.codebooks": mp.codebooks,
    "minipeft.integrations.transformers": mp.integrations.transformers,
    **{f"minipeft.io.{name}": getattr(mp.io, name) for name in mp.io.__all__},
}  # fmt: skip


def meant(entry: str) -> Any:
    """What an entry names: minipeft.inject.inject is the function in the file inject.py."""
    owner, _, name = entry.rpartition(".")
    if not owner:
        return importlib.import_module(name)
    try:
        found = importlib.import_module(owner)
    except ModuleNotFoundError:  # minipeft.codebooks is a name on top and no module there
        found = meant(owner)
    return getattr(found, name)


@pytest.mark.parametrize("group", GROUPS)
def test_every_public_name_has_an_entry(group):
    public = {name: getattr(GROUPS[group], name) for name in getattr(GROUPS[group], "__all__", [])}
    have = {(entry.rpartition(".")[2], id(meant(entry))) for entry in ENTRIES}
    missing = [name for name, thing in public.items() if (name, id(thing)) not in have]
    assert missing == [], f"add `::: {group}.<name>` to a page of docs/reference/"


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_shows_what_it_names(entry):
    """Where a file has the name of its function, the path of the entry goes through the file."""
    path = ROOT.joinpath(*entry.split("."))
    is_file = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
    assert not is_file or isinstance(meant(entry), ModuleType)


def test_an_entry_stands_once():
    assert len(ENTRIES) == len(set(ENTRIES))
