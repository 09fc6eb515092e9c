"""Streaming quantisation: the same bytes however it is interrupted, nothing left half done."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io.bitsandbytes import load_quantized, quantize_checkpoint, save_quantized
from minipeft.io.bitsandbytes import quantize as quantize_module
from minipeft.io.shards import ShardWriter

ROOT = Path(__file__).parents[3]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
        self.ragged = nn.Linear(64, 7, bias=False)


def on_meta():
    with torch.device("meta"):
        return Model()


def source(path, dtype=torch.bfloat16, **config):
    """A sharded checkpoint: one file for each half, an index, a config, other files."""
    from safetensors.torch import save_file

    path.mkdir()
    model = Model().to(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"dtype": str(dtype)[6:], **config}))
    (path / "tokenizer.json").write_text('{"a": 1}')
    (path / "pytorch_model.bin").write_bytes(b"old weights")
    return model


def contents(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_quantising_in_memory(tmp_path, dtype):
    model = source(tmp_path / "source", dtype)
    before = contents(tmp_path / "source")
    names = quantize_checkpoint(tmp_path / "source", tmp_path / "out", model=on_meta(), head=())
    assert sorted(names) == [*(f"layers.{i}" for i in range(6)), "ragged"]
    assert names.left_out == {"embed": "an embedding (embeddings=True quantises it)"}
    assert contents(tmp_path / "source") == before
    assert sorted(contents(tmp_path / "out")) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    mp.quantize_model(model, head=())
    again = on_meta()
    load_quantized(again, tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    save_quantized(model, tmp_path / "saved")
    ours, saved = contents(tmp_path / "out"), contents(tmp_path / "saved")
    assert ours["model.safetensors"] == saved["model.safetensors"]


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, monkeypatch):
    source(tmp_path / "source")
    settings = {"model": on_meta(), "head": (), "max_shard_bytes": 5000}
    quantize_checkpoint(tmp_path / "source", tmp_path / "whole", **settings)
    whole = contents(tmp_path / "whole")
    assert len(whole) > 5
    write, calls = quantize_module._write, []

    def failing(path, *rest):
        calls.append(path.name)
        if len(calls) in (3, 4):
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(quantize_module, "_write", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.unfinished").is_dir()
    other = {**settings, "block_size": 32}
    with pytest.raises(ValueError, match="other settings"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", **other)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == whole
    assert not (tmp_path / "out.unfinished").exists()
    shards = [name for name in whole if name.endswith("safetensors")]
    # two whole shards, one refused twice, then that and the rest: none is made twice
    assert calls == [*shards[:2], shards[2], shards[2], *shards[2:]]


KILLED = """
import sys, torch
sys.path[:0] = [{root!r}]
from pathlib import Path
from minipeft.io.bitsandbytes import quantize_checkpoint
from minipeft.io.bitsandbytes import quantize as module
from tests.io.bitsandbytes.test_quantize import on_meta
write, calls = module._write, []
def announced(path, *rest):
    calls.append(path)
    if len(calls) == 3:
        (Path({base!r}) / "now").touch()
        import time
        time.sleep(60)
    write(path, *rest)
module._write = announced
settings = {{"model": on_meta(), "head": (), "max_shard_bytes": 5000}}
quantize_checkpoint({base!r} + "/source", {base!r} + "/out", **settings)
"""


def test_killed_and_resumed(tmp_path):
    source(tmp_path / "source")
    script = KILLED.format(root=str(ROOT), base=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not (tmp_path / "now").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    settings = {"model": on_meta(), "head": (), "max_shard_bytes": 5000}
    with pytest.raises(ValueError, match="another process is working in it"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.unfinished").glob("*.safetensors"))) == 2
    (tmp_path / "out.unfinished" / ".model-00003-of-00007.safetensors.1.tmp").write_bytes(b"half")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
    quantize_checkpoint(tmp_path / "source", tmp_path / "whole", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("left", [
    [], [f".{quantize_module.PROGRESS}.1-0123456789abcdef.tmp"],
    [f".{quantize_module.PROGRESS}.999999999-0123456789abcdef.tmp"],  # of no process
])  # fmt: skip
def test_a_run_that_died_before_its_record_is_gone_on_with(left, tmp_path):
    source(tmp_path / "source")
    (tmp_path / "out.unfinished").mkdir()
    for name in left:
        (tmp_path / "out.unfinished" / name).write_bytes(b"half")
    settings = {"model": on_meta(), "head": (), "max_shard_bytes": 5000}
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
    quantize_checkpoint(tmp_path / "source", tmp_path / "whole", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_of_somebody_else_is_not_worked_in(tmp_path):
    source(tmp_path / "source")
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_bytes(b"mine")
    with pytest.raises(ValueError, match="another source or other settings"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", model=on_meta(), head=())


def test_a_run_that_died_after_its_last_rename_is_whole_and_is_finished_by_the_same_call(
    tmp_path, monkeypatch
):
    source(tmp_path / "source")
    settings = {"model": on_meta(), "head": (), "max_shard_bytes": 5000}
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink",
        lambda path, **rest: 1 / 0 if path.parent.name == "out" else unlink(path, **rest),
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
    monkeypatch.undo()
    assert (tmp_path / "out" / quantize_module.PROGRESS).is_file()
    load_quantized(on_meta(), tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings, block_size=32)
    names = quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
    whole = quantize_checkpoint(tmp_path / "source", tmp_path / "whole", **settings)
    assert names == whole and contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match="exists already"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings)


def test_a_shard_cut_short_is_made_again(tmp_path, monkeypatch):
    source(tmp_path / "source")
    settings = {"model": on_meta(), "head": (), "max_shard_bytes": 5000}
    finish = quantize_module._finish
    monkeypatch.setattr(quantize_module, "_finish", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
    monkeypatch.setattr(quantize_module, "_finish", finish)
    shard = sorted((tmp_path / "out.unfinished").glob("*.safetensors"))[2]
    os.truncate(shard, 500)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
    quantize_checkpoint(tmp_path / "source", tmp_path / "whole", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


FULL = """
import resource, signal, sys
sys.path[:0] = [{root!r}]
from minipeft.io.bitsandbytes import quantize_checkpoint
from tests.io.bitsandbytes.test_quantize import on_meta
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    quantize_checkpoint({base!r} + "/source", {base!r} + "/out", model=on_meta(), head=())
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_no_destination(tmp_path):
    """Stood in for by a limit on the size of files, which fails in the same write."""
    source(tmp_path / "source")
    script = FULL.format(root=str(ROOT), base=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "while writing" in done.stdout and "model.safetensors" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()
    left = [p.name for p in (tmp_path / "out.unfinished").iterdir()]
    assert left == [quantize_module.PROGRESS]
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", model=on_meta(), head=())


def test_room_is_checked_before_the_work(tmp_path, monkeypatch):
    source(tmp_path / "source")
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="bytes to write, 1,000 bytes free"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", model=on_meta(), head=())
    assert not (tmp_path / "out").exists()


def test_bad_sources_and_destinations(tmp_path):
    source(tmp_path / "source")
    run = quantize_checkpoint
    with pytest.raises(ValueError, match="never written to"):
        run(tmp_path / "source", tmp_path / "source" / "out", model=on_meta(), head=())
    with pytest.raises(ValueError, match="never written to"):
        run(tmp_path / "source", tmp_path / "source", model=on_meta(), head=())
    with pytest.raises(ValueError, match="no such directory"):
        run(tmp_path / "nowhere", tmp_path / "out", model=on_meta(), head=())
    with pytest.raises(ValueError, match="block_size=48"):
        run(tmp_path / "source", tmp_path / "out", model=on_meta(), head=(), block_size=48)
    with pytest.raises((ValueError, ImportError), match=r"config\.json|needs transformers"):
        run(tmp_path / "source", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match="exists already"):
        run(tmp_path / "source", tmp_path / "taken", model=on_meta(), head=())
    with pytest.raises(ValueError, match="nothing to quantise"):
        run(
            tmp_path / "source",
            tmp_path / "out",
            model=on_meta(),
            head=(),
            skip=["layers", "ragged"],
        )

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Model()

    with torch.device("meta"), pytest.raises(ValueError, match="pass the model"):
        run(tmp_path / "source", tmp_path / "out", model=Renamed())

    class Wide(Model):
        def __init__(self):
            super().__init__()
            self.ragged = nn.Linear(64, 9, bias=False)

    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"ragged.weight has shape \(7, 64\)"),
    ):
        run(tmp_path / "source", tmp_path / "out", model=Wide())
    run(tmp_path / "source", tmp_path / "out", model=on_meta(), head=())
    with pytest.raises(ValueError, match="quantised already"):
        run(tmp_path / "out", tmp_path / "twice", model=on_meta(), head=())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "taken"]


def test_a_weight_that_is_not_finite_is_named_with_its_file(tmp_path):
    from safetensors.torch import load_file, save_file

    source(tmp_path / "source")
    path = tmp_path / "source" / "model-00002-of-00002.safetensors"
    state = load_file(path)
    state["ragged.weight"][3, 5] = float("inf")
    save_file(state, path)
    with pytest.raises(ValueError, match=r"model-00002.*ragged.weight.*inf at index \(3, 5\)"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", model=on_meta(), head=())
    assert not (tmp_path / "out").exists()


def test_the_writer_wants_what_was_announced(tmp_path):
    path = tmp_path / "a.safetensors"
    specs = {"x": (torch.float32, (3,)), "odd": (torch.uint8, (5,)), "none": (torch.int64, (0, 2))}
    with ShardWriter(path, specs) as writer:
        with pytest.raises(ValueError, match="not announced"):
            writer.write("y", torch.ones(3))
        with pytest.raises(ValueError, match="announced"):
            writer.write("x", torch.ones(4))
        writer.write("x", torch.arange(3.0))
        with pytest.raises(ValueError, match="written already"):
            writer.write("x", torch.arange(3.0))
        with pytest.raises(ValueError, match="not written yet"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []
    from safetensors.torch import load_file

    tensors = {
        "x": torch.arange(3.0), "odd": torch.arange(5, dtype=torch.uint8),
        "none": torch.zeros(0, 2, dtype=torch.int64),
    }  # fmt: skip
    with ShardWriter(path, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_transformers_model_is_found_by_its_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "source")
    names = quantize_checkpoint(tmp_path / "source", tmp_path / "out")
    assert len(names) == 7 and "lm_head" in names.left_out
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["llm_int8_skip_modules"] == ["lm_head"]
    assert (said["quant_method"], said["load_in_4bit"]) == ("bitsandbytes", True)
