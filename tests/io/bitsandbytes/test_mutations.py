"""Damaged checkpoints: each loads to equal values or raises ValueError, soon and in little memory.

A checkpoint that minipeft wrote has checksums, so any damage to values is found.  One that somebody
else wrote has none: there every damage to the structure is found, and no damage does harm.
"""

import json
import random
import resource
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io.bitsandbytes import load_quantized, save_quantized
from minipeft.io.shards import Reader

INDEX = "model.safetensors.index.json"
Files = dict[str, bytes]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.a = nn.Linear(64, 32, bias=False)
        self.b = nn.Linear(33, 5)


def load(directory: Path) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Model()
    load_quantized(model, directory)
    return model.state_dict()


def own_checkpoint(path: Path) -> Files:
    torch.manual_seed(0)
    model = Model().bfloat16()
    mp.quantize_model(model, head=())
    save_quantized(model, path, max_shard_bytes=2000)
    files = {p.name: p.read_bytes() for p in sorted(path.iterdir())}
    assert len(files) > 3
    return files


def foreign_checkpoint(path: Path) -> Files:
    """The same without checksums and without padding, as others write it."""
    from safetensors.torch import save

    files = own_checkpoint(path)
    for name in [n for n in files if n.endswith(".safetensors")]:
        with Reader([path / name]) as reader:
            tensors = {key: reader.read(key) for key in reader.specs}
        for key in [k for k in tensors if "quant_state" in k]:
            text = bytes(tensors[key].tolist()).rstrip()
            tensors[key] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        files[name] = save(tensors)
    return files


def bit(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def noise(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.choice([1, 2, 8, 64, 500]))
    return data[:start] + rng.randbytes(length) + data[start + length :]


def zeros(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.choice([4, 64, 500]))
    return data[:start] + bytes(length) + data[start + length :]


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def grown(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.choice([1, 8, 4096]))


def inserted(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.choice([1, 3, 64])) + data[start:]


def removed(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice([1, 3, 64]) :]


def swapped(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice([1, 8, 100])
    a, b = sorted(rng.sample(range(len(data) - size), 2))
    if b - a < size:
        return bit(rng, data)
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


BYTES: list[Callable[[random.Random, bytes], bytes]] = [
    bit, noise, zeros, cut, grown, inserted, removed, swapped,
]  # fmt: skip
HOSTILE = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, "", "x" * 5000, [], {}, [10**18] * 4,
    [[]] * 50,
]  # fmt: skip


def header_of(data: bytes) -> tuple[dict[str, dict[str, object]], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: object, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def lying_header(rng: random.Random, data: bytes, kinds: int = 6) -> bytes:
    """One field of one tensor's description, or a length, is something else.

    The first four kinds can never be true; another dtype or shape of the same size could be.
    """
    header, body = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    kind = rng.randrange(kinds)
    name = rng.choice(names)
    if kind == 0:
        return struct.pack("<Q", rng.choice([0, 1, 7, 2**20, 2**40, 2**63])) + data[8:]
    if kind == 1:
        header[name][rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(HOSTILE)
    elif kind == 2:
        header[name.swapcase()] = header.pop(name)
    elif kind == 3:
        del header[name]
    elif kind == 4:
        header[name]["dtype"] = rng.choice(["F16", "F32", "I8", "U8", "BF16", "F64", "XX"])
    else:
        header[name]["shape"] = rng.choice([[1], [2**62, 2], [64, 64], header[name]["shape"][::-1]])
    return with_header(header, body)


def lying_json(rng: random.Random, data: bytes) -> bytes:
    """A value of a JSON file is something else, or gone."""
    found = json.loads(data)
    place = found
    while isinstance(place, dict) and place:
        key = rng.choice(sorted(place))
        if isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if rng.random() < 0.3:
            del place[key]
        else:
            place[key] = rng.choice(HOSTILE)
        break
    return json.dumps(found).encode()


def mutated(rng: random.Random, files: Files) -> Files:
    """One random change; at times of a whole file."""
    name = rng.choice(sorted(files))
    data = files[name]
    kind = rng.random()
    if kind < 0.02:
        return {n: d for n, d in files.items() if n != name}
    if kind < 0.04:
        other = rng.choice(sorted(files))
        return {**files, name: files[other], other: data}
    if kind < 0.3 and name.endswith(".safetensors"):
        return {**files, name: lying_header(rng, data)}
    if kind < 0.5 and name.endswith(".json"):
        return {**files, name: lying_json(rng, data)}
    return {**files, name: rng.choice(BYTES)(rng, data)}


def put(directory: Path, before: Files, after: Files) -> None:
    for name in before.keys() - after.keys():
        (directory / name).unlink()
    for name, data in after.items():
        if before.get(name) is not data:
            (directory / name).write_bytes(data)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape
        and torch.equal(a[n].flatten().view(torch.uint8), b[n].flatten().view(torch.uint8))
        for n in a
    )  # fmt: skip


def outcomes(directory: Path, files: Files, cases: int) -> Counter[str]:
    """What `cases` mutations lead to; anything but ValueError goes through."""
    expected = load(directory)
    counts: Counter[str] = Counter()
    slowest, memory = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(cases):
        damaged = mutated(random.Random(seed), files)
        put(directory, files, damaged)
        start = time.perf_counter()
        try:
            counts["equal" if same(load(directory), expected) else "other values"] += 1
        except ValueError:
            counts["ValueError"] += 1
        slowest = max(slowest, time.perf_counter() - start)
        put(directory, damaged, files)
    counts["grown MB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024
    counts["slowest ms"] = round(slowest * 1000)
    return counts


def check_own(tmp_path: Path, cases: int) -> Counter[str]:
    counts = outcomes(tmp_path / "own", own_checkpoint(tmp_path / "own"), cases)
    assert counts["other values"] == 0
    assert counts["equal"] + counts["ValueError"] == cases
    assert counts["ValueError"] > cases / 2
    assert counts["grown MB"] < 200 and counts["slowest ms"] < 10_000  # a blow-up, a hang
    return counts


def check_foreign(tmp_path: Path, cases: int) -> Counter[str]:
    directory = tmp_path / "foreign"
    files = foreign_checkpoint(directory)
    put(directory, {}, files)
    counts = outcomes(directory, files, cases)
    assert counts["equal"] + counts["other values"] + counts["ValueError"] == cases
    assert counts["grown MB"] < 200 and counts["slowest ms"] < 10_000
    structural = 0
    for seed in range(cases // 5):
        rng = random.Random(seed)
        name = rng.choice([n for n in files if n.endswith(".safetensors")])
        kind = rng.choice(["cut", "header", "gone"])
        if kind == "gone":
            damaged = {n: d for n, d in files.items() if n != name}
        elif kind == "cut":
            damaged = {**files, name: cut(rng, files[name])}
        else:
            damaged = {**files, name: lying_header(rng, files[name], kinds=4)}
        put(directory, files, damaged)
        with pytest.raises(ValueError):
            load(directory)
        put(directory, damaged, files)
        structural += 1
    assert structural > cases // 10
    counts["structural, all raised"] = structural
    return counts


@pytest.mark.parametrize("check", [check_own, check_foreign])
def test_some_mutations(tmp_path, check):
    check(tmp_path, 300)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_own, check_foreign])
def test_ten_thousand_mutations(tmp_path, check, capsys):
    counts = check(tmp_path, 10_000)
    with capsys.disabled():
        print(f"\n10,000 mutations, {check.__name__}: {dict(counts)}")
