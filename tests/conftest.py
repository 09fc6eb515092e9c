"""Profiles, threads, and the shape checks of jaxtyping and beartype over the whole library."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if find_spec("beartype"):  # every annotated shape and dtype is checked at every call
    from jaxtyping import install_import_hook

    import tests.typechecker  # noqa: F401  (jaxtyping looks the name up and does not import it)

    install_import_hook("minipeft", "tests.typechecker.checked")

import numpy as np
import pytest
import torch
from hypothesis import settings

# doctests are looked for in every file, and these need more than a bare installation has
collect_ignore = [
    file
    for package, file in (
        ("beartype", "typechecker.py"), ("triton", "kernels/compiled.py"),
        ("triton", "kernels/interpreted.py"),
    )
    if find_spec(package) is None
]  # fmt: skip

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors but for this one, which depends on the CPU (fast/test_products.py).

    Not in pyproject.toml: pytest would import minipeft for its name before the hook above is there.
    """
    config.addinivalue_line(
        "filterwarnings", "ignore::minipeft.adapters.products.SlowProductsWarning"
    )


settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (third-party code draws from it)
    random.seed(0)


@pytest.fixture
def plain_python(tmp_path: Path) -> Callable[[str], str]:
    """Run a script in a process of its own without the import hook, and return what it printed.

    For what the hook or this process's imports would disturb: torch.compile(fullgraph=True)
    cannot trace beartype's checks, and import times need a fresh interpreter.
    """

    def run(script: str, **environment: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(script)
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        done = subprocess.run(
            [sys.executable, str(path)],
            capture_output=True,
            text=True,
            timeout=900,  # a machine may be busy; nothing is measured here
            env={**os.environ, "PYTHONPATH": paths, **environment},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
