"""Models in several processes: what works on shards of fully_shard, and what refuses."""

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import minipeft as mp
from benchmarks import sharded
from benchmarks.processes import together
from minipeft.adapters.plain_names import PlainNames
from minipeft.adapters.sharded import is_sharded_module, own_class

# must compute on shards: the others may refuse
RIGHT = (
    "two steps", "adapter_state_dict", "load_adapter_state_dict", "save_peft", "save_pretrained",
    "load_base_state_dict", "count_parameters", "disable_adapters", "scale_adapters",
    "use_adapters", "remove",
)  # fmt: skip
REFUSED = ("use_adapters(rows=)", "combine_adapters", "merge", "inject_lora", "extend_vocabulary")


def check(found, method):
    wrong = {n: c["why"] for n, c in found["cells"].items() if c["verdict"] == "failed"}
    assert not wrong
    verdicts = {name: cell["verdict"] for name, cell in found["cells"].items()}
    right = {*RIGHT, *(("save_prefix",) if method.startswith("prefix") else ("load_peft",))}
    if found["engine"] == "DDP":
        right -= {"load_peft", "save_prefix", "save_pretrained"}
    assert {name: verdicts[name] for name in right & verdicts.keys()} == dict.fromkeys(
        right & verdicts.keys(), "right"
    )
    if found["engine"] == "FSDP2":
        # "-": the model in one process refuses too (merge, with a prefix alone)
        assert {verdicts[name] for name in REFUSED if name in verdicts} <= {"refused", "-"}
        for name in REFUSED:
            assert "shards (DTensor)" in found["cells"][name]["why"]


@pytest.fixture(scope="module")
def on_two():
    """One start of two processes for all methods: most of its time is importing transformers."""
    return {one["method"]: one for one in sharded.columns("FSDP2", 2, list(sharded.METHODS))}


@pytest.mark.slow
@pytest.mark.parametrize("method", sharded.METHODS)
def test_on_two_processes_every_function_is_right_or_refuses(method, on_two):
    check(on_two[method], method)


@pytest.mark.slow
def test_packed_weights_are_halved(on_two):
    found = on_two["QLoRA"]
    whole = found["packed_bytes_in_one_process"]
    assert whole > 0 and sum(found["packed_bytes"]) == whole
    # rows are halved; four bytes of each layer, the offset of its scales, need not be
    assert max(found["packed_bytes"]) <= 0.51 * whole


@pytest.mark.slow
def test_on_four_processes_too():
    for found in sharded.columns("FSDP2", 4, list(sharded.METHODS)):
        check(found, found["method"])


@pytest.mark.slow
def test_in_data_parallel_every_function_is_right_or_refuses():
    for found in sharded.columns("DDP", 2, ["LoRA", "QLoRA", "prefix"]):
        check(found, found["method"])


def each_in_turn(rank, world, folder):
    """All scenarios at the end of this file, in one pair of processes."""
    found = {}
    for name, (scenario, arguments) in SCENARIOS.items():
        given = [folder / argument if argument in PLACES else argument for argument in arguments]
        found[name] = sharded.tried(lambda: scenario(rank, world, *given))  # noqa: B023
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("scenarios")
    mp.save_peft(adapted(), place / "layouts")
    (place / "unwritable").write_text("no folder")
    return place


@pytest.fixture(scope="module")
def outcomes(folder):
    """{scenario: what each process returned or raised}."""
    found = together(2, each_in_turn, folder, seconds=240)
    assert not any(outcome.error for outcome in found), found
    return {name: [outcome.value[name] for outcome in found] for name in SCENARIOS}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def adapted(dtype=torch.float32):
    model = net(dtype)
    mp.inject_lora(model, ["0", "2"], rank=2)
    return model


def other_states(rank, world, case):
    """Each process loads a state; what the model has afterwards."""
    model = fully_shard(adapted())
    before = mp.adapter_state_dict(model)
    state = {name: torch.full_like(value, 0.5) for name, value in before.items()}
    if rank == 1 and case == "key":
        state["more"] = state.pop("0.lora_a")
    if rank == 1 and case == "shape":
        state["0.lora_a"] = torch.ones(3, 16)
    if rank == 1 and case == "value":
        state["2.lora_b"][0, 0] = 1.0
    if rank == 1 and case == "unread":
        state["more"] = torch.ones(1)
    text = ""
    try:
        mp.load_adapter_state_dict(model, state, strict=case != "unread")
    except ValueError as error:
        text = str(error)
    after = mp.adapter_state_dict(model)
    return text, all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("key", ["process 1 raised, so all processes stop here", "missing ['0.lora_a']"]),
        ("shape", ["process 1 raised, so all processes stop here", "has shape (3, 16)"]),
        ("value", ["2.lora_b: other values", "2.lora_b: other values"]),
        ("unread", ["", ""]),
    ],
)
def test_processes_that_give_different_states_all_refuse_them(case, messages, outcomes):
    for outcome, message in zip(outcomes[case], messages, strict=True):
        text, unchanged = outcome.value
        assert message in text and bool(text) == bool(message)
        assert unchanged == (case != "unread")


def shards_as_values(rank, world):
    """State of torch's own: shards that are cut as the model's, and as no parameter of it."""
    model, source = fully_shard(adapted()), fully_shard(adapted())
    with torch.no_grad():
        for parameter in mp.adapter_parameters(source):
            parameter.fill_(0.25)
    state = {name: p for name, p in source.state_dict().items() if "lora_" in name}
    mp.load_adapter_state_dict(model, state)
    values = mp.adapter_state_dict(model).values()
    texts = []
    for target, name, value in (
        (model, "0.lora_a", state["0.lora_a"].redistribute(placements=_replicate())),
        (adapted(), "0.lora_a", state["0.lora_a"]),
    ):
        try:
            mp.load_adapter_state_dict(target, {name: value}, strict=False)
        except ValueError as error:
            texts.append(str(error))
    return bool(all((value == 0.25).all() for value in values)), texts


def _replicate():
    from torch.distributed.tensor import Replicate

    return [Replicate()]


def test_shards_are_taken_where_they_are_cut_alike(outcomes):
    for outcome in outcomes["shards_as_values"]:
        right, texts = outcome.value
        assert right
        assert "is cut as" in texts[0] and "value.full_tensor()" in texts[0]
        assert "is a shard (DTensor), and the model's is whole" in texts[1]


def left_alone(rank, world):
    """The last process dies; the others save."""
    model = fully_shard(adapted())
    mp.adapter_state_dict(model)
    if rank == world - 1:
        os._exit(1)
    start = time.monotonic()
    try:
        mp.adapter_state_dict(model)
    except RuntimeError as error:
        return time.monotonic() - start, str(error)
    return None


def test_a_process_that_dies_lets_the_others_stop_with_a_message():
    found = together(2, left_alone, seconds=60)
    assert found[1].error == "gone"
    seconds, text = found[0].value
    assert seconds < 30 and "Connection" in text  # gloo: "Connection closed by peer", or reset


def one_that_cannot_write(rank, world, folder):
    model = fully_shard(adapted())
    try:
        mp.save_peft(model, folder)
    except OSError as error:
        return str(error)
    return None


def test_an_error_of_the_process_that_writes_is_raised_in_all(outcomes, folder):
    first, second = outcomes["unwritable"]
    assert first.value is not None and "process 0 raised" in second.value
    assert (folder / "unwritable").read_text() == "no folder"


def renamed(rank, world):
    """fully_shard of the adapter layers themselves; of what holds a child called `module`."""
    model = adapted()
    fully_shard(model[0])
    fully_shard(model)
    kinds = [type(model[0]).__name__, own_class(model[0]).__name__]
    texts = []
    for call in (
        lambda: mp.remove(model),
        lambda: mp.use_adapters(model, rows=["default"]),
        lambda: mp.combine_adapters(model, ["default"], [1.0], new_name="new"),
        lambda: mp.replace_adapter(model, "default", {}),
    ):
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    mp.use_adapters(model, "default")

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = adapted()

    holder = fully_shard(Holder())
    names = [PlainNames(holder).plain("module.0"), *mp.adapter_state_dict(holder)]
    return kinds, texts, names


def test_layers_that_fully_shard_renamed_are_known(outcomes):
    for outcome in outcomes["renamed"]:
        kinds, texts, names = outcome.value
        assert kinds == ["FSDPLoRALinear", "LoRALinear"]
        assert "fully_shard was called on 0 itself" in texts[0]
        assert len(texts) == 4 and all("shards (DTensor)" in text for text in texts[1:])
        assert names[:2] == ["module.0", "module.0.lora_a"]


def after_a_forward(rank, world, folder):
    """After a forward without gradients the outermost module holds whole parameters."""
    model = fully_shard(adapted())
    with torch.no_grad():
        model(torch.ones(1, 16))
    whole = not hasattr(model[0].lora_a, "to_local")
    state = mp.adapter_state_dict(model)
    with torch.no_grad():
        model(torch.ones(1, 16))
    mp.load_adapter_state_dict(model, {n: torch.full_like(t, 0.5) for n, t in state.items()})
    with torch.no_grad():
        model(torch.ones(1, 16))
    texts = []
    for call in (lambda: mp.inject_lora(model, ["0"], rank=1, name="new"), lambda: mp.merge(model)):
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    mp.save_peft(model, folder)
    return whole, {n: float(t.mean()) for n, t in mp.adapter_state_dict(model).items()}, texts


def test_parameters_that_a_forward_left_whole_are_shards_all_the_same(outcomes, folder):
    for outcome in outcomes["forward"]:
        whole, means, texts = outcome.value
        assert whole and set(means.values()) == {0.5}
        assert len(texts) == 2 and all("shards (DTensor)" in text for text in texts)
    again = net()
    mp.load_peft(again, folder / "forward")
    assert all((value == 0.5).all() for value in mp.adapter_parameters(again))


def other_layouts(rank, world, folder):
    """load_peft into layers of another rank, scaling or kind, and into others than the file's."""
    texts = []
    for make in (
        lambda m: mp.inject_lora(m, ["0", "2"], rank=3),
        lambda m: mp.inject_lora(m, ["0", "2"], rank=2, alpha=4),
        lambda m: mp.inject_lora(m, ["0", "2"], rank=2, dora=True),
        lambda m: mp.inject_lora(m, ["0"], rank=2),
        lambda m: mp.inject_lora(m, ["0", "2"], rank=2, init=mp.starts.pissa()),
        lambda m: mp.inject_lora(m, ["0", "2"], rank=2, name="other"),
        lambda m: mp.inject_lora(m, ["0", "2"], rank=2, dropout=0.25),
        merged_lora,
    ):
        model = net()
        make(model)
        fully_shard(model)
        try:
            mp.load_peft(model, folder)
        except ValueError as error:
            texts.append(str(error))
    return texts


def merged_lora(model):
    mp.inject_lora(model, ["0", "2"], rank=2)
    mp.merge(model.eval())


def test_a_file_of_other_layers_is_refused_and_says_to_load_it_first(outcomes):
    for outcome in outcomes["layouts"]:
        assert len(outcome.value) == 8
        assert "is merged; call minipeft.unmerge" in outcome.value[-1]
        others = outcome.value[:-1]
        assert all("shards (DTensor)" in t and "then fully_shard" in t for t in others)
        assert "LoRA of rank 2, scaling 1 and dropout 0" in outcome.value[0]
        assert "the model LoRA of rank 2, scaling 2 and dropout 0" in outcome.value[1]
        assert "the model LoRA of rank 2, scaling 1 and dropout 0.25" in outcome.value[6]


def gathered_by_hand(rank, world, folder):
    """state_dict=: nothing is gathered, and only the process that writes calls save_peft."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = fully_shard(adapted())
    state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    text = ""
    if rank == 0:
        mp.save_peft(model, folder, state_dict=state)
        del state["0.lora_a"]
        try:
            mp.save_peft(model, folder, state_dict=state)
        except ValueError as error:
            text = str(error)
    dist.barrier()
    return text


def test_values_that_were_gathered_elsewhere_are_written_by_one_process(outcomes, folder):
    first, second = outcomes["by_hand"]
    assert "0.lora_a is a shard" in first.value and second.value == ""
    again, source = net(), adapted()
    mp.load_peft(again, folder / "by_hand")
    pairs = zip(mp.adapter_parameters(again), mp.adapter_parameters(source), strict=True)
    assert all(torch.equal(mine, its) for mine, its in pairs)


def mixed_dtypes(rank, world):
    """float32 adapters over bfloat16 modules in one group, and adapters of two dtypes."""
    model = fully_shard(adapted(torch.bfloat16))
    model(torch.ones(2, 16, dtype=torch.bfloat16)).float().sum().backward()
    trained = mp.check_gradients(model)
    other = adapted(torch.bfloat16)
    mp.inject_lora(other, ["0"], rank=2, name="half", dtype=torch.bfloat16)
    fully_shard(other)
    try:
        other(torch.ones(2, 16, dtype=torch.bfloat16))
    except AssertionError as error:
        return trained, str(error)
    return trained, ""


def test_float32_adapters_train_beside_16_bit_modules_in_one_group(outcomes):
    """torch asks for one dtype of all that trains in a group, and the base does not train."""
    for outcome in outcomes["mixed_dtypes"]:
        trained, text = outcome.value
        assert trained == 4
        assert "uniform original parameter dtype" in text


def two_adapters(rank, world, finds):
    """Three steps with "a" on, then three with "b"; the twin has the batches of all."""
    torch.manual_seed(0)
    x = torch.randn(world, 5, 16)

    def make():
        model = net()
        for name in ("a", "b"):
            mp.inject_lora(model, ["0", "2"], rank=2, name=name)
        return model

    def train(model, name, batches):
        optimizer = optimizers[id(model), name]
        for _ in range(3):
            optimizer.zero_grad()
            for batch in batches:
                (model(batch).square().mean() / len(batches)).backward()
            optimizer.step()

    model = nn.parallel.DistributedDataParallel(make(), find_unused_parameters=finds)
    twin = make()
    optimizers = {
        (id(m), n): torch.optim.AdamW(list(mp.adapter_parameters(m, name=n)), lr=0.01)
        for m in (model, twin) for n in ("a", "b")
    }  # fmt: skip
    for name in ("a", "b", "a"):
        mp.use_adapters(model, name)
        mp.use_adapters(twin, name)
        train(model, name, [x[rank]])
        train(twin, name, list(x))
    mine, its = (
        torch.cat([t.flatten() for t in mp.adapter_state_dict(m).values()]) for m in (model, twin)
    )
    return float((mine - its).abs().max() / its.abs().max())


def test_in_data_parallel_adapters_are_switched_between_steps(outcomes):
    for outcome in outcomes["switched"]:
        # float32 sums in another order; AdamW divides by their roots
        assert outcome.error == "" and outcome.value <= 1e-4


def test_data_parallel_that_would_wait_for_what_is_off_is_refused_with_the_way_out(outcomes):
    for outcome in outcomes["waiting"]:
        assert outcome.error == "ValueError"
        assert "'b' would be off" in outcome.text
        assert "find_unused_parameters=True" in outcome.text


def frozen_before(rank, world):
    model = net()
    for name in ("a", "b"):
        mp.inject_lora(model, ["0", "2"], rank=2, name=name)
    for parameter in mp.adapter_parameters(model, name="b"):
        parameter.requires_grad_(False)
    model = nn.parallel.DistributedDataParallel(model)
    mp.use_adapters(model, "a")
    for _ in range(3):  # the second step is the one that would raise
        model(torch.ones(2, 16)).sum().backward()
    return mp.check_gradients(model)


def test_what_is_frozen_before_is_not_waited_for(outcomes):
    for outcome in outcomes["frozen_before"]:
        assert (outcome.error, outcome.value) == ("", 4)


def test_without_torch_distributed_nothing_is_a_shard():
    model = adapted()
    assert not is_sharded_module(model) and own_class(model[0]) is mp.LoRALinear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp.load_adapter_state_dict(model, mp.adapter_state_dict(model))


PLACES = ("unwritable", "forward", "layouts", "by_hand")  # in the folder of the scenarios
SCENARIOS = {
    **{case: (other_states, (case,)) for case in ("key", "shape", "value", "unread")},
    "shards_as_values": (shards_as_values, ()),
    "unwritable": (one_that_cannot_write, ("unwritable",)),
    "renamed": (renamed, ()),
    "forward": (after_a_forward, ("forward",)),
    "layouts": (other_layouts, ("layouts",)),
    "by_hand": (gathered_by_hand, ("by_hand",)),
    "mixed_dtypes": (mixed_dtypes, ()),
    "switched": (two_adapters, (True,)),
    "frozen_before": (frozen_before, ()),
    "waiting": (two_adapters, (False,)),
}
