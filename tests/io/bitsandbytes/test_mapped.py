"""Weights that are pages of their file: equal, uncopied, writable, and watched."""

import copy
import json
import os
import shutil
from contextlib import closing

import pytest
import torch

import minipeft as mp
from minipeft.io.bitsandbytes import load_quantized
from minipeft.io.header import UnmappedFile
from minipeft.io.mapped import MappedFile
from tests.io.bitsandbytes.test_load import assert_equal_models, llama, on_meta, saved


def filled(path, **options):
    model = on_meta().eval()
    load_quantized(model, path, mapped=True, **options)
    return model


def mappings(word):
    """Of this process's mappings of files with this word: bytes that are its own, written ones."""
    own, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split()[0] and ":" not in line.split()[0]:
                inside = word in line
            elif inside and line.startswith("Private_Dirty:"):
                own += int(line.split()[1]) * 1024
    return own


def addresses(word):
    """First and last address of this process's mappings of files with this word."""
    with open("/proc/self/maps") as lines:
        found = [line.split()[0].split("-") for line in lines if word in line]
    return [(int(first, 16), int(last, 16)) for first, last in found]


@pytest.mark.parametrize("max_shard_bytes", [2000, 10**9])
def test_a_mapped_model_is_equal_and_lies_in_the_file(tmp_path, max_shard_bytes):
    saved(tmp_path / "four", max_shard_bytes=max_shard_bytes)
    plain, model = on_meta().eval(), filled(tmp_path / "four")
    load_quantized(plain, tmp_path / "four")
    assert_equal_models(model, plain)
    rows = torch.tensor([1, 5])
    assert torch.equal(model(rows), plain(rows))
    inside = addresses(str(tmp_path))
    small = ("absmax_offset", "num_batches_tracked")  # made of a number of the JSON; a count
    for name, value in model.state_dict().items():
        there = any(first <= value.data_ptr() < last for first, last in inside)
        assert there != name.endswith(small[0]) or name.endswith(small[1]), name


def test_every_tensor_holds_the_files_bytes_without_a_copy(tmp_path):
    saved(tmp_path / "four")
    path = tmp_path / "four" / "model.safetensors"
    with closing(MappedFile(path)) as file, closing(UnmappedFile(path)) as plain:
        for name in file.specs:
            assert file.holds(file.read(name)) and not file.holds(plain.read(name))
            assert torch.equal(file.read(name), plain.read(name))
        tensor, expected = file.read("a.weight"), plain.read("a.weight")
    del file
    assert torch.equal(tensor, expected)  # the mapping is the tensor's


def test_writing_changes_the_tensor_and_not_the_file(tmp_path):
    saved(tmp_path / "four")
    path = tmp_path / "four" / "model.safetensors"
    before = path.read_bytes()
    model, other = filled(tmp_path / "four"), filled(tmp_path / "four")
    with torch.no_grad():
        model.a.packed.fill_(7)
        model.embed.weight.zero_()
    assert path.read_bytes() == before
    assert bool((model.a.packed == 7).all()) and not bool((other.a.packed == 7).all())
    model.load_state_dict(other.state_dict())
    assert_equal_models(model, other)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="asks Linux")
def test_loading_writes_to_no_page(tmp_path):
    folder = tmp_path / "mapped-and-clean"
    saved(folder)
    model = filled(folder)
    model(torch.tensor([1]))
    assert mappings("mapped-and-clean") == 0
    with torch.no_grad():
        model.a.packed.fill_(7)
    assert mappings("mapped-and-clean") > 0


def test_training_an_adapter_over_mapped_weights(tmp_path):
    model = llama()
    mp.quantize_model(model)
    mp.save_quantized(model, tmp_path / "four")
    losses = []
    for mapped in (False, True):
        one = mp.meta_model(tmp_path / "four")
        mp.inject_qlora(one, "all-linear", 4)
        torch.manual_seed(1)
        load_quantized(one, tmp_path / "four", mapped=mapped)
        optimizer = torch.optim.AdamW(list(mp.adapter_parameters(one)), lr=1e-2)
        ids = torch.arange(8)[None]
        for _ in range(3):
            loss = one(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
    assert losses[2] < losses[0]


def test_what_is_cast_or_unaligned_is_copied_and_said(tmp_path):
    saved(tmp_path / "four")
    model = on_meta()
    names = load_quantized(model, tmp_path / "four", mapped=True, dtype=torch.bfloat16)
    assert "embed.weight" in names.notes and "another dtype" in names.notes["embed.weight"]
    path = tmp_path / "four" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" "  # everything is one byte further
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    model, plain = on_meta(), on_meta()
    names = load_quantized(model, tmp_path / "four", mapped=True)
    assert "not aligned" in names.notes["embed.weight"]
    load_quantized(plain, tmp_path / "four")
    assert_equal_models(model, plain)


def test_checksums_are_compared_on_request(tmp_path):
    saved(tmp_path / "four")
    path = tmp_path / "four" / "model.safetensors"
    data = bytearray(path.read_bytes())
    with closing(UnmappedFile(path)) as file:
        data[file._start + file._places["a.weight"][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.weight differs from its checksum"):
        load_quantized(on_meta(), tmp_path / "four")
    with pytest.raises(ValueError, match=r"a\.weight differs from its checksum"):
        load_quantized(on_meta(), tmp_path / "four", mapped=True, verify=True)
    load_quantized(on_meta(), tmp_path / "four", mapped=True)
    load_quantized(on_meta(), tmp_path / "four", verify=False)


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_file_that_is_cut_short_is_refused_when_it_is_loaded(tmp_path, cut):
    saved(tmp_path / "four")
    path = tmp_path / "four" / "model.safetensors"
    os.truncate(path, path.stat().st_size - cut)
    model = on_meta()
    with pytest.raises(ValueError, match="damaged safetensors file"):
        load_quantized(model, tmp_path / "four", mapped=True)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("change", ["shorter", "written"])
def test_a_file_that_changes_while_mapped_makes_the_next_forward_raise(tmp_path, change):
    saved(tmp_path / "four")
    path = tmp_path / "four" / "model.safetensors"
    model = filled(tmp_path / "four")
    model(torch.tensor([1]))
    if change == "shorter":
        os.truncate(path, path.stat().st_size // 2)
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(RuntimeError, match=r"model\.safetensors: .* since the model's weights"):
        model(torch.tensor([1]))


def test_a_file_that_is_replaced_or_deleted_does_no_harm(tmp_path):
    saved(tmp_path / "four")
    model, rows = filled(tmp_path / "four"), torch.tensor([1, 5])
    before = model(rows)
    os.replace(shutil.copy(tmp_path / "four" / "config.json", tmp_path / "other"),
               tmp_path / "four" / "model.safetensors")  # fmt: skip
    assert torch.equal(model(rows), before)
    shutil.rmtree(tmp_path / "four")
    assert torch.equal(model(rows), before)


def test_a_copy_has_memory_of_its_own(tmp_path):
    saved(tmp_path / "four")
    model = filled(tmp_path / "four")
    again = copy.deepcopy(model)
    os.truncate(tmp_path / "four" / "model.safetensors", 10)
    assert again(torch.tensor([1])).isfinite().all()
    del model  # untouched: its pages are gone


@pytest.mark.parametrize("options", [{"mmap": False}, {"device": "meta"}])
def test_mapped_needs_a_mapped_file_and_the_cpu(tmp_path, options):
    saved(tmp_path / "four")
    with pytest.raises(ValueError, match="pages of a file on the CPU only"):
        load_quantized(on_meta(), tmp_path / "four", mapped=True, **options)


@pytest.mark.slow
def test_a_mapped_model_takes_no_memory_of_its_own(plain_python, tmp_path):
    """Anonymous memory of a load, and of a forward, above the imports: 64 MB of codes stay out."""
    printed = plain_python(
        f"""
import json, torch, minipeft as mp
from pathlib import Path
from torch import nn
from benchmarks.larger_than_memory import field
torch.set_num_threads(1)
folder = Path({str(tmp_path)!r}) / "four"
def make():
    return nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8)))
model = make(); mp.quantize_model(model, head=()); mp.save_quantized(model, folder); del model
def grown(**options):
    with torch.device("meta"):
        model = make()
    before = field("self", "RssAnon")
    mp.load_quantized(model, folder, **options)
    loaded = field("self", "RssAnon") - before
    with torch.no_grad():
        model(torch.randn(1, 4096))
    return loaded, field("self", "RssAnon") - before
grown(mapped=True)  # buffers that stay, compiled loops
print(json.dumps([grown(mapped=True), grown(mapped=False)]))
""",
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    mapped, plain = json.loads(printed.strip().splitlines()[-1])
    stored = 8 * 4096 * 4096 // 2
    assert plain[0] > 0.9 * stored
    assert max(mapped) < 0.1 * stored


def test_the_hook_lets_models_be_compiled_and_copied(tmp_path):
    saved(tmp_path / "four")
    model = filled(tmp_path / "four")
    assert len(model._forward_pre_hooks) == 1
    load_quantized(model, tmp_path / "four", mapped=True)
    assert len(model._forward_pre_hooks) == 1, "that of the first load went with its weights"
    compiled = torch.compile(model, backend="eager")
    rows = torch.tensor([1, 5])
    assert torch.equal(compiled(rows), model(rows))
