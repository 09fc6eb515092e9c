"""A loop of one's own goes on from its saved state in every bit, and takes no other state."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minipeft as mp

RNG = np.random  # the global generator, which a loop may draw from


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64), nn.Linear(64, 8))


def lora(model=None, rank=4, **options):
    model = net() if model is None else model
    mp.inject_lora(model, ["0", "2"], rank=rank, dropout=0.2, **options)
    return model


def qlora():
    model = net()
    mp.quantize_model(model, head=())
    return lora(model)


def two():
    model = lora()
    mp.inject_lora(model, ["0"], rank=2, name="other")
    return model


def with_module_and_biases():
    model = net()
    model.insert(1, nn.BatchNorm1d(48))
    mp.inject_lora(model, ["0"], rank=2)
    mp.train_modules(model, ["1"])
    mp.train_biases(model)
    return model


class Wide(torch.optim.Optimizer):
    """Momentum in float32 and in float64, whatever the parameters are, in a list and alone."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-2})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            kept = self.state[parameter]
            if not kept:
                kept["wide"] = torch.zeros_like(parameter, dtype=torch.float32)
                kept["more"] = [torch.zeros_like(parameter, dtype=torch.float64)]
            for moment in (kept["wide"], kept["more"][0]):
                moment.mul_(0.9).add_(parameter.grad)
                parameter.data.add_(moment, alpha=-self.param_groups[0]["lr"])


METHODS = {
    "lora": lora,
    "dora": lambda: lora(dora=True),
    "qlora": qlora,
    "pissa": lambda: lora(init=mp.starts.pissa()),
    "two adapters": two,
    "module and biases": with_module_and_biases,
    "bfloat16": lambda: lora(dtype=torch.bfloat16),
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "rate as a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
}
SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=10),
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "warm-up, then cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.CosineAnnealingLR(o, 9)],
        milestones=[4],
    ),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
}  # fmt: skip


class Loop:
    """A training loop as a user writes it: data from torch's and numpy's generators.

    Not from Python's: the checks of types that run in these tests draw from that one, so
    test_pythons_generator_goes_on_too is a process without them.
    """

    def __init__(self, method="lora", optimizer="adamw", scheduler="cosine"):
        self.model = METHODS[method]()
        self.optimizer = OPTIMIZERS[optimizer](list(mp.adapter_parameters(self.model)))
        self.scheduler = SCHEDULERS[scheduler](self.optimizer) if scheduler else None
        self.losses = []

    def run(self, steps):
        self.model.train()
        for _ in range(steps):
            x = torch.randn(9, 64) + float(RNG.normal())
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            loss.backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.losses.append(loss.item())

    def save(self, folder, step):
        mp.save_training_state(
            folder, self.model, self.optimizer, step=step, scheduler=self.scheduler
        )

    def load(self, folder, **options):
        return mp.load_training_state(
            folder, self.model, self.optimizer, scheduler=self.scheduler, **options
        )

    def state(self):
        """Everything, as plain values and tensors."""
        found = {f"model.{k}": v.clone() for k, v in self.model.state_dict().items()}
        found["optimizer"] = copy.deepcopy(self.optimizer.state_dict())
        if self.scheduler is not None:
            found["scheduler"] = copy.deepcopy(self.scheduler.state_dict())
        found["torch"], found["numpy"] = torch.get_rng_state(), RNG.get_state()
        return found


def equal(a, b):
    """Whether two states are one: tensors in every bit, all else in value and type."""
    if isinstance(a, torch.Tensor | np.ndarray):
        return (
            type(a) is type(b)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and bool((a == b).all())
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def seed():
    torch.manual_seed(1)
    RNG.seed(1)


def check_resumed(tmp_path, *kind):
    seed()
    whole = Loop(*kind)
    whole.run(3)
    whole.save(tmp_path, 3)
    saved = whole.state()
    whole.run(3)

    torch.manual_seed(77)  # of a process that starts anew
    RNG.seed(77)
    again = Loop(*kind)
    assert not equal(again.state(), saved)
    assert again.load(tmp_path) == 3
    assert equal(again.state(), saved)
    again.run(3)
    assert again.losses == whole.losses[3:]
    assert equal(again.state(), whole.state())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_in_every_bit(method, tmp_path):
    check_resumed(tmp_path, method)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_goes_on_in_every_bit(optimizer, tmp_path):
    check_resumed(tmp_path, "lora", optimizer)


def test_moments_wider_than_their_parameters_keep_every_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "wide", Wide)
    check_resumed(tmp_path, "bfloat16", "wide")  # torch casts them to bfloat16 in a load


def test_transformers_adafactor_keeps_every_bit(tmp_path, monkeypatch):
    optimization = pytest.importorskip("transformers.optimization")
    monkeypatch.setitem(OPTIMIZERS, "its", lambda p: optimization.Adafactor(
        p, lr=1e-2, relative_step=False, beta1=0.9))  # fmt: skip
    check_resumed(tmp_path, "bfloat16", "its")


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, None])
def test_every_scheduler_goes_on_in_every_bit(scheduler, tmp_path):
    check_resumed(tmp_path, "lora", "sgd", scheduler)


def test_moments_follow_the_names_of_parameters_not_their_order(tmp_path):
    first = Loop(scheduler=None)
    first.run(2)
    first.save(tmp_path, 2)
    other = Loop(scheduler=None)
    turned = list(mp.adapter_parameters(other.model))[::-1]
    other.optimizer = OPTIMIZERS["adamw"](turned)
    assert other.load(tmp_path) == 2
    for (name, mine), its in zip(
        first.model.named_parameters(), other.model.parameters(), strict=True
    ):
        assert torch.equal(mine, its)
        if mine.requires_grad:
            a, b = first.optimizer.state[mine], other.optimizer.state[its]
            assert equal(a, b), name
    first.run(1)
    seed()


def test_a_compiled_wrapper_does_not_change_the_names(tmp_path):
    loop = Loop()
    loop.run(1)
    mp.save_training_state(
        tmp_path, torch.compile(loop.model), loop.optimizer, step=1, scheduler=loop.scheduler
    )
    assert Loop().load(tmp_path) == 1


def test_random_generators_may_be_left_alone(tmp_path):
    loop = Loop()
    loop.save(tmp_path, 0)
    torch.manual_seed(5)
    before = torch.get_rng_state(), RNG.get_state()
    loop.load(tmp_path, generators=False)
    assert equal(before, (torch.get_rng_state(), RNG.get_state()))


def test_pythons_generator_goes_on_too(plain_python, tmp_path):
    printed = plain_python(f"""
import random, torch, minipeft as mp
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
mp.inject_lora(model, ["0"], rank=2)
optimizer = torch.optim.SGD(mp.adapter_parameters(model), lr=1.0)
random.seed(3); random.gauss(0, 1)  # one more is kept by the generator
mp.save_training_state({str(tmp_path)!r}, model, optimizer, step=1)
drawn = [random.gauss(0, 1) for _ in range(700)]
mp.load_training_state({str(tmp_path)!r}, model, optimizer)
print(drawn == [random.gauss(0, 1) for _ in range(700)])
""")
    assert printed.strip() == "True"


def test_the_state_lies_beside_pefts_files_and_holds_no_pickle(tmp_path):
    loop = Loop()
    loop.run(1)
    mp.save_peft(loop.model, tmp_path)
    loop.save(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
        "training_state.json", "training_state.safetensors",
    ]  # fmt: skip
    assert json.loads((tmp_path / "training_state.json").read_text())["step"] == 1
    fresh = net()
    assert mp.load_peft(fresh, tmp_path) == ["0", "2"]


def refused(loop, folder, match, kind=ValueError):
    """The state is refused, and nothing of the loop has changed."""
    before = loop.state()
    with pytest.raises(kind, match=match):
        loop.load(folder)
    assert equal(loop.state(), before)


def with_groups(loop):
    a, *rest = mp.adapter_parameters(loop.model)
    loop.optimizer = torch.optim.AdamW([{"params": [a], "lr": 0.1}, {"params": rest}], amsgrad=True)
    return loop


def other_rank():
    loop = Loop(scheduler=None)
    loop.model = lora(rank=5)
    loop.optimizer = OPTIMIZERS["adamw"](list(mp.adapter_parameters(loop.model)))
    return loop


def other_alpha():
    loop = Loop(scheduler=None)
    loop.model = lora(alpha=9)
    loop.optimizer = OPTIMIZERS["adamw"](list(mp.adapter_parameters(loop.model)))
    return loop


def other_dtype():
    loop = Loop(scheduler=None)
    loop.model = lora(dtype=torch.bfloat16)
    loop.optimizer = OPTIMIZERS["adamw"](list(mp.adapter_parameters(loop.model)))
    return loop


def scaled():
    loop = Loop(scheduler=None)
    mp.scale_adapters(loop.model, 0.5)
    return loop


def switched_off():
    loop = Loop(scheduler=None)
    for adapter in (loop.model[0], loop.model[2]):
        adapter.enabled = False
    return loop


def fewer():
    loop = Loop(scheduler=None)
    loop.optimizer = OPTIMIZERS["adamw"](list(mp.adapter_parameters(loop.model))[1:])
    return loop


def merged():
    loop = Loop(scheduler=None)
    loop.model.eval()
    mp.merge(loop.model)
    return loop


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (other_rank, r"0\.lora_a is float32 \[4, 64\] there, and float32 \[5, 64\] in the model"),
        (other_alpha, r"adapter '0' has .*1\.0.* there, and .*2\.25.* here"),
        (other_dtype, r"0\.lora_a is float32 .* there, and bfloat16"),
        (scaled, r"'scale': 1\.0.*'scale': 0\.5.* here; scale_adapters\(model, 1\.0\)"),
        (switched_off, r"'enabled': True.*'enabled': False.* here; use_adapters\(model, names\)"),
        (lambda: Loop("two adapters", scheduler=None), "other names.*not in the file"),
        (lambda: Loop("pissa", scheduler=None), r"lora_a0.* not in the file .*another adapter"),
        (lambda: Loop(optimizer="sgd", scheduler=None), r"state of a torch.*AdamW; .*SGD"),
        (lambda: with_groups(Loop(scheduler=None)), "had 1 groups .* this one has 2"),
        (fewer, r"group 0 of the optimiser have other names: \['0.lora_a'\] are in the file alone"),
        (Loop, "was saved with no scheduler; here is .*Cosine"),
        (merged, "merged"),
    ],
)
def test_the_state_of_another_run_is_refused(make, match, tmp_path):
    first = Loop(scheduler=None)
    first.run(1)
    first.save(tmp_path, 1)
    refused(make(), tmp_path, match)


def test_a_scheduler_that_was_saved_must_be_passed(tmp_path):
    first = Loop()
    first.save(tmp_path, 0)
    refused(Loop(scheduler=None), tmp_path, "was saved with .*CosineAnnealingLR; here is none")
    refused(Loop(scheduler="cycle"), tmp_path, "CosineAnnealingLR; here is .*OneCycleLR")


def test_no_state_a_damaged_one_and_one_of_two_saves_are_refused(tmp_path):
    loop = Loop(scheduler=None)
    refused(loop, tmp_path, "no such file; expected a directory that save_training_state wrote")
    for name, steps in (("a", 1), ("b", 2)):
        loop.run(1)
        loop.save(tmp_path / name, steps)
    mixed = tmp_path / "b" / "training_state.json"
    whole = mixed.read_bytes()
    mixed.write_bytes((tmp_path / "a" / "training_state.json").read_bytes())
    refused(loop, tmp_path / "b", "they are of two saves, or the configuration was edited")
    mixed.write_bytes(whole)
    assert loop.load(tmp_path / "b") == 2
    weights = tmp_path / "b" / "training_state.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(loop, tmp_path / "b", "differs from its checksum")


@pytest.mark.parametrize(("method", "optimizer"), [("lora", "adamw"), ("bfloat16", "wide")])
def test_a_scheduler_that_fails_leaves_the_optimiser_as_it_was(
    method, optimizer, tmp_path, monkeypatch
):
    class Odd:
        def state_dict(self):
            return {"a": 1}

        def load_state_dict(self, state):
            if state == {"a": 1}:
                raise RuntimeError("not today")

    monkeypatch.setitem(OPTIMIZERS, "wide", Wide)
    loop = Loop(method, optimizer, scheduler=None)
    loop.scheduler = Odd()
    loop.scheduler.step = lambda: None
    loop.run(1)
    loop.save(tmp_path, 1)
    loop.run(1)
    before = equal(loop.state(), loop.state())
    assert before
    now = copy.deepcopy(loop.optimizer.state_dict())
    with pytest.raises(RuntimeError, match="not today"):
        loop.load(tmp_path)
    assert equal(loop.optimizer.state_dict(), now)


def pairs(packed):
    """The pairs of a packed dict, by their keys; a change of one changes the file's content."""
    return {pair[0]: pair for pair in packed["dict"]}


def moments_of(config):
    """The packed moments of the first factor."""
    return pairs(config["optimizer"]["state"])["0.lora_a"][1]


def shape_of_a_moment(config, tensors):
    tensors["optimizer/0.lora_a/exp_avg"] = torch.zeros(5, 5)


def whole_numbers(config, tensors):
    tensors["optimizer/0.lora_a/exp_avg"] = torch.zeros(4, 64, dtype=torch.int64)


def no_moment(config, tensors):
    moments_of(config)["dict"].pop()
    del tensors["optimizer/0.lora_a/max_exp_avg_sq"]


def empty_moments(config, tensors):
    moments_of(config)["dict"] = []
    for name in [name for name in tensors if name.startswith("optimizer/0.lora_a/")]:
        del tensors[name]


def text_as_step(config, tensors):
    pairs(moments_of(config))["step"][1] = "x"
    del tensors["optimizer/0.lora_a/step"]


def one_tensor_twice(config, tensors):
    pairs(moments_of(config))["exp_avg"][1] = pairs(moments_of(config))["exp_avg_sq"][1]


def option(key, value):
    def change(config, tensors):
        pairs(config["optimizer"]["groups"][0]["options"])[key][1] = value

    return change


def at(path, value):
    """A change of what stands at a path in the JSON."""

    def change(config, tensors):
        *way, last = path
        for key in way:
            config = config[key]
        config[last] = value

    return change


def scheduler_entry(config, tensors):
    config["scheduler"]["state"]["dict"] += [["step", 1], ["optimizer", 2]]


def random_part(key, value):
    def change(config, tensors):
        pairs(config["random"])[key][1] = value
        for name in [name for name in tensors if name.startswith(f"random/{key}")]:
            del tensors[name]

    return change


def position_of_numpy(config, tensors):
    pairs(config["random"])["numpy"][1]["tuple"][2] = 10**6


def nested():
    """Lists in lists: not too many for the reader of JSON, too many for a function in Python."""
    value = 1
    for _ in range(900 if sys.version_info < (3, 12) else 3000):
        value = [value]
    return value


GROUP = ("optimizer", "groups", 0)


@pytest.mark.parametrize(("change", "match"), [
    (shape_of_a_moment, r"exp_avg of 0\.lora_a is float32 \[5, 5\]; .* is float32 \[4, 64\]"),
    (whole_numbers, r"exp_avg of 0\.lora_a is int64"),
    (no_moment, r"moments of 0\.lora_a have other names: \['max_exp_avg_sq'\] are not"),
    (empty_moments, r"moments of 0\.lora_a have other names: \['exp_avg', 'exp_avg_sq'"),
    (text_as_step, "step of 0.lora_a is 'x'"),
    (one_tensor_twice, "no value that was written here"),
    (at(("optimizer", "state"), {"dict": []}), "holds optimizer/0.*json does not name"),
    (at(("optimizer", "state"), {"dict": [["0.lora_a", 1]]}), "moments of 0.lora_a are 1"),
    (at(("optimizer", "state"), {"tuple": [1]}), r"state is \(1,\); expected a dict"),
    (at(("optimizer", "more"), {"dict": [["a", 1]]}), r"entries of the optimiser .*\['a'\]"),
    (at((*GROUP, "options"), {"dict": []}), r"options in group 0 .*'amsgrad', 'betas'.*not in"),
    (at((*GROUP, "parameters"), [[1, 2]]), "groups is"),
    (at((*GROUP, "parameters"), [["a"]]), "groups is"),
    (at((*GROUP, "parameters"), 3), "groups is"),
    (option("lr", "x"), "lr is 'x' there, and 0.0.* here"),
    (option("lr", None), "lr is None there"),
    (option("betas", {"tuple": [0.9]}), r"betas is \(0\.9,\) there"),
    (option("amsgrad", 1), "amsgrad is 1 there, and True here"),
    (scheduler_entry, r"entries of the scheduler have other names: \['optimizer', 'step'\]"),
    (at(("scheduler", "state"), {"tuple": []}), r"scheduler's state is \(\); expected a dict"),
    (at(("scheduler",), {}), "scheduler: class"),
    (at(("scheduler",), {"class": 1, "state": {}}), "scheduler: class"),
    (at(("random",), {"dict": []}), "holds random/.* does not name"),
    (at(("random",), {"tuple": []}), r"random is \(\); expected a dict"),
    (random_part("python", {"tuple": [3, 1, None]}), "generators are damaged .*'int' object"),
    (random_part("numpy", 5), "generators are damaged .*int"),
    (random_part("accelerator", {"tuple": ["cuda", 7]}), "generators are damaged .*int"),
    (position_of_numpy, "numpy's is at 1000000, expected 0 to 624"),
    (at(("random",), {"dict": [["python", nested()]]}), "damaged .*RecursionError"),
])  # fmt: skip
def test_a_state_that_was_not_written_here_is_refused(change, match, tmp_path):
    """Whoever writes both files anew, without checksums, gets a ValueError that names them."""
    loop = Loop()
    loop.run(1)
    loop.save(tmp_path, 1)
    place, weights = tmp_path / "training_state.json", tmp_path / "training_state.safetensors"
    config, tensors = json.loads(place.read_text()), load_file(weights)
    save_file(tensors, weights)
    loop.load(tmp_path)  # as it is
    change(config, tensors)
    place.write_text(json.dumps(config))
    save_file(tensors, weights)
    refused(loop, tmp_path, match)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}"):
        loop.load(tmp_path)


def test_entries_of_schedulers_inside_a_scheduler_are_compared_too(tmp_path):
    loop = Loop(scheduler="warm-up, then cosine")
    loop.save(tmp_path, 0)
    place, weights = tmp_path / "training_state.json", tmp_path / "training_state.safetensors"
    config = json.loads(place.read_text())
    save_file(load_file(weights), weights)
    inner = pairs(config["scheduler"]["state"])["_schedulers"][1]
    inner[0]["dict"].append(["optimizer", 1])
    place.write_text(json.dumps(config))
    refused(loop, tmp_path, r"_schedulers: 0 have other names: \['optimizer'\]")
    inner.pop()
    place.write_text(json.dumps(config))
    refused(loop, tmp_path, "_schedulers: .*expected 2 in a list")


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    loop = Loop(scheduler=None)
    with pytest.raises(ValueError, match="no adapter"):
        mp.save_training_state(tmp_path / "x", net(), loop.optimizer, step=1)
    with pytest.raises(ValueError, match=r"step=-1"):
        loop.save(tmp_path / "x", -1)
    with pytest.raises(ValueError, match=r"parameter of shape \(4, 64\) that the model does not"):
        mp.save_training_state(tmp_path / "x", lora(), loop.optimizer, step=1)

    class Odd:
        def state_dict(self):
            return {"where": {"f": abs}}

        def load_state_dict(self, state):
            pass

    with pytest.raises(TypeError, match="scheduler/where/f is a builtin"):
        mp.save_training_state(tmp_path / "x", loop.model, loop.optimizer, step=1, scheduler=Odd())
    meta = lora(copy.deepcopy(net()).to("meta"))
    optimizer = torch.optim.SGD(list(mp.adapter_parameters(meta)), lr=1.0)
    with pytest.raises(ValueError, match="on the meta device"):
        mp.save_training_state(tmp_path / "x", meta, optimizer, step=1)
    assert not (tmp_path / "x").exists()


def test_generators_of_other_devices_are_refused(tmp_path, monkeypatch):
    from minipeft.io import generators, training_state

    loop = Loop(scheduler=None)
    states = generators.random_states()
    states["accelerator"] = ("cuda", [torch.zeros(16, dtype=torch.uint8)] * 99)
    monkeypatch.setattr(training_state, "random_states", lambda: states)
    loop.save(tmp_path, 1)
    monkeypatch.undo()
    refused(loop, tmp_path, "generators of 99 devices of kind 'cuda'.*generators=False")
    assert loop.load(tmp_path, generators=False) == 1


@pytest.mark.parametrize("state", [
    torch.zeros(16, dtype=torch.uint8), torch.zeros(5056), 3,
], ids=["size", "dtype", "no tensor"])  # fmt: skip
def test_damaged_generators_of_devices_are_refused_before_anything_changes(
    state, tmp_path, monkeypatch
):
    from minipeft.io import generators, training_state

    loop = Loop(scheduler=None)
    loop.run(1)
    states = generators.random_states()
    states["accelerator"] = ("cpu", [state])  # the CPU in the place of an accelerator
    monkeypatch.setattr(training_state, "random_states", lambda: states)
    loop.save(tmp_path, 1)
    monkeypatch.setattr(generators, "_accelerator", lambda always=False: ("cpu", 1))
    loop.run(1)
    refused(loop, tmp_path, "states of random generators are damaged")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forks")
def test_fifty_kills_of_a_loop_leave_a_state_of_the_undisturbed_run(capsys):
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(  # a fork wants a process without threads
        [sys.executable, "-m", "benchmarks.resume", "--print-only", "--methods"],
        capture_output=True, text=True, cwd=root, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert "'end as undisturbed': 1" in done.stdout


def test_a_run_that_diverged_is_resumed_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    mp.inject_lora(model, ["0"], rank=2)
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model))
    with torch.no_grad():
        model[0].lora_b[0, 0] = torch.nan
    mp.save_training_state(tmp_path, model, optimizer, step=3)
    nn.init.zeros_(model[0].lora_b)
    assert mp.load_training_state(tmp_path, model, optimizer) == 3
    assert model[0].lora_b.isnan().sum() == 1
