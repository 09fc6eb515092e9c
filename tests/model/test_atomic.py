"""Finished, or the model as it was: what is refused before the first change, what is put back."""

import sys

import pytest
from torch import nn

import minipeft as mp
from minipeft.adapters.ready import check_ready
from minipeft.inject import restoring


def make():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Embedding(5, 64))


def state(model):
    """Everything that a failed call must leave as it was."""
    return (
        [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        {name: (type(v), v.copy()) if isinstance(v, dict) else v
         for module in model.modules() for name, v in vars(module).items()
         if name.startswith("_minipeft") or name in ("training", "_enabled", "save_pretrained")},
        [(n, a.enabled, float(a.strength)) for n, a in model.named_modules()
         if isinstance(a, mp.LoRALinear)],
    )  # fmt: skip


def adapter_folder(tmp_path):
    source = make()
    mp.inject_lora(source, ["0"], 2)
    mp.save_peft(source, tmp_path)
    return tmp_path


CALLS = {
    "inject": lambda model, path: mp.inject(model, ["0"], lambda base: mp.LoRALinear(base, 2)),
    "inject_lora": lambda model, path: mp.inject_lora(model, ["0"], 2),
    "inject_qlora": lambda model, path: mp.inject_qlora(model, ["0"], 2),
    "quantize_model": lambda model, path: mp.quantize_model(model),
    "train_biases": lambda model, path: mp.train_biases(model, "all"),
    "train_modules": lambda model, path: mp.train_modules(model, ["0"]),
    "train_tokens": lambda model, path: mp.train_tokens(model, [1], target=["3"]),
    "load_peft": lambda model, path: mp.load_peft(model, path),
    "one more": lambda model, path: mp.inject_lora(model, ["0"], 2, name="fr"),
}
LAZY = {
    "linear": lambda: nn.LazyLinear(3), "buffers": lambda: nn.LazyBatchNorm1d(affine=False),
    "own": lambda: nn.ParameterDict({"w": nn.UninitializedParameter()}),
}  # fmt: skip


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("call", CALLS)
def test_lazy_modules_are_refused_before_anything_changes(call, lazy, tmp_path):
    folder = adapter_folder(tmp_path) if call == "load_peft" else tmp_path
    model = make()
    model.append(LAZY[lazy]())
    before = state(model)
    with pytest.raises(
        ValueError, match=rf"{'train' if 'train' in call else ''}.*4 .*without a sh"
    ):
        CALLS[call](model, folder)
    assert state(model) == before


def test_combining_refuses_lazy_modules_too():
    model = make()
    mp.inject_lora(model, ["0"], 2)
    model.append(nn.LazyLinear(3))
    before = state(model)
    with pytest.raises(ValueError, match=r"combine_adapters: 4 .*without a shape"):
        mp.combine_adapters(model, ["default"], [1.0], new_name="sum")
    assert state(model) == before


def two_adapters():
    model = make()
    mp.inject_lora(model, ["0"], 2)
    mp.inject_lora(model, ["0", "2"], 2, name="fr")
    return model


LATE = {
    "inject": CALLS["inject"], "inject_lora": CALLS["inject_lora"],
    "inject_qlora": CALLS["inject_qlora"], "train_biases": CALLS["train_biases"],
    "train_modules": CALLS["train_modules"], "train_tokens": CALLS["train_tokens"],
    "load_peft": CALLS["load_peft"], "quantize_model": CALLS["quantize_model"],
    "one more": lambda model, path: mp.inject_lora(model, ["2"], 2, name="de"),
    "combine": lambda model, path: mp.combine_adapters(
        model, ["default", "fr"], [1.0, 1.0], new_name="sum", missing="zero"
    ),
    "serve_rows": lambda model, path: mp.use_adapters(model, rows=["fr", None]),
    "remove": lambda model, path: mp.remove(model),
    "remove one": lambda model, path: mp.remove(model, name="fr"),
}  # fmt: skip
ON_ADAPTERS = ("one more", "combine", "serve_rows", "remove", "remove one")


@pytest.mark.parametrize("call", LATE)
def test_an_error_after_the_swap_puts_everything_back(call, tmp_path, monkeypatch):
    """Whatever comes after the new modules are in may fail too: a listener, freezing, names."""
    folder = adapter_folder(tmp_path) if call == "load_peft" else tmp_path
    model = two_adapters() if call in ON_ADAPTERS else make()
    model[3].requires_grad_(False)
    before = state(model)

    def fail(model):
        raise MemoryError("no room")

    monkeypatch.setattr(sys.modules["minipeft.inject"], "after_swap", [fail])
    with pytest.raises(MemoryError):
        LATE[call](model, folder)
    assert state(model) == before


@pytest.mark.parametrize("call", ["combine", "one more", "train_modules"])
def test_an_error_in_the_last_step_puts_everything_back(call, tmp_path, monkeypatch):
    model = two_adapters()
    mp.use_adapters(model, "fr")
    before = state(model)

    def fail(*args):
        raise MemoryError("no room")

    module = {"combine": "combine", "one more": "inject_lora", "train_modules": "train"}[call]
    last = "give_name" if call == "one more" else "freeze"
    monkeypatch.setattr(f"minipeft.model.{module}.{last}", fail)
    calls = {**LATE, "train_modules": lambda m, path: mp.train_modules(m, ["3"], name="fr")}
    with pytest.raises(MemoryError):
        calls[call](model, tmp_path)
    assert state(model) == before
    assert not model[2].base.weight.requires_grad


def test_restoring_gives_back_attributes_containers_and_strengths():
    model = two_adapters()
    layer = model[0]
    model.log, model.table = ["a"], {"x": 1}
    log = model.log

    def change():
        model.log.append("b")
        model.table["y"] = 2
        model.table = {}
        model.extra = 1
        model[1] = nn.Linear(2, 2)
        layer.enabled, layer.scale = False, 3.0
        model.train(False)
        raise KeyError("stop")

    with pytest.raises(KeyError), restoring(model):
        change()
    assert model.log is log and model.log == ["a"] and model.table == {"x": 1}
    assert not hasattr(model, "extra") and isinstance(model[1], nn.ReLU) and model.training
    assert layer.enabled and layer.scale == 1.0 and float(layer.strength) == 1.0


def test_a_model_in_data_parallel_is_refused():
    """Its processes would draw different adapters, and gradients of those would not be summed."""

    class Fake(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model = Fake(make())
    before = state(model)
    with pytest.raises(ValueError, match=r"is a DistributedDataParallel.*do this first"):
        mp.inject_lora(model, ["0"], 2)
    assert state(model) == before
    check_ready("test", model.module)


SHARDED = """
import torch, minipeft as mp, warnings
from torch import nn
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, FullyShardedDataParallel
from tests.gloo import leave

warnings.simplefilter("ignore")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Embedding(5, 64))

def sharded(model):
    for part in (model[0], model[2]):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model

folder = "FOLDER"
source = make(); mp.inject_lora(source, ["0"], 2); mp.save_peft(source, folder)
for call in (
    lambda m: mp.inject(m, ["0"], lambda base: mp.LoRALinear(base, 2)),
    lambda m: mp.inject_lora(m, ["0"], 2),
    lambda m: mp.inject_qlora(m, ["0"], 2),
    lambda m: mp.quantize_model(m),
    lambda m: mp.train_biases(m, "all"),
    lambda m: mp.train_modules(m, ["0"]),
    lambda m: mp.train_tokens(m, [1], target=["3"]),
    lambda m: mp.load_peft(m, folder),
    lambda m: mp.inject_lora(m, ["0"], 2, name="fr"),
):
    model = sharded(make())
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    try:
        call(model)
    except ValueError as error:
        assert "shards (DTensor)" in str(error) and "then fully_shard" in str(error), error
    else:
        raise AssertionError("accepted")
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before

x = torch.randn(3, 64)
def step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model[:3](x).square().sum().backward()
        optimizer.step(); optimizer.zero_grad()
    return model[:3](x).detach()

def injected():
    model = make()
    mp.inject_lora(model, ["0", "2"], 2)
    return model

plain = injected()
model = injected()
mp.load_adapter_state_dict(model, mp.adapter_state_dict(plain))
expected = step(plain)
class Whole(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.layers = model
    def forward(self, x):
        return self.layers[2](self.layers[1](self.layers[0](x)))
whole = Whole(model)
for part in (whole.layers[0], whole.layers[2]):
    fully_shard(part, mesh=mesh)
fully_shard(whole, mesh=mesh)
optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.1)
for _ in range(2):
    whole(x).square().sum().backward()
    optimizer.step(); optimizer.zero_grad()
off = (whole(x).detach() - expected).abs().max().item()
# float32, two steps; sums over two processes come in another order
assert off < 1e-5, off

model = make()
wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
try:
    mp.inject_lora(wrapped, lambda name, module: isinstance(module, nn.Linear), 2)
except ValueError as error:
    assert "FullyShardedDataParallel" in str(error), error
else:
    raise AssertionError("accepted")
print("refused, and right the other way round")
leave()
"""


def test_shards_are_refused_and_sharding_after_injecting_stays_right(plain_python, tmp_path):
    out = plain_python(SHARDED.replace("FOLDER", str(tmp_path / "adapter")))
    assert "refused, and right" in out
