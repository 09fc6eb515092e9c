"""The files of an adapter's directory: several weights by an index, none that can run code."""

import json

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io.files import read_tensors, write_tensors

WEIGHTS = "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FILES = ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"]
X = torch.randn(3, 8)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()


@pytest.fixture
def sharded(tmp_path):
    """A directory with two files and their index, and the model that was saved."""
    model = plain()
    mp.inject_lora(model, ["0", "2"], 2)
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter)
    mp.save_peft(model, tmp_path)
    tensors = read_tensors(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    places = {}
    for number, file in enumerate(FILES):
        names = [name for name in sorted(tensors) if (".2." in name) == bool(number)]
        write_tensors(tmp_path / file, {name: tensors[name] for name in names})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 512}, "weight_map": places}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path, model


def test_several_files_load_by_their_index(sharded):
    path, model = sharded
    ours = plain()
    assert mp.load_peft(ours, path) == ["0", "2"]
    assert torch.equal(ours(X), model(X))


def test_one_whole_file_counts_more_than_an_index(sharded):
    path, _ = sharded
    other = plain()
    mp.inject_lora(other, ["0", "2"], 2)
    mp.save_peft(other, path)
    ours = plain()
    mp.load_peft(ours, path)
    assert torch.equal(ours(X), other(X))


def changed(change):
    """A change of the index's map."""

    def apply(path):
        index = json.loads((path / INDEX).read_text())
        change(index["weight_map"])
        (path / INDEX).write_text(json.dumps(index))

    return apply


def point(name):
    return changed(lambda places: places.update(dict.fromkeys(places, name)))


def other_name(path):
    tensors = read_tensors(path / FILES[0])
    write_tensors(path / FILES[0], tensors | {"more": torch.ones(1)})


def same_name(path):
    first, second = (read_tensors(path / file) for file in FILES)
    name = next(iter(second))
    write_tensors(path / FILES[0], first | {name: second[name] + 1})


HOSTILE = {
    "a file outside": (point(f"../{FILES[0]}"), "expected the name of a .safetensors file"),
    "a file from the root": (point("/etc/passwd"), "expected the name of a .safetensors file"),
    "another separator": (point(f"..\\{FILES[0]}"), "expected the name of a .safetensors file"),
    "a pickle": (point("adapter_model.bin"), "expected the name of a .safetensors file"),
    "a hidden file": (point(".x.safetensors"), "expected the name of a .safetensors file"),
    "a number": (point(3), "expected the name of a .safetensors file"),
    "nothing": (point(""), "expected the name of a .safetensors file"),
    "a file that is not there": (point("adapter_model-3.safetensors"), "no such file"),
    "a name in no file": (changed(lambda p: p.update(ghost=FILES[0])), "ghost is not in"),
    "a name that is not in the index": (other_name, "more is in this file"),
    "a name left out": (changed(lambda p: p.pop(next(iter(p)))), "is in this file"),
    "a name in two files": (same_name, "is in .* too"),
    "another file's name": (
        changed(lambda p: p.update({next(iter(p)): FILES[1]})), "is in this file",
    ),
    "no map": (lambda path: (path / INDEX).write_text("{}"), "no 'weight_map'"),
    "an empty map": (lambda path: (path / INDEX).write_text('{"weight_map": {}}'), "weight_map"),
    "a list": (lambda path: (path / INDEX).write_text('{"weight_map": ["a"]}'), "weight_map"),
    "no JSON": (lambda path: (path / INDEX).write_text("{"), "JSON"),
    "deep JSON": (lambda path: (path / INDEX).write_text("[" * 100_000), "JSON"),
    "a file cut short": (
        lambda path: (path / FILES[1]).write_bytes((path / FILES[1]).read_bytes()[:-1]), "damaged",
    ),
    "a flipped bit": (
        lambda path: (path / FILES[1]).write_bytes(
            (b := bytearray((path / FILES[1]).read_bytes()))[:-1] + bytes([b[-1] ^ 1])
        ),
        "checksum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_wrong_index_is_refused_and_nothing_changes(kind, sharded):
    path, _ = sharded
    change, message = HOSTILE[kind]
    change(path)
    ours = plain()
    before = [(name, id(part)) for name, part in ours.named_modules()]
    with pytest.raises(ValueError, match=message):
        mp.load_peft(ours, path)
    assert [(name, id(part)) for name, part in ours.named_modules()] == before


def pickled(path):
    """The same directory with pickled files alone: one, or several by an index."""
    for file in FILES:
        state = {k: nn.Parameter(v) for k, v in read_tensors(path / file).items()}
        torch.save(state, path / file.replace(".safetensors", ".bin"))
        (path / file).unlink()
    index = (path / INDEX).read_text().replace(".safetensors", ".bin")
    (path / "adapter_model.bin.index.json").write_text(index)
    (path / INDEX).unlink()


def test_a_pickled_file_of_tensors_loads(sharded):
    path, model = sharded
    tensors = {k: v for file in FILES for k, v in read_tensors(path / file).items()}
    for file in (*FILES, INDEX):
        (path / file).unlink()
    torch.save(tensors, path / "adapter_model.bin")
    ours = plain()
    assert mp.load_peft(ours, path) == ["0", "2"]
    (path / "adapter_model.bin").write_bytes(b"")  # nothing of the model lies in the file
    assert torch.equal(ours(X), model(X))


def test_several_pickled_files_load_by_their_index(sharded):
    path, model = sharded
    pickled(path)
    ours = plain()
    mp.load_peft(ours, path)
    assert torch.equal(ours(X), model(X))


@pytest.mark.parametrize("several", [False, True])
def test_safetensors_count_more_than_a_pickle(sharded, several):
    path, model = sharded
    if not several:
        mp.save_peft(model, path)
    torch.save({"x": torch.ones(1)}, path / "adapter_model.bin")
    ours = plain()
    mp.load_peft(ours, path)
    assert torch.equal(ours(X), model(X))


def test_an_index_of_pickles_names_pickles_alone(sharded):
    path, _ = sharded
    safe = (path / FILES[0]).read_bytes()
    pickled(path)
    (path / FILES[0]).write_bytes(safe)
    index = path / "adapter_model.bin.index.json"
    index.write_text(index.read_text().replace("00001-of-00002.bin", "00001-of-00002.safetensors"))
    with pytest.raises(ValueError, match=r"expected the name of a \.bin file"):
        mp.load_peft(plain(), path)


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("state", [{"a": Code()}, plain(), {"a": {"b": X}}, b"not a pickle", b""])
def test_a_pickle_of_more_than_tensors_is_refused_and_nothing_changes(sharded, state, capsys):
    path, _ = sharded
    for file in (*FILES, INDEX):
        (path / file).unlink()
    if isinstance(state, bytes):
        (path / "adapter_model.bin").write_bytes(state)
    else:
        torch.save(state, path / "adapter_model.bin")
    ours = plain()
    before = [(name, id(part)) for name, part in ours.named_modules()]
    with pytest.raises(ValueError, match=r"adapter_model\.bin: "):
        mp.load_peft(ours, path)
    assert [(name, id(part)) for name, part in ours.named_modules()] == before
    assert not capsys.readouterr().out
