"""A loop of one's own goes on from its saved state in every bit, and takes no other state."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
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


METHODS = {
    "lora": lora,
    "dora": lambda: lora(dora=True),
    "qlora": qlora,
    "pissa": lambda: lora(init=mp.starts.pissa()),
    "two adapters": two,
    "module and biases": with_module_and_biases,
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
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


def test_a_scheduler_that_fails_leaves_the_optimiser_as_it_was(tmp_path):
    class Odd:
        def state_dict(self):
            return {"a": 1}

        def load_state_dict(self, state):
            if state == {"a": 1}:
                raise RuntimeError("not today")

    loop = Loop(scheduler=None)
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
