"""Models sharded on the meta device: each process reads its own rows, all agree or all refuse."""

import json
import socket

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io.bitsandbytes import save_quantized
from tests.io.bitsandbytes.test_load import Small

SCRIPT = """
import datetime, json, os, sys
import torch, torch.distributed as dist, torch.multiprocessing as mp_
from torch import nn
from torch.distributed.fsdp import fully_shard
import minipeft as mp
from tests.gloo import leave
from tests.io.bitsandbytes.test_sharded_load import Uneven, prepared

FOLDER, WORLD = os.environ["FOLDER"], int(os.environ["WORLD"])

def sharded(kind, root=True, nf4=None):
    model = prepared(kind, nf4)
    for name in model.blocks:
        fully_shard(model.get_submodule(name))
    if root:
        fully_shard(model)
    return model

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def refused(model, path, **options):
    before = {n: id(p) for n, p in model.named_parameters()}
    try:
        mp.load_quantized(model, path, **options)
    except ValueError as error:
        assert {n: id(p) for n, p in model.named_parameters()} == before
        assert all(p.is_meta for p in model.parameters())
        return str(error)
    raise AssertionError("accepted")

WORK

def start(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=patience)
    found = work(rank)
    every = [None] * WORLD
    dist.all_gather_object(every, found)
    if rank == 0:
        print(json.dumps(every), flush=True)
    leave()

if __name__ == "__main__":
    mp_.spawn(start, (os.environ["FREE_PORT"],), nprocs=WORLD)
"""


class Even(nn.Module):
    """Two blocks whose rows two processes share equally."""

    blocks = ("first", "second")
    targets = ("first", "second")

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


class Uneven(Small):
    """Rows that no two processes share equally, flat codes, a tie, a table, statistics."""

    blocks = ("a", "b", "c", "norm")
    targets = ("a", "b", "c")

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 65)
        self.b = nn.Linear(65, 7)

    def forward(self, rows):
        return super().forward(rows)


KINDS = {"even": Even, "uneven": Uneven}


def prepared(kind, nf4=None):
    """On the meta device and injected, not yet sharded."""
    with torch.device("meta"):
        model = KINDS[kind]()
    mp.inject_qlora(model, list(model.targets), 3, **(nf4 or {}))
    return model.eval()


def written(kind, folder, nf4=None, seed=0, **settings):
    """A checkpoint of such a model."""
    torch.manual_seed(seed)
    model = KINDS[kind]().eval()
    mp.quantize_model(model, **(nf4 or {}))
    save_quantized(model, folder, **settings)


def processes(plain_python, folder, work, world=2):
    """Run `work(rank)` in so many processes; what each returned."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    script = SCRIPT.replace("WORK\n", work, 1)
    printed = plain_python(
        script, FREE_PORT=port, FOLDER=str(folder), WORLD=str(world), OMP_NUM_THREADS="1"
    )
    return json.loads(printed.strip().splitlines()[-1])


EQUAL = """
def work(rank):
    kind, nf4, mapped = CASE
    plain = prepared(kind, nf4)
    torch.manual_seed(1)
    names = mp.load_quantized(plain, FOLDER)
    model = sharded(kind, nf4=nf4)
    torch.manual_seed(1 + 4 * rank)  # the second process would draw other numbers
    mine = torch.get_rng_state()
    assert mp.load_quantized(model, FOLDER, mapped=mapped) == names
    assert rank == 0 or torch.equal(mine, torch.get_rng_state())
    expected, found = plain.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.dtype == found[name].dtype, name
        assert torch.equal(whole(found[name]), value), name
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    torch.manual_seed(0)  # the same rows in all processes
    x = torch.randn(5, 64) if kind == "even" else torch.tensor([3, 1, 4])
    torch.manual_seed(0)
    assert torch.equal(plain(x), model(x))
    for one in (plain, model):
        for p in mp.adapter_parameters(one):
            if p.shape[1] == 3: nn.init.ones_(p)
        one(x).square().mean().backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        if p.requires_grad:
            off = (whole(q.grad) - p.grad).abs().max() / p.grad.abs().max()
            assert off <= 1e-6, (name, off)  # float32; two equal gradients and their mean
    stored = [p.to_local().nbytes for p in model.parameters() if p.dtype == torch.uint8]
    total = [p.nbytes for p in plain.parameters() if p.dtype == torch.uint8]
    return [sum(stored), sum(total)]
"""


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("kind", "world", "double_quant"),
    [("even", 2, True), ("uneven", 2, True), ("uneven", 2, False), ("uneven", 3, True)],
)
def test_shards_are_equal_to_one_processs_model(
    plain_python, tmp_path, kind, world, double_quant, mapped
):
    nf4 = {"double_quant": double_quant}
    written(kind, tmp_path / "four", nf4, max_shard_bytes=3000)
    case = f"CASE = {(kind, nf4, mapped)!r}\n"
    found = processes(plain_python, tmp_path / "four", case + EQUAL, world)
    own, total = zip(*found, strict=True)
    assert sum(own) == total[0]  # each byte is in one process
    if kind == "even":
        assert own[0] == own[1]


REFUSALS = """
def work(rank):
    said = {}
    good = FOLDER + "/good"
    at = lambda name: good if rank == 0 else FOLDER + "/" + name
    said["other settings"] = refused(sharded("uneven"), at("single"))
    said["cut short"] = refused(sharded("uneven"), at("short"))
    said["not there"] = refused(sharded("uneven"), at("nowhere"))
    said["another"] = refused(sharded("uneven"), at("another"))
    said["wrong for all"] = refused(sharded("even"), good)
    said["options"] = refused(sharded("uneven"), good, dtype=None if rank else torch.bfloat16)
    said["unmapped"] = refused(sharded("uneven"), good, mmap=rank == 0)
    half = sharded("uneven")
    half = half.to_empty(device="cpu") if rank else half
    try:
        mp.load_quantized(half, good)
    except ValueError as error:
        said["one has values"] = str(error)
    with torch.device("meta"):
        dense = Uneven()
    for name in Uneven.blocks:
        fully_shard(dense.get_submodule(name))
    said["dense"] = refused(fully_shard(dense), good)
    with torch.device("meta"):
        dora = Uneven()
    mp.inject_qlora(dora, ["a"], 3, dora=True)
    said["dora"] = refused(fully_shard(dora), good)
    filled = sharded("uneven")
    mp.load_quantized(filled, good, verify=True)
    try:
        mp.load_quantized(filled, good)
    except ValueError as error:
        said["has values"] = str(error)
    said["damaged"] = refused(sharded("uneven"), FOLDER + "/damaged", verify=True)
    return said
"""


@pytest.mark.slow
def test_one_process_that_cannot_load_stops_all(plain_python, tmp_path):
    written("uneven", tmp_path / "good")
    written("uneven", tmp_path / "single", {"double_quant": False})
    written("uneven", tmp_path / "another", seed=1)
    for name in ("short", "damaged"):
        written("uneven", tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data[:-100] if name == "short" else data)
    first, second = processes(plain_python, tmp_path, REFUSALS)
    assert "rank 1 could not load" in first["other settings"]
    assert "double_quant=False" in first["other settings"]
    assert "double_quant=False" in second["other settings"]
    assert "damaged safetensors file" in second["cut short"]
    assert "damaged safetensors file" in first["cut short"]
    assert "rank 1 could not load" in first["not there"]
    for said in (first, second):
        assert "have another checkpoint" in said["another"]
        assert "have another checkpoint" in said["options"]
        assert "the model has no module 'a'" in said["wrong for all"]
        assert "leave mmap=True" in said["unmapped"]
        assert "is sharded as a dense" in said["dense"]
        assert "DoRA" in said["dora"]
        assert "is sharded and has values" in said["has values"]
        assert "is sharded and has values" in said["one has values"]
        assert "differs from its checksum" in said["damaged"]


MEMORY = """
from benchmarks.larger_than_memory import drop_from_cache, field
import pathlib, threading

def work(rank):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4096, 8192, bias=False) for _ in range(8)))
    mp.quantize_model(model, head=())
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    dist.barrier()
    before, highest, over = field("self", "RssAnon"), [0], threading.Event()
    read = field("self", "read_bytes", "io")
    def sample():
        while not over.wait(0.002):
            highest[0] = max(highest[0], field("self", "RssAnon"))
    thread = threading.Thread(target=sample)
    thread.start()
    mp.load_quantized(model, FOLDER)
    over.set()
    thread.join()
    return [highest[0] - before, field("self", "RssAnon") - before,
            field("self", "read_bytes", "io") - read]
"""


@pytest.mark.slow
def test_a_process_holds_its_share_and_never_more(plain_python, tmp_path):
    """Anonymous memory while 128 MB of codes are loaded by two processes, sampled every 2 ms."""
    model = nn.Sequential(*(nn.Linear(4096, 8192, bias=False) for _ in range(8)))
    mp.quantize_model(model, head=())
    save_quantized(model, tmp_path / "four")
    total = sum(p.nbytes for p in model.parameters())
    for peak, after, _ in processes(plain_python, tmp_path / "four", MEMORY):
        assert 0.45 * total < after
        # half, and 16 MB of slack for the interpreter and what gloo keeps; a layer has 16 MB
        assert peak < 0.5 * total + 2**24
