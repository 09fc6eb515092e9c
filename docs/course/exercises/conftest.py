"""`mine` is the exercise's file beside its test; with SOLUTIONS=1 the solution, which passes."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest


def load(path: Path) -> ModuleType:
    """The module in this file, whose name need not be an identifier."""
    spec = importlib.util.spec_from_file_location("exercise", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mine(request: pytest.FixtureRequest) -> ModuleType:
    folder = request.path.parent / ("solutions" if os.environ.get("SOLUTIONS") else ".")
    return load(folder / request.path.name.removeprefix("test_"))
