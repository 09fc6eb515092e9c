"""The buffers of a frozen base: statistics stand still, what else changes is found by name."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minipeft as mp
from minipeft.model.buffers import changed_buffers
from minipeft.model.train import train_biases, train_modules


class ConvNet(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, **options):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), norm(8, **options)
        self.drop, self.head = nn.Dropout(0.0), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def make(norm=nn.BatchNorm2d, **options):
    torch.manual_seed(0)
    model = ConvNet(norm, **options)
    for _ in range(3):  # statistics that are not those of a new layer
        model(torch.randn(8, 3, 6, 6))
    return model


def step_by_step(model, steps=60):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=1e-2)
    for _ in range(steps):
        x = 2 * torch.randn(8, 3, 6, 6, generator=generator) + 1
        target = torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


X = torch.randn(5, 3, 6, 6)
WAYS = {
    "LoRA": lambda m: mp.inject_lora(m, ["conv", "head"], 2),
    "LoRA and the norm": lambda m: (mp.inject_lora(m, ["conv", "head"], 2),
                                    train_modules(m, ["norm"])),
    "biases": lambda m: (mp.inject_lora(m, ["conv"], 2), train_biases(m, "all")),
    "the norm alone": lambda m: train_modules(m, ["norm"]),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, nn.SyncBatchNorm])
def test_the_base_is_bit_equal_and_what_is_loaded_equals_what_was_trained(way, norm, tmp_path):
    options = {"track_running_stats": True, "affine": True} if norm is nn.InstanceNorm2d else {}
    if norm is nn.SyncBatchNorm:
        reference = make()
        plain = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(reference))
    else:
        plain = make(norm, **options)
    before, expected = copy.deepcopy(plain.state_dict()), copy.deepcopy(plain).eval()(X)
    model = copy.deepcopy(plain)
    if norm is nn.SyncBatchNorm and "norm" in way:
        pytest.skip("trained statistics of SyncBatchNorm need a process group")
    WAYS[way](model)
    model.train()
    step_by_step(model)
    with torch.no_grad(), mp.disable_adapters(model):
        for mode in (True, False):
            assert torch.equal(model.train(mode)(X), expected)
    state = mp.base_state_dict(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())

    mp.save_peft(model, tmp_path)
    loaded = copy.deepcopy(plain)
    mp.load_peft(loaded, tmp_path)
    by_state = copy.deepcopy(plain)
    WAYS[way](by_state)
    mp.load_adapter_state_dict(by_state, mp.adapter_state_dict(model))
    trained = model.eval()(X)
    assert not torch.equal(trained, expected)
    # a file holds biases with their delta: a sum that is rounded once, of numbers below 1
    rounding = 1e-6 if way == "biases" else 0
    # measured 3e-8
    torch.testing.assert_close(loaded.eval()(X), trained, rtol=0, atol=rounding)
    assert torch.equal(by_state.eval()(X), trained)

    mp.remove(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(model(X), expected)


def test_statistics_of_a_trained_norm_follow_the_data_and_are_saved():
    model = make()
    mp.inject_lora(model, ["conv"], 2)
    train_modules(model, ["norm"])
    step_by_step(model.train(), 5)
    assert not torch.equal(model.norm.copy.running_mean, model.norm.base.running_mean)
    assert model.norm.copy.num_batches_tracked == 3 + 5
    assert "norm.copy.running_mean" in mp.adapter_state_dict(model)


def test_a_norm_without_parameters_can_join_the_adapter(tmp_path):
    model = make(affine=False)
    plain = copy.deepcopy(model)
    mp.inject_lora(model, ["conv"], 2)
    train_modules(model, ["norm"])
    step_by_step(model.train(), 5)
    mp.save_peft(model, tmp_path)
    mp.load_peft(plain, tmp_path)
    trained = model.eval()(X)
    assert torch.equal(plain.eval()(X), trained)
    mp.remove(model, merge=True)
    # float32: the product is rounded into the weight, measured 6e-8
    torch.testing.assert_close(model(X), trained, rtol=1e-5, atol=1e-5)


def test_norms_stay_in_eval_mode_while_there_are_adapters_and_other_modules_do_not():
    model = make().train()
    mp.inject_lora(model, ["conv"], 2)
    mp.inject_lora(model, ["head"], 2, name="more")
    for _ in range(2):
        assert not model.norm.training and model.drop.training and model.head.training
        model.train()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.train()
        assert not again.norm.training and again.drop.training
        mp.remove(again)
        assert again.norm.training and "train" not in vars(again.norm)
    mp.remove(model, name="more")
    assert not model.norm.training
    mp.remove(model, merge=True)
    assert model.norm.training
    assert not model.eval().norm.training and model.train().norm.training


def test_a_norm_that_the_user_thaws_follows_train_again():
    model = make()
    mp.inject_lora(model, ["conv"], 2)
    model.norm.requires_grad_(True)
    assert model.train().norm.training
    step_by_step(model, 2)
    mp.check_gradients(model)  # the user's own doing


class OwnNorm(nn.Module):
    """A normaliser of somebody's own, around other modules."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.inside = nn.Dropout(0.0)

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return self.inside(x - self.running_mean[:, None, None])


def test_classes_of_ones_own_with_statistics_are_held_and_their_children_are_not():
    model = make(OwnNorm)
    before = model.norm.running_mean.clone()
    mp.inject_lora(model, ["conv"], 2)
    step_by_step(model.train(), 3)
    assert torch.equal(model.norm.running_mean, before)
    assert not model.norm.training and model.norm.inside.training


class Counter(nn.Module):
    """Buffers that a forward changes in either mode: in place, or by a new tensor."""

    def __init__(self, channels, how):
        super().__init__()
        self.how = how
        self.register_buffer("level", torch.zeros(channels))

    def forward(self, x):
        with torch.no_grad():
            if self.how == "in place":
                self.level.lerp_(x.mean((0, 2, 3)), 0.1)
            else:
                self.level = self.level + 1
        return x + self.level[:, None, None]


def spectral(channels):
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(channels, channels, 1))


CHANGING = {
    "in place": (lambda c: Counter(c, "in place"), "norm.level"),
    "a new tensor": (lambda c: Counter(c, "new"), "norm.level"),
    "spectral norm": (spectral, r"norm.parametrizations.weight.0._[uv]"),
}


@pytest.mark.parametrize("kind", CHANGING)
def test_a_buffer_that_forward_changes_is_told_by_name(kind, tmp_path):
    norm, name = CHANGING[kind]
    model = make(norm)
    mp.inject_lora(model, ["conv"], 2)
    assert changed_buffers(model) == []
    step_by_step(model.train(), 2)
    with pytest.raises(ValueError, match=name):
        mp.check_gradients(model)
    with pytest.warns(UserWarning, match=name):
        mp.save_peft(model, tmp_path)
    again = copy.deepcopy(model)
    step_by_step(again, 1)  # a copy counts from where it was made, or tells the old change
    assert changed_buffers(model)


def test_a_mode_set_by_hand_is_told():
    model = make()
    mp.inject_lora(model, ["conv"], 2)
    model.norm.training = True
    step_by_step(model, 1)
    with pytest.raises(ValueError, match=r"norm\.running_mean"):
        mp.check_gradients(model)


class Caches(nn.Module):
    """What changes in forward and is no part of a model: rotary tables, keys and values."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("angles", torch.zeros(1), persistent=False)
        self.register_buffer("k_cache", torch.zeros(4))
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x):
        self.angles = torch.ones(3)
        self.k_cache[1] += 1
        self.table = torch.arange(len(self.table) + 1.0)  # a table that grows
        return x


DOINGS = {
    "caches": (Caches, lambda m, old: step_by_step(m, 2)),
    "load_state_dict": (nn.BatchNorm2d, lambda m, old: m.load_state_dict(
        {k: v + 1 for k, v in m.state_dict().items()})),
    "half and back": (nn.BatchNorm2d, lambda m, old: m.half().float()),
    "double": (nn.BatchNorm2d, lambda m, old: m.double()),
    "written with the same values": (nn.BatchNorm2d, lambda m, old: m.norm.running_mean.copy_(
        m.norm.running_mean.clone())),
    "deepcopy and train": (nn.BatchNorm2d, lambda m, old: step_by_step(copy.deepcopy(m), 1)),
    "training": (nn.BatchNorm2d, lambda m, old: step_by_step(m.train(), 3)),
    "merge and unmerge": (nn.BatchNorm2d, lambda m, old: (mp.merge(m), mp.unmerge(m))),
}  # fmt: skip


@pytest.mark.parametrize("doing", DOINGS)
def test_what_is_no_change_of_the_base_raises_no_alarm(doing):
    norm, do = DOINGS[doing]
    model = make(norm)
    mp.inject_lora(model, ["conv"], 2)
    do(model, None)
    assert changed_buffers(model) == []


def test_prefixes_hold_statistics_too_and_let_them_go():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.extra = nn.BatchNorm1d(4)
    prefix = mp.attach_prefix(model.train(), 2)
    assert not model.train().extra.training
    prefix.remove()
    assert model.extra.training


@pytest.mark.slow
def test_compiled_training_leaves_the_base_alone(plain_python):
    printed = plain_python("""
import copy, torch
from torch import nn
import minipeft as mp
model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
mp.inject_lora(model, ["0", "2"], 2)
before = copy.deepcopy(mp.base_state_dict(model))
compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
for _ in range(3):
    compiled(torch.randn(5, 8)).sum().backward()
mp.check_gradients(model)
print(all(torch.equal(v, before[n]) for n, v in mp.base_state_dict(model).items()))
""")
    assert printed.strip() == "True"


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        self.seen += 1
        return self.fc(x)


@pytest.mark.parametrize("between", ["nothing", "moved", "one adapter more"])
def test_changes_are_told_whatever_is_done_in_between(between, tmp_path):
    model = nn.Sequential(Counting())
    mp.inject_lora(model, ["0.fc"], 2)
    if between == "moved":  # as .to(device) does: other tensors of the same values
        model._apply(lambda tensor: tensor.clone())
    model(torch.randn(3, 4))
    if between == "one adapter more":
        mp.inject_lora(model, ["0.fc"], 2, name="more")
    with pytest.warns(UserWarning, match=r"0\.seen"):
        mp.save_peft(model, tmp_path)
