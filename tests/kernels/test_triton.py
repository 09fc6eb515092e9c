"""The Triton kernels, each mode of Triton in a process of its own, and what happens without it."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.kernels.mutants import MUTANTS

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def session(
    name: str, *options: str, kernels: Path = ROOT / "kernels", **environment: str
) -> subprocess.CompletedProcess[str]:
    """One file of tests/kernels as a pytest session of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{name}.py", *options],
        capture_output=True,
        text=True,
        cwd=FOLDER,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(kernels)]),
            **environment,
        },
        check=False,
    )


def run(name: str, **environment: str) -> str:
    """A session that must pass; what it printed."""
    done = session(name, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@needs_triton
def test_interpreted(capsys):
    printed = run("interpreted", TRITON_INTERPRET="1")
    with capsys.disabled():
        print("\n" + "\n".join(line for line in printed.splitlines() if "differ" in line))
    assert "0 differ" in printed


@pytest.mark.slow
@needs_triton
def test_products_interpreted():
    run("interpreted_products", TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
def test_rows_interpreted():
    run("interpreted_rows", TRITON_INTERPRET="1")


@needs_triton
def test_byte_permutation_on_all_bytes():
    run("ptx", TRITON_INTERPRET="0")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    file, old, new, caught_by = MUTANTS[name]
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    path = tmp_path / "kernels" / "minipeft_kernels" / "triton" / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    tests = "interpreted_rows" if file == "rows.py" else "interpreted_products"
    done = session(
        tests, "-x", "-k", caught_by, kernels=tmp_path / "kernels",
        TRITON_INTERPRET="1",
    )  # fmt: skip
    # a test failed, or found its guards overwritten when it ended
    assert done.returncode == 1, done.stdout + done.stderr


@needs_triton
@pytest.mark.slow  # a hundred compilations, for nine GPUs
def test_compiled_without_a_gpu(capsys, tmp_path):
    printed = run("compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    table = [line for line in printed.splitlines() if line.startswith(("sm_", "gfx"))]
    with capsys.disabled():
        print("\n" + "\n".join(table))
    assert len({line.split()[0] for line in table}) == 9


@needs_triton
def test_on_a_cpu_without_the_interpreter_it_says_why_not(plain_python):
    script = """
import torch
import minipeft
from minipeft_kernels.triton import nf4
packed, absmax = minipeft.quantize_nf4(torch.randn(64))
try:
    nf4.dequantize(minipeft.ops.Packed(packed, absmax, 64), [64], torch.float32)
except RuntimeError as error:
    print(error)
print(minipeft.backend("cuda")["dequantize_nf4"])
print(minipeft.backend("cpu")["dequantize_nf4"])
"""
    error, cuda, cpu = plain_python(script, TRITON_INTERPRET="0").strip().splitlines()
    assert "the weight is on cpu" in error and "TRITON_INTERPRET=1" in error
    assert cuda == "triton"
    assert "(not triton: not for torch.bfloat16 (4096, 4096) on cpu" in cpu


def test_without_triton_the_table_says_so(plain_python):
    script = """
import sys
sys.modules["triton"] = None
import minipeft
print(minipeft.backend("cuda")["dequantize_nf4"])
"""
    printed = plain_python(script)
    assert printed.startswith("pytorch (not triton: ") and "triton" in printed.split("Error: ")[1]
