"""Reading without mapping: the same numbers, the same refusals, one tensor in memory."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minipeft.io import header as header_module
from minipeft.io.bitsandbytes import load_quantized, quantize_checkpoint, save_quantized
from minipeft.io.header import DTYPES, UnmappedFile
from minipeft.io.shards import Reader
from minipeft.model.quantize import quantize_model

MAPS = Path("/proc/self/maps")


def some_tensors():
    found = {}
    for number, dtype in enumerate(DTYPES.values()):
        for shape in ((), (0,), (3, 0, 2), (1,), (7,), (5, 13)):
            most = 2 if dtype == torch.bool else 256
            bits = torch.randint(0, most, (*shape, dtype.itemsize), dtype=torch.uint8)
            found[f"{number}.{shape}"] = bits.view(dtype).reshape(shape)
    return found


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path):
    path, tensors = tmp_path / "a.safetensors", some_tensors()
    save_file(tensors, path, metadata={"format": "pt", "own": "words"})
    with Reader([path], mmap=False) as plain, Reader([path]) as mapped:
        assert plain.specs == mapped.specs
        for name, expected in load_file(path).items():
            for found in (plain.read(name), plain.view(name), mapped.read(name)):
                assert found.dtype == expected.dtype
                assert torch.equal(bytes_of(found), bytes_of(expected))
                assert found.shape == expected.shape
    file = UnmappedFile(path)
    assert file.metadata == {"format": "pt", "own": "words"}
    file.close()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.tied = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.tied.weight = self.embed.weight
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        self.register_buffer("steps", torch.arange(3))


def on_meta():
    with torch.device("meta"):
        return Model()


def checkpoint(path):
    path.mkdir()
    state = {k: v.bfloat16() for k, v in Model().state_dict().items() if k != "tied.weight"}
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def test_checkpoints_are_the_same_bytes_and_numbers(tmp_path):
    source = checkpoint(tmp_path / "source")
    for mmap in (True, False):
        quantize_checkpoint(
            source, tmp_path / str(mmap), model=on_meta(), head=(), max_shard_bytes=9000, mmap=mmap
        )
    files = {
        mmap: {p.name: p.read_bytes() for p in sorted((tmp_path / str(mmap)).iterdir())}
        for mmap in (True, False)
    }
    assert len(files[True]) > 3
    assert files[True] == files[False]
    loaded = []
    for mmap in (True, False):
        loaded.append(on_meta())
        load_quantized(loaded[-1], tmp_path / "True", mmap=mmap)
    one, other = (model.state_dict() for model in loaded)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert loaded[1].tied.weight is loaded[1].embed.weight


def mapped_files():
    return {line.split()[-1] for line in MAPS.read_text().splitlines() if "/" in line}


@pytest.mark.skipif(not MAPS.exists(), reason="Linux says which files are mapped")
@pytest.mark.parametrize("mmap", [True, False])
def test_nothing_is_mapped_while_a_checkpoint_is_read(tmp_path, mmap, monkeypatch):
    source, seen = checkpoint(tmp_path / "source"), []

    def look(self, name, real):
        seen.append({f for f in mapped_files() if f.startswith(str(tmp_path))})
        return real(self, name)

    for method in ("read", "view"):
        real = getattr(Reader, method)
        monkeypatch.setattr(Reader, method, lambda self, name, real=real: look(self, name, real))
    quantize_checkpoint(source, tmp_path / "made", model=on_meta(), head=(), mmap=mmap)
    load_quantized(on_meta(), tmp_path / "made", mmap=mmap)
    assert len(seen) > 20
    assert all(bool(files) == mmap for files in seen)  # the default maps: the look would see it


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path):
    model = Model()
    quantize_model(model, skip=["tied"], head=())
    save_quantized(model, tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="differs from its checksum"):
        load_quantized(on_meta(), tmp_path / "saved", mmap=False)


def test_a_file_that_becomes_shorter_is_told(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4000), "b": torch.ones(3)}, path)
    with Reader([path], mmap=False) as reader:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 100)
        with pytest.raises(ValueError, match=r"a.safetensors: \w cannot be read \(it ends"):
            [reader.read(name) for name in "ab"]


def test_files_are_closed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    with Reader([path], mmap=False) as reader:
        file = reader._files[path]._file
        assert not file.closed
    assert file.closed
    path.write_bytes(b"\x08")  # damaged: an error would leave it open, and warn
    with pytest.raises(ValueError, match=r"a.safetensors: damaged safetensors file"):
        Reader([path], mmap=False)


def written(header, data=b"\0" * 24):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(6,), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "empty": b"", "seven bytes": b"1234567", "longer than the file": (2**40).to_bytes(8, "little"),
    "the largest length": b"\xff" * 8, "no JSON": written(b"{nonsense"),
    "a list": written([1]), "leading space": written(b' {"a": 1}'),
    "nested": written(b'{"a":' + b"[" * 100_000), "no UTF-8": written(b'{"\xff": 1}'),
    "an offset beyond the file": written({"a": entry(shape=(7,), offsets=(0, 28))}),
    "a huge offset": written({"a": entry(shape=(2**60,), offsets=(0, 2**62))}),
    "a negative offset": written({"a": entry(offsets=(-24, 0))}),
    "backwards": written({"a": entry(shape=(0,), offsets=(24, 0))}),
    "overlapping": written({"a": entry(), "b": entry(shape=(1,), offsets=(20, 24))}),
    "a gap": written(
        {"a": entry(shape=(2,), offsets=(0, 8)), "b": entry(shape=(2,), offsets=(16, 24))}
    ),
    "bytes left over": written({"a": entry(shape=(5,), offsets=(0, 20))}),
    "a shape that does not fit": written({"a": entry(shape=(5,))}),
    "a negative shape": written({"a": entry(shape=(-2, -3))}),
    "a product that overflows": written({"a": entry(shape=(2**33, 2**33), offsets=(0, 24))}),
    "sizes that are no numbers": written({"a": entry(shape=("6",))}),
    "sizes with a point": written({"a": entry(shape=(6.0,))}),
    "sizes that are true": written({"a": entry("U8", (True,) * 3, (0, True))}),
    "three offsets": written({"a": entry(offsets=(0, 24, 24))}),
    "an unknown dtype": written({"a": entry("F31")}), "a dtype of lists": written({"a": entry([])}),
    "no offsets": written({"a": {"dtype": "F32", "shape": [6]}}),
    "metadata of numbers": written({"__metadata__": {"a": 1}, "b": entry()}),
    "metadata of a list": written({"__metadata__": [], "b": entry()}),
    "a name twice": written(
        b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)
    ),
    "thousands of axes": written({"a": entry(shape=(6, *(1,) * 5000))}),
    "digits without end": written(b'{"a":{"dtype":"F32","shape":[' + b"9" * 9000 + b"]}}"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_before_anything_is_read(lie, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(LIES[lie])
    monkeypatch.setattr(header_module.torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=r"a\.safetensors: damaged safetensors file"):
        Reader([path], mmap=False)


def test_what_is_accepted_is_what_safetensors_accepts(tmp_path):
    """Random edits of a header: never accepted here and refused there; the numbers are equal."""
    rng, path = random.Random(0), tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(5), "c": torch.zeros(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    accepted = 0
    for _ in range(1500):
        text = bytearray(whole[8 : 8 + length])
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(text))
            if rng.random() < 0.7:  # digits make sizes and offsets
                digits = [m.start() for m in re.finditer(rb"\d", bytes(text))]
                place = rng.choice(digits)
            text[place] = rng.choice(b'0123456789,"{}[]:abcF ')
        path.write_bytes(whole[:8] + bytes(text) + whole[8 + length :])
        try:
            file = UnmappedFile(path)
        except ValueError:
            continue
        accepted += 1
        with safe_open(path, framework="pt") as theirs:
            assert set(theirs.keys()) == set(file.specs)
            for name in file.specs:
                assert torch.equal(bytes_of(file.read(name)), bytes_of(theirs.get_tensor(name)))
        file.close()
    assert 20 < accepted < 1200
    assert issubclass(SafetensorError, Exception)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory as Linux counts it")
def test_one_tensor_is_in_memory_at_a_time(tmp_path, plain_python, capsys):
    # Each tensor gets pages of its own, which the system takes back when it is freed: glibc would
    # keep freed blocks after the first few, and how many depends on what else it has given out.
    pages_of_its_own = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    path, count, size = tmp_path / "a.safetensors", 16, 8 * 2**20
    names = {
        f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    text = json.dumps(names).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * size)
    grown = {}
    for mmap in (True, False):
        grown[mmap] = int(
            plain_python(
                f"""
import re
from pathlib import Path
from minipeft.io.shards import Reader

def peak():
    text = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+)", text)[1]) * 1024

with Reader([Path({str(path)!r})], mmap={mmap}) as reader:
    reader.read("t0")
    before = peak()
    for name in reader.specs:
        reader.read(name)
    print(peak() - before)
""",
                **pages_of_its_own,
            )
        )
    with capsys.disabled():
        print(f"\nmemory grows by {grown[False]:,} bytes over {count} tensors of {size:,}: "
              f"mapped {grown[True]:,}")  # fmt: skip
    assert grown[False] < size
