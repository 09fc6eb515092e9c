"""Interrupted deltas: the same bytes in the end, nothing half written, memory that stays small."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from minipeft.io.delta import apply as apply_module
from minipeft.io.delta import apply_delta, make_delta
from minipeft.io.delta import make as make_module
from minipeft.io.shards import ShardWriter
from tests.io.delta.checkpoints import contents, pair, read, same_bits, write

SMALL = {"max_shard_bytes": 300}


@pytest.fixture
def sources(tmp_path):
    base, tuned = pair(torch.bfloat16)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    return tmp_path


def test_two_runs_write_the_same_bytes(sources):
    for name in ("one", "two"):
        make_delta(sources / "base", sources / "tuned", sources / name, **SMALL)
        apply_delta(sources / "base", sources / name, sources / f"out-{name}", **SMALL)
    assert contents(sources / "one") == contents(sources / "two")
    assert contents(sources / "out-one") == contents(sources / "out-two")


def test_an_interrupted_run_goes_on_after_its_last_whole_shard(sources, monkeypatch):
    make_delta(sources / "base", sources / "tuned", sources / "delta", **SMALL)
    apply_delta(sources / "base", sources / "delta", sources / "whole", **SMALL)
    runs = {
        "delta": lambda out: make_delta(sources / "base", sources / "tuned", out, **SMALL),
        "whole": lambda out: apply_delta(sources / "base", sources / "delta", out, **SMALL),
    }
    write_parts = ShardWriter.write_parts
    for whole, run in runs.items():
        expected, out, stop = contents(sources / whole), sources / f"again-{whole}", 0
        while not out.exists():
            stop, seen = stop + 2, []

            def failing(self, name, parts, stop=stop, seen=seen):
                seen.append(name)
                if len(seen) == stop:
                    raise KeyboardInterrupt
                return write_parts(self, name, parts)

            monkeypatch.setattr(ShardWriter, "write_parts", failing)
            try:
                run(out)
            except KeyboardInterrupt:
                assert not out.exists() and out.with_name(f"{out.name}.unfinished").is_dir()
            monkeypatch.undo()
        assert stop > 4
        assert contents(out) == expected
        with pytest.raises(ValueError, match="exists already"):
            run(out)


def test_a_run_that_died_after_its_last_rename_is_finished_by_the_same_call(sources, monkeypatch):
    def make():
        return make_delta(sources / "base", sources / "tuned", sources / "delta", **SMALL)

    def apply():
        return apply_delta(sources / "base", sources / "delta", sources / "out", **SMALL)

    unlink = Path.unlink
    for run, name, record in (
        (make, "delta", make_module.RECORD), (apply, "out", apply_module.RECORD),
    ):  # fmt: skip
        monkeypatch.setattr(
            Path, "unlink",
            lambda path, name=name, **rest: 1 / 0 if path.parent.name == name
            else unlink(path, **rest),
        )  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            run()
        monkeypatch.undo()
        left = contents(sources / name)
        assert left.pop(record)
        assert run().exact
        assert contents(sources / name) == left
    assert same_bits(read(sources / "out"), pair(torch.bfloat16)[1])


def test_a_run_with_other_settings_or_sources_does_not_go_on(sources, monkeypatch):
    monkeypatch.setattr(make_module, "write_index", lambda *_: 1 / 0)
    args = sources / "base", sources / "tuned", sources / "delta"
    with pytest.raises(ZeroDivisionError):
        make_delta(*args, **SMALL)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another source or other settings; delete it"):
        make_delta(*args, **SMALL, dtype=torch.float32)
    file = next((sources / "tuned").glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data)  # another time
    with pytest.raises(ValueError, match="another source or other settings; delete it"):
        make_delta(*args, **SMALL)


def test_a_refusal_leaves_nothing_behind_and_the_right_base_goes_on(sources):
    make_delta(sources / "base", sources / "tuned", sources / "delta", **SMALL)
    with pytest.raises(ValueError, match="already"):
        apply_delta(sources / "tuned", sources / "delta", sources / "out", **SMALL)
    assert sorted(p.name for p in sources.iterdir()) == ["base", "delta", "tuned"]
    apply_delta(sources / "base", sources / "delta", sources / "out", **SMALL)


def test_room_is_checked_before_the_work(sources, monkeypatch):
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="bytes to write, 1,000 bytes free"):
        make_delta(sources / "base", sources / "tuned", sources / "delta")
    assert not (sources / "delta").exists()


def test_a_bar_is_shown_where_it_is_asked_for(sources, capsys):
    args = sources / "base", sources / "tuned", sources / "delta"
    make_delta(*args, progress=True)
    apply_delta(sources / "base", args[2], sources / "out", progress=True)
    shown = capsys.readouterr().err
    assert "making the delta" in shown and "adding the delta" in shown


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from minipeft.io.delta import apply_delta, make_delta
from minipeft.io.shards import ShardWriter

base, draw, small = Path({base!r}), random.Random(0), {{"max_shard_bytes": 300}}
write_parts, kills = ShardWriter.write_parts, 0

def slow(self, name, parts):
    time.sleep(0.003)
    found = write_parts(self, name, parts)
    time.sleep(0.003)
    return found

ShardWriter.write_parts = slow
for run in (
    lambda: make_delta(base / "base", base / "tuned", base / "again", **small),
    lambda: apply_delta(base / "base", base / "delta", base / "out", **small),
):
    while True:
        child = os.fork()
        if not child:
            run()
            os._exit(0)
        time.sleep(draw.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            break
        kills += 1
        assert kills < 1000
print(kills)
"""


def test_killed_at_random_moments_the_bytes_are_the_same(sources, plain_python):
    make_delta(sources / "base", sources / "tuned", sources / "delta", **SMALL)
    apply_delta(sources / "base", sources / "delta", sources / "whole", **SMALL)
    kills = int(plain_python(KILLED.format(base=str(sources))))
    print(f"\n{kills} kills")
    assert kills >= 2
    assert contents(sources / "again") == contents(sources / "delta")
    assert contents(sources / "out") == contents(sources / "whole")
    assert same_bits(read(sources / "out"), pair(torch.bfloat16)[1])


MEASURED = """
import gc, json, sys
from pathlib import Path
import torch
from minipeft.io.delta import apply_delta, make_delta

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

base = Path({base!r})
for run in ("small", "large"):  # the small one brings what is loaded once
    folder, found = base / run, {{}}
    for name, call in (
        ("make", lambda: make_delta(folder / "base", folder / "tuned", folder / "delta")),
        ("apply", lambda: apply_delta(folder / "base", folder / "delta", folder / "out",
                                      published_sum=0.0, tolerance=1e9)),
    ):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = status("VmRSS")
        call()
        found[name] = status("VmHWM") - before
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what a process's memory peaked at")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_peaks_at_two_tensors_and_64_mib(tmp_path, plain_python, dtype, form):
    """Also of pickled files, whose mapping counts while it lasts."""
    rows = 2**24 // 1000 // dtype.itemsize * 4  # of 64 MiB, about
    for run, own in (("small", 10), ("large", rows)):
        base = {f"layers.{i}.weight": torch.randn(own, 1000).to(dtype) for i in range(5)}
        tuned = {name: value * 1.1 for name, value in base.items()}
        write(tmp_path / run / "base", base, form)
        write(tmp_path / run / "tuned", tuned, form)
    largest = 1000 * rows * dtype.itemsize
    del base, tuned
    found = json.loads(plain_python(MEASURED.format(base=str(tmp_path))))
    peaks = {name: f"{peak / 2**20:.0f} MiB" for name, peak in found.items()}
    print(f"\n{form} {dtype}: tensors of {largest / 2**20:.0f} MiB: {peaks}")
    assert max(found.values()) <= 2 * largest + 2**26


def test_a_whole_shard_that_was_damaged_meanwhile_is_made_again(sources, monkeypatch):
    monkeypatch.setattr(make_module, "write_index", lambda *_: 1 / 0)
    args = sources / "base", sources / "tuned", sources / "delta"
    with pytest.raises(ZeroDivisionError):
        make_delta(*args, **SMALL)
    monkeypatch.undo()
    shards = sorted((sources / "delta.unfinished").glob("model-?????-of-?????.safetensors"))
    shard = random.Random(0).choice(shards)
    shard.write_bytes(shard.read_bytes()[:-1])
    make_delta(*args, **SMALL)
    make_delta(*args[:2], sources / "whole", **SMALL)
    assert contents(sources / "delta") == contents(sources / "whole")
