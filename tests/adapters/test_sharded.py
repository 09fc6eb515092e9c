"""Models that several processes share: which of them writes, and what they do when one fails."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import minipeft as mp
from benchmarks.processes import together
from minipeft.adapters.sharded import resharded
from minipeft.io.save_pretrained import save_adapters
from minipeft.io.shards import Reader

LIMIT = 300  # seconds, mostly for imports on a busy machine; a process that hangs runs into it


class Net(nn.Module):
    """A layer that is cut by rows, one that is cut by columns, and one that is only sharded."""

    def __init__(self):
        super().__init__()
        self.front = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.front(x))))


def adapted():
    torch.manual_seed(0)
    model = Net()
    mp.inject_lora(model, ["front", "up", "down"], rank=2)
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter)
    return model


def cut(model, layout):
    """The model on a mesh of 2 x 2 processes, in one of the three ways that torch knows."""
    if layout == "replicated shards":  # HSDP
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mp.parallelize(model, mesh["tp"], {"up": mp.ColwiseParallel(), "down": mp.RowwiseParallel()})
    if layout == "cut and sharded":  # `front` is on mesh["dp"] alone, and comes first
        fully_shard(model, mesh=mesh["dp"])
    if layout == "cut, with one layer sharded":  # no mesh has all four processes
        fully_shard(model.front, mesh=mesh["dp"])


LAYOUTS = ("replicated shards", "cut and sharded", "cut, with one layer sharded")


def saved_on_four(rank, world, folder):
    """For each layout: the meshes' sizes, and the tensors that every process gets.

    Each process names a folder of its own, so that it is seen who wrote.
    """
    found = {}
    for layout in LAYOUTS:
        model = adapted()
        cut(model, layout)
        mp.save_peft(model, folder / layout / str(rank))
        sizes = [mesh.size() for mesh in resharded(model)]
        found[layout] = (sizes, mp.adapter_state_dict(model))
    return found


def contents(folder):
    """All that a folder has; in a file's header, metadata are in no order."""
    with Reader([folder / "adapter_model.safetensors"]) as reader:
        tensors = {name: reader.read(name).tolist() for name in reader.specs}
        (metadata,) = reader.metadata.values()
    config = (folder / "adapter_config.json").read_text()
    return metadata, tensors, config, len(list(folder.iterdir()))


@pytest.mark.slow
def test_on_two_axes_one_process_writes_what_one_process_alone_would_write(tmp_path):
    outcomes = together(4, saved_on_four, tmp_path, seconds=LIMIT)
    assert not any(outcome.error for outcome in outcomes), outcomes
    mp.save_peft(adapted(), tmp_path / "alone")
    alone = mp.adapter_state_dict(adapted())
    sizes = {"replicated shards": [4], "cut and sharded": [2, 4],
             "cut, with one layer sharded": [2, 2]}  # fmt: skip
    for layout in LAYOUTS:
        assert [path.name for path in (tmp_path / layout).iterdir()] == ["0"]
        assert contents(tmp_path / layout / "0") == contents(tmp_path / "alone")
        for outcome in outcomes:
            of_meshes, state = outcome.value[layout]
            assert of_meshes == sizes[layout]
            assert state.keys() == alone.keys()
            assert all(torch.equal(value, alone[name]) for name, value in state.items())


def no_memory(*shape, own=torch.empty, **options):
    if options.get("dtype") is torch.float32:  # exchanging messages takes memory of bytes
        raise torch.OutOfMemoryError("no memory left here")
    return own(*shape, **options)


def no_room(*_, **__):
    raise MemoryError("no room here")


def fails_alone(rank, world, folder):
    """For each case: what this process heard when the second one failed; then all is well again."""
    found = {}
    model = fully_shard(adapted())
    state = mp.adapter_state_dict(model)
    other = fully_shard(Net() if rank else adapted())
    fewer = Net()
    mp.inject_lora(fewer, ["up", "down"] if rank else ["front", "up", "down"], rank=2)
    fewer = fully_shard(fewer)
    cases = {
        "gather": ("torch.empty", lambda: mp.adapter_state_dict(model)),
        "fewer: none": (None, lambda: mp.adapter_state_dict(other)),
        "fewer adapters": (None, lambda: mp.adapter_state_dict(fewer)),
        "fewer to save": (None, lambda: mp.save_peft(fewer, folder / "fewer")),
        "compare": (
            "minipeft.adapters.sharded._mark", lambda: mp.load_adapter_state_dict(model, state)
        ),
        "save": ("minipeft.io.gathering._written", lambda: mp.save_peft(model, folder / "peft")),
        "describe": (
            "minipeft.io.save_pretrained.describe", lambda: save_adapters(model, folder / "all")
        ),
        "in place": ("minipeft.io.gathering.nn.Parameter",
                     lambda: mp.save_peft(model, folder / "place")),
    }  # fmt: skip
    for case, (place, call) in cases.items():
        effect = no_memory if case == "gather" else no_room
        with mock.patch(place, effect) if place and rank else nullcontext():
            try:
                call()
                found[case] = ""
            except Exception as error:
                found[case] = f"{type(error).__name__}: {error}"
        again = mp.adapter_state_dict(model)
        assert all(torch.equal(again[name], value) for name, value in state.items())
    return found


def test_a_process_that_fails_alone_stops_the_others_with_its_number_and_words(tmp_path):
    first, second = together(2, fails_alone, tmp_path, seconds=LIMIT)
    assert not first.error and not second.error, (first, second)
    for case, text in first.value.items():
        if case.startswith("fewer"):
            assert "processes 0 and 1 have models with different parameters" in text, case
            assert text == second.value[case]
            continue
        words = "no memory left here" if case == "gather" else "no room here"
        assert text.startswith("ValueError") and words in text, (case, text)
        assert "process 1 raised, so all processes stop here" in text, (case, text)
        assert words in second.value[case] and "process 1" not in second.value[case]
    assert not list(tmp_path.iterdir())


def starts_on_shards(rank, world):
    """What each start says to layers of which this process has a part, and what it changed."""
    starts = {
        "pissa": mp.starts.pissa(), "few iterations": mp.starts.pissa(iterations=2),
        "olora": mp.starts.olora(), "orthogonal": mp.starts.orthogonal(),
    }  # fmt: skip
    mesh = init_device_mesh("cpu", (world,))
    texts = {}
    for how in ("sharded", "cut"):
        for four_bits in (False, True):
            model = nn.Sequential(nn.Linear(64, 64))
            dense = model[0].weight.detach().clone()
            if four_bits:
                mp.quantize_model(model, head=())
            mp.inject_lora(model, ["0"], rank=2)
            own = {**starts, "eva": lambda layer, m=model: mp.starts.eva(m, [torch.ones(4, 64)])}
            if four_bits:
                own["loftq"] = mp.starts.loftq().for_weight(dense)
            if how == "sharded":
                fully_shard(model)
            else:
                mp.parallelize(model, mesh, {"0": mp.ColwiseParallel()})
            before = mp.adapter_state_dict(model)
            for name, start in own.items():
                try:
                    start(model[0])
                    texts[how, four_bits, name] = "no error"
                except ValueError as error:
                    texts[how, four_bits, name] = str(error)
            after = mp.adapter_state_dict(model)
            assert all(torch.equal(after[n], value) for n, value in before.items())
    whole = nn.Sequential(nn.Linear(64, 64))
    weight = fully_shard(nn.Linear(64, 64)).weight
    try:
        mp.inject_qlora(
            whole, ["0"], rank=2, init=lambda x: mp.starts.loftq().for_weight(weight)(x)
        )
    except ValueError as error:
        texts["loftq of a shard"] = str(error)
    return texts


def test_starts_that_read_the_base_say_to_shard_afterwards():
    for outcome in together(2, starts_on_shards, seconds=LIMIT):
        assert not outcome.error, outcome
        assert "give weight.full_tensor()" in outcome.value.pop("loftq of a shard")
        assert len(outcome.value) == 2 * (5 + 6)
        for (_, _, name), text in outcome.value.items():
            caller = "pissa" if name == "few iterations" else name
            assert text.startswith(f"{caller}: the parameters of "), (name, text)
            assert "are shards (DTensor)" in text and "then shard or cut the model" in text
