"""Pickled tensors: what is read is equal, what is no flat dictionary of tensors is refused."""

import argparse
import collections
import io
import pickle
import random
import warnings
import zipfile

import pytest
import torch
from torch import nn

from minipeft.io.pickled import PickledFile, read_pickled
from minipeft.io.shards import Reader

NUMBERS = torch.arange(12.0)
BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def write(path, state, zipped=True):
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def same(one, other):
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


@BOTH
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_tensors_and_parameters_of_every_dtype_are_read(tmp_path, zipped, suffix):
    state = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
                      torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    }  # fmt: skip
    state |= {
        "none": torch.zeros(0, 3),
        "number": torch.tensor(2.5),
        "turned": NUMBERS.clone().view(3, 4).T,
    }
    saved = collections.OrderedDict(state, parameter=nn.Parameter(NUMBERS))
    path = write(tmp_path / f"a{suffix}", saved, zipped)
    state["parameter"] = NUMBERS
    found = read_pickled(path)
    assert same(found, state) and not any(value.requires_grad for value in found.values())
    with Reader([path]) as reader:
        assert same({name: reader.read(name) for name in reader.specs}, state)
        assert same({name: reader.view(name) for name in reader.specs}, state)


@BOTH
def test_what_is_read_needs_the_file_no_more(tmp_path, zipped):
    path = write(tmp_path / "a.bin", {"a": NUMBERS}, zipped)
    found = read_pickled(path)
    path.write_bytes(b"")
    assert torch.equal(found["a"], NUMBERS)


def test_a_state_dict_of_a_module_is_read(tmp_path):
    state = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()  # has _metadata
    assert same(read_pickled(write(tmp_path / "a.bin", state)), dict(state))


@BOTH
def test_names_of_one_tensor_and_views_side_by_side_are_read(tmp_path, zipped):
    state = {"a": NUMBERS, "tied": NUMBERS}
    found = read_pickled(write(tmp_path / "tied.bin", state, zipped))
    assert same(found, state) and found["a"].data_ptr() == found["tied"].data_ptr()
    state = {"a": NUMBERS[:5], "b": NUMBERS[5:]}
    found = read_pickled(write(tmp_path / "beside.bin", state, zipped))
    assert same(found, state) and found["a"].untyped_storage().nbytes() == 20


@BOTH
def test_the_tensors_of_one_entry_are_read_beside_a_namespace(tmp_path, zipped):
    """SwissArmyTransformer's form."""
    saved = {"module": {"a": NUMBERS}, "args": argparse.Namespace(layers=[1, 2], name="glm")}
    path = write(tmp_path / "mp_rank_00_model_states.pt", saved, zipped)
    assert same(read_pickled(path, entry="module"), {"a": NUMBERS})
    with pytest.raises(ValueError, match=r"'module' is a dict; .*entry='module'"):
        read_pickled(path)
    with pytest.raises(ValueError, match="holds a Namespace; expected a dictionary"):
        read_pickled(path, entry="args")
    with pytest.raises(ValueError, match=r"no entry 'model'; it has .*module"):
        read_pickled(path, entry="model")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Code:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("RUN",)


def quantised():
    scale = torch._make_per_tensor_quantized_tensor(torch.ones(3, dtype=torch.int8), 0.1, 0)
    return {"a": scale}


HOSTILE = {
    "code": (lambda: {"a": Code()}, "asks for .*print.*could run code"),
    "code beside tensors": (lambda: {"a": NUMBERS, "b": Code()}, "could run code"),
    "a module": (lambda: nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear"),
    "a module inside": (lambda: {"a": nn.Linear(2, 2)}, "asks for torch.nn"),
    "a number": (lambda: {"a": NUMBERS, "b": 3}, "'b' is a int"),
    "a text": (lambda: {"a": "b"}, "'a' is a str"),
    "a list": (lambda: [NUMBERS], "holds a list"),
    "a list inside": (lambda: {"a": [NUMBERS]}, "'a' is a list"),
    "a tensor": (lambda: NUMBERS, "holds a Tensor"),
    "a number as name": (lambda: {1: NUMBERS}, "1 is a Tensor; expected names"),
    "dictionaries": (lambda: {"a": {"b": NUMBERS}}, "'a' is a dict.*entry='a'"),
    "a set": (lambda: {"a": {1, 2}}, "'a' is a set"),
    "a Namespace": (lambda: argparse.Namespace(a=NUMBERS), "holds a Namespace"),
    "sparse": (lambda: {"a": NUMBERS.to_sparse()}, "a is nested or sparse"),
    "complex": (lambda: {"a": NUMBERS.to(torch.complex64)}, "complex64, which is not supported"),
    "no values": (lambda: {"a": torch.empty(3, device="meta")}, "no values: it is on meta"),
    "expanded": (lambda: {"a": torch.ones(1).expand(1000)}, "4000 bytes, and its storage 4"),
    "overlapping": (lambda: {"a": NUMBERS[:6], "b": NUMBERS[5:]}, "b shares memory with a"),
    "overlapping all": (lambda: {"a": NUMBERS, "b": NUMBERS[3:5]}, "b shares memory with a"),
    "turned": (
        lambda: {"a": NUMBERS.view(3, 4), "b": NUMBERS.view(3, 4).T}, "shares memory with",
    ),
    "other dtype": (lambda: {"a": NUMBERS, "b": NUMBERS.view(torch.int32)}, "shares memory|cannot"),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_flat_dictionary_of_tensors_is_refused(tmp_path, kind, zipped, capsys):
    make, message = HOSTILE[kind]
    try:
        path = write(tmp_path / "a.bin", make(), zipped)
    except RuntimeError:
        pytest.skip("this cannot be saved in that form")
    with pytest.raises(ValueError, match=message) as caught:
        read_pickled(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=message):
        PickledFile(path)
    assert "RUN" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # torch will give up its quantised tensors
@BOTH
def test_quantised_and_nested_tensors_are_refused(tmp_path, zipped):
    path = write(tmp_path / "a.bin", quantised(), zipped)
    with pytest.raises(ValueError, match="qint8, which is not supported"):
        read_pickled(path)
    nested = torch.nested.nested_tensor([NUMBERS, NUMBERS[:3]])
    path = write(tmp_path / "b.bin", {"a": nested}, zipped)
    with pytest.raises(ValueError, match=r"nested or sparse|cannot be read"):
        read_pickled(path)


def test_attributes_of_a_parameter_change_nothing(tmp_path):
    value = nn.Parameter(NUMBERS.clone())
    value.numel = value.stride = value.detach = "a text"
    assert same(read_pickled(write(tmp_path / "a.bin", {"a": value})), {"a": NUMBERS})


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_is_refused(tmp_path, protocol, capsys):
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(Code(), protocol))
    with pytest.raises(ValueError, match=r"a\.bin: "):
        read_pickled(path)
    assert "RUN" not in capsys.readouterr().out


def members(path):
    with zipfile.ZipFile(path) as found:
        return {m.filename: found.read(m) for m in found.infolist()}


def zip_of(path, content, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", how) as file:
        for name, data in content.items():
            file.writestr(name, data)


def test_a_zip_that_torch_would_not_write_is_refused(tmp_path):
    path = write(tmp_path / "a.bin", {"a": NUMBERS, "b": NUMBERS + 1})
    content = members(path)
    zip_of(path, content, zipfile.ZIP_DEFLATED)  # some bytes could become many GiB
    with pytest.raises(ValueError, match="is compressed"):
        read_pickled(path)
    zip_of(path, content)
    assert same(read_pickled(path), {"a": NUMBERS, "b": NUMBERS + 1})
    zip_of(path, {n: data[:4] if n.endswith("data/1") else data for n, data in content.items()})
    with pytest.raises(ValueError, match=r"tensors of 96 bytes, and 52 in"):
        read_pickled(path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
        warnings.simplefilter("ignore")  # of a name that comes twice
        for name, data in [*content.items(), *content.items()]:
            file.writestr(name, data)
    with pytest.raises(ValueError, match="a name comes twice"):
        read_pickled(path)


@BOTH
def test_a_file_cut_short_anywhere_is_refused(tmp_path, zipped):
    path = write(tmp_path / "a.bin", {"a": NUMBERS, "b": torch.ones(70, 3)}, zipped)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.bin: "):
            read_pickled(path)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """The zip's checksums; files from before torch 1.6 have none."""
    state = {f"layers.{i}.weight": torch.randn(7, 5) for i in range(4)}
    whole = bytearray(write(tmp_path / "a.bin", state).read_bytes())
    draw, refused = random.Random(0), 0
    for _ in range(400):
        bit = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.bin").write_bytes(damaged)
        try:
            assert same(read_pickled(tmp_path / "a.bin"), state), bit
        except ValueError:
            refused += 1
    print(f"\n400 flipped bits: {refused} refused, {400 - refused} without effect")
    assert refused > 100


def test_a_zip_whose_directory_leads_beyond_the_file_is_refused(tmp_path):
    """zipfile ends in an EOFError there."""
    path = write(tmp_path / "a.bin", {"a": NUMBERS})
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\x01\x02")  # the last entry of the directory
    data[start + 20 : start + 28] = 2 * (10**6).to_bytes(4, "little")  # its sizes
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.bin: cut short or damaged \(\w"):
        read_pickled(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.bin: no such file"):
        read_pickled(tmp_path / "nowhere.bin")


def test_a_file_that_is_changed_while_it_is_read_is_noticed(tmp_path):
    large = torch.zeros(3 * 2**20)  # more than is kept of one mapping
    path = write(tmp_path / "a.bin", {"a": large, "b": large + 1})
    with Reader([path]) as reader:
        assert torch.equal(reader.view("a"), large)
        assert torch.equal(reader.view("b"), large + 1)
        buffer = io.BytesIO()
        torch.save({"a": NUMBERS}, buffer)
        path.unlink()
        path.write_bytes(buffer.getvalue())
        with pytest.raises(ValueError, match="was changed while it was read"):
            reader.view("a")


def test_a_folder_is_not_called_damaged(tmp_path):
    with pytest.raises(ValueError, match=r": Is a directory; expected a file") as caught:
        read_pickled(tmp_path)
    assert "damaged" not in str(caught.value)
