"""Progress bars stay small where a terminal's output is kept."""

import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tqdm.std import tqdm

import minipeft as mp
from minipeft.adapters.progress import Progress
from minipeft.io.bitsandbytes import save_quantized

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that goes on by as much at each look."""

    def __init__(self, step):
        self.now, self.step = 1000.0, step

    def __call__(self):
        self.now += self.step
        return self.now


@pytest.mark.slow
@pytest.mark.parametrize(("count", "step"), [(2000, 60.0), (100_000, 0.2), (300_000, 0.001)])
def test_a_captured_terminal_gets_less_than_100_kb(count, step, monkeypatch, capsys):
    monkeypatch.setattr("tqdm.std.time", Clock(step))
    written = {}
    for name, kind in (("ours", Progress), ("tqdm", tqdm)):
        out = Terminal()
        assert len(list(kind(range(count), desc="loading", unit="tensor", file=out))) == count
        written[name] = len(out.getvalue().encode())
    with capsys.disabled():
        print(f"\nbytes of a bar, {count} steps of {step} s: {written}")
    assert written["ours"] < 100_000


def test_states_are_seldom_and_the_last_is_complete(monkeypatch):
    clock, out = Clock(0.01), Terminal()
    monkeypatch.setattr("tqdm.std.time", clock)
    bar = Progress(total=10**9, unit="B", unit_scale=True, file=out)
    seen = []
    for _ in range(1000):
        if bar.update(10**6):
            seen.append(clock.now)
    bar.close()
    assert all(b - a >= 0.5 for a, b in itertools.pairwise(seen))
    assert "100%" in out.getvalue().rsplit("\r", 1)[-1]
    assert out.getvalue().isascii()


def test_shown_only_on_a_terminal_unless_asked_for():
    for shown, file, visible in (
        (None, Terminal(), True), (None, io.StringIO(), False), (True, io.StringIO(), True),
        (False, Terminal(), False),
    ):  # fmt: skip
        assert list(Progress([1, 2], shown=shown, file=file)) == [1, 2]
        assert bool(file.getvalue()) == visible


LOAD = """
import itertools, sys
import tqdm.std
looks = itertools.count()
tqdm.std.time = lambda: 30.0 * next(looks)  # a slow disk
import torch
from torch import nn
from minipeft.io.bitsandbytes import load_quantized
with torch.device("meta"):
    model = nn.ModuleDict({str(i): nn.Linear(2, 2, bias=False) for i in range(2000)})
    model["q"] = nn.Linear(64, 2)
load_quantized(model, sys.argv[1])
print(model["1999"].weight.shape)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_loading_2000_tensors_in_a_captured_terminal(tmp_path, capsys):
    model = torch.nn.ModuleDict({str(i): torch.nn.Linear(2, 2, bias=False) for i in range(2000)})
    model["q"] = torch.nn.Linear(64, 2)
    mp.quantize_model(model, skip=r"\d+", head=())
    save_quantized(model, tmp_path / "saved")
    import fcntl
    import pty
    import struct
    import termios

    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # else 0 columns
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD, str(tmp_path / "saved")],
        stdout=end, stderr=end,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )  # fmt: skip
    os.close(end)
    written = b""
    while True:
        try:
            part = os.read(main, 2**16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(main)
    assert process.wait() == 0, written[-2000:].decode()
    with capsys.disabled():
        print(f"\nbytes that loading 2,000 tensors at 30 s each shows: {len(written):,}")
    assert b"loading:" in written
    assert len(written) < 100_000


def test_every_bar_is_this_one():
    for folder in ("minipeft", "kernels", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "progress.py":
                text = path.read_text()
                found = re.search(r"import tqdm|from tqdm|rich\.live", text)
                assert not found, f"{path.relative_to(ROOT)}: {found}"
                if "rich.progress" in text:  # a captured terminal keeps every refresh
                    assert "refresh_per_second=0." in text, path
