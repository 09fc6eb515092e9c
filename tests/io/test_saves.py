"""Every writer killed at every moment: the old state, the new one, or a refusal and a new save."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.integrations.transformers import attach_prefix
from minipeft.io.bitsandbytes import load_quantized, save_quantized
from minipeft.io.prefixes import save_prefix, save_prefix_encoder
from minipeft.io.replace import COMMIT
from minipeft.io.save_pretrained import save_adapters

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forks")


def run(*arguments, timeout=300):
    """The benchmark in a process of its own: a fork wants a process without threads."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.saves", "--print-only", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_saves_that_die_at_calls_that_change_the_disk_leave_a_whole_state():
    out = run("--kills", "0", "--calls", "7", "--seconds", "1")
    assert out.count("save_") == 7 and "quantize_checkpoint" in out
    assert out.count("'new'") >= 7 and out.count("'right'") == 2, out  # both sides of the rename


@pytest.mark.slow
def test_fifty_kills_of_each_writer_leave_a_whole_state(capsys):
    out = run("--kills", "50", "--calls", "0", "--seconds", "5", timeout=900)
    with capsys.disabled():
        print(f"\n{out}")


def lora(seed, rank=2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    mp.inject_lora(model, ["0"], rank=rank)
    return model


def quantized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    mp.quantize_model(model)
    return model


def full(path, size):
    """A file system of so many bytes; skips where none can be made."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
        capture_output=True,
    )
    if done.returncode:
        pytest.skip("no file system can be mounted here")


@pytest.mark.parametrize("writer", ["save_peft", "save_prefix", "save_quantized"])
def test_a_disk_that_is_full_leaves_the_old_state(writer, tmp_path):
    disk = tmp_path / "disk"
    full(disk, 160 * 1024)
    try:
        if writer == "save_peft":
            mp.save_peft(lora(1), disk / "a")
            big = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10_000))
            mp.inject_lora(big, ["1"], rank=6)
            save, name = (lambda: mp.save_peft(big, disk / "a")), "adapter_model.safetensors"
        elif writer == "save_prefix":
            save_prefix(mp.PrefixEncoder([(1, 4, 4)], 3), disk / "a")
            big = mp.PrefixEncoder([(1, 4, 4)], 10_000)
            save, name = (lambda: save_prefix(big, disk / "a")), "prefix.safetensors"
        else:
            (disk / "a").mkdir()
            big = nn.Sequential(nn.Linear(64, 64), nn.Embedding(1000, 64))
            mp.quantize_model(big)
            save, name = (lambda: save_quantized(big, disk / "a")), "model.safetensors"
        before = {p.name: p.read_bytes() for p in (disk / "a").iterdir()}
        with pytest.raises(OSError, match=rf"No space left.*disk/a/{name}"):
            save()
        assert {p.name: p.read_bytes() for p in (disk / "a").iterdir()} == before
        if writer == "save_quantized":
            (disk / "a").rmdir()
            save_quantized(quantized(), disk / "a")  # the room is free again
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def committed(folder, *names):
    """Move files back into a commit folder, as a save that died after its rename leaves them."""
    (folder / COMMIT / "gone").mkdir(parents=True)
    for name in names:
        (folder / COMMIT / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(folder / COMMIT / "new" / name)


def test_a_checkpoint_that_died_after_its_rename_loads_and_is_not_overwritten(tmp_path):
    model = quantized()
    save_quantized(model, tmp_path, max_shard_bytes=5000)
    names = sorted(p.name for p in tmp_path.iterdir())
    committed(tmp_path, *(n for n in names if "00002" in n or n.endswith("json")))
    with torch.device("meta"):
        again = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    load_quantized(again, tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.state_dict().items())
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        save_quantized(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == names  # and is finished by that


def test_adapters_that_died_after_their_rename_load_from_every_folder(tmp_path):
    model = lora(1)
    mp.inject_lora(model, ["2"], rank=3, name="poet")
    mp.save_peft(model, tmp_path)
    files = ("adapter_model.safetensors", "adapter_config.json")
    committed(tmp_path, files[1], f"poet/{files[0]}", f"poet/{files[1]}")
    for folder, place in ((tmp_path, "0"), (tmp_path / "poet", "2")):
        again = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        assert mp.load_peft(again, folder) == [place]
    mp.save_peft(model, tmp_path / "poet", name="poet")  # finishes what is in the folder above
    assert not list(tmp_path.rglob(".minipeft*"))
    assert json.loads((tmp_path / files[1]).read_text())["r"] == 2


def test_a_first_save_that_died_is_refused_and_can_be_saved_into(tmp_path):
    stage = tmp_path / ".minipeft-1-00" / "new"
    stage.mkdir(parents=True)
    mp.save_peft(lora(1), tmp_path / "x")
    for path in (tmp_path / "x").iterdir():
        path.rename(stage / path.name)
    (tmp_path / "x").rmdir()
    with pytest.raises(ValueError, match="no such file"):
        mp.load_peft(lora(1), tmp_path)
    mp.save_peft(lora(1), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_a_save_that_is_refused_touches_nothing(tmp_path):
    mp.save_peft(lora(1), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="no values here"):
        mp.save_peft(lora(2).to("meta"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="no values here"):
        mp.save_peft(lora(2).to("meta"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("writer", ["save_peft", "save_pretrained", "save_prefix", "table"])
def test_what_diverged_is_refused_and_the_file_before_it_stays(writer, bad, tmp_path):
    if writer in ("save_peft", "save_pretrained"):
        model = lora(1)
        mp.inject_lora(model, ["2"], rank=1, name="other")
        number = model[2].lora_b
        save = mp.save_peft if writer == "save_peft" else save_adapters
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 9}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        attach_prefix(model, 3)
        number = list(mp.adapter_parameters(model))[-1]
        save = save_prefix if writer == "save_prefix" else save_prefix_encoder
    save(model, tmp_path / "a")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with torch.no_grad():
        number.view(-1)[-1] = bad
    with pytest.raises(
        ValueError, match=r"save_\w+: .* holds NaN or Inf \(1 such tensors in all\)"
    ):
        save(model, tmp_path / "a")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
