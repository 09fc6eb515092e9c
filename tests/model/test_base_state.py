"""A base's state out of a wrapped model and into it, under the plain model's names."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import minipeft as mp


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.norm = nn.Embedding(6, 64), nn.BatchNorm1d(64)
        self.block = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 6, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.block(self.norm(self.emb(ids))))


def plain(seed=0):
    torch.manual_seed(seed)
    return Model().eval()


def wrapped(seed=0):
    model = plain(seed)
    mp.inject_lora(model, ["block.0", "emb"], 2)
    mp.train_modules(model, ["norm"])
    mp.inject_lora(model, ["block.0"], 2, name="fr")
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


IDS = torch.tensor([0, 3, 5, 1])


def test_a_plain_checkpoint_goes_into_the_base_and_adapters_stay():
    model, checkpoint = wrapped(0), plain(1).state_dict()
    adapters = {k: v.clone() for k, v in mp.adapter_state_dict(model).items()}
    assert mp.load_base_state_dict(model, checkpoint) == ([], [])
    after = mp.adapter_state_dict(model)
    assert all(torch.equal(after[k], adapters[k]) for k in adapters)
    with mp.disable_adapters(model):
        assert torch.equal(model(IDS), plain(1)(IDS))
    mp.remove(model)
    assert torch.equal(model(IDS), plain(1)(IDS))


def test_base_state_has_the_plain_models_names_and_goes_back():
    model = wrapped()
    state = mp.base_state_dict(model)
    own = plain().state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[k], own[k]) for k in own)
    fresh = plain(1)
    mp.inject_lora(fresh, ["block.0"], 2)
    mp.load_base_state_dict(fresh, state)
    with mp.disable_adapters(fresh):
        assert torch.equal(fresh(IDS), plain()(IDS))


@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bit_bases_take_the_state_of_a_model_quantised_alike(double_quant):
    models = []
    for seed in (0, 1):
        model = plain(seed)
        mp.inject_qlora(model, ["block.0"], 2, skip=["head"], double_quant=double_quant)
        models.append(model)
    mp.load_base_state_dict(models[0], mp.base_state_dict(models[1]))
    with mp.disable_adapters(models[0]), mp.disable_adapters(models[1]):
        assert torch.equal(models[0](IDS), models[1](IDS))


WRONG = {
    "missing": (lambda s: s.pop("block.0.bias"), r"missing \['block.0.bias'\]"),
    "unexpected": (lambda s: s.update(more=torch.zeros(1)), r"unexpected \['more'\]"),
    "shape": (lambda s: s.update({"emb.weight": torch.zeros(7, 64)}), r"\(7, 64\)"),
    "integers": (lambda s: s.update({"block.0.bias": torch.zeros(64, dtype=torch.int8)}), "int8"),
    "no tensor": (lambda s: s.update({"block.0.bias": [0.0] * 64}), "list"),
    "meta": (lambda s: s.update({"block.0.bias": torch.zeros(64, device="meta")}), "meta"),
    "two values for a tied weight": (
        lambda s: s.update({"head.weight": torch.zeros(6, 64)}), "one tensor",
    ),
    "one tensor in two spellings": (
        lambda s: s.update({"_orig_mod.block.0.bias": torch.zeros(64)}), "two spellings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_state_is_refused_before_anything_is_copied(kind):
    change, message = WRONG[kind]
    model, state = wrapped(), plain(1).state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        mp.load_base_state_dict(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_weight_for_a_four_bit_layer_is_refused_by_name(strict):
    model = plain()
    mp.inject_qlora(model, ["block.0"], 2, skip=["head"])
    with pytest.raises(ValueError, match=r"block\.0\.weight is a dense weight.*4-bit"):
        mp.load_base_state_dict(model, plain(1).state_dict(), strict=strict)


def test_a_merged_model_is_refused():
    model = wrapped()
    mp.merge(model)
    with pytest.raises(ValueError, match="merged"):
        mp.load_base_state_dict(model, plain(1).state_dict())


def test_not_strict_gives_exact_lists_and_loads_the_rest():
    model, state = wrapped(), plain(1).state_dict()
    del state["block.0.bias"]
    state["more"] = torch.zeros(1)
    assert mp.load_base_state_dict(model, state, strict=False) == (["block.0.bias"], ["more"])
    assert torch.equal(mp.base_state_dict(model)["norm.weight"], state["norm.weight"])


def test_a_tied_weight_may_be_given_under_one_name():
    state = plain(1).state_dict()
    del state["head.weight"]
    assert mp.load_base_state_dict(wrapped(), state) == ([], [])


@pytest.mark.parametrize("kind", ["compiled", "parallel", "checkpointed"])
def test_what_torch_wraps_around_modules_is_in_no_name(kind):
    model, state = wrapped(), plain(1).state_dict()
    if kind == "compiled":
        outer = torch.compile(model)
    elif kind == "parallel":
        outer = nn.DataParallel(model)
    else:
        model.block, outer = checkpoint_wrapper(model.block), model
    assert mp.base_state_dict(outer).keys() == state.keys()
    assert mp.adapter_state_dict(outer).keys() == mp.adapter_state_dict(wrapped()).keys()
    assert mp.load_base_state_dict(outer, state) == ([], [])
    mp.load_adapter_state_dict(outer, mp.adapter_state_dict(wrapped()))
    mp.load_adapter_state_dict(
        wrapped(), {f"_orig_mod.{k}": v for k, v in mp.adapter_state_dict(outer).items()}
    )
    with mp.disable_adapters(model):
        assert torch.equal(model(IDS), plain(1)(IDS))
