"""State, switching and strength of a model's adapters; what a model holds."""

import math

import pytest
import torch
from torch import nn

import minipeft as mp


def make(rank=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    mp.inject_lora(model, ["0", "2"], rank)
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter)
    return model


def test_the_adapter_state_goes_round():
    model, other = make(), make()
    state = {name: value.clone() for name, value in mp.adapter_state_dict(model).items()}
    assert set(state) == {"0.lora_a", "0.lora_b", "2.lora_a", "2.lora_b"}
    for parameter in mp.adapter_parameters(other):
        nn.init.zeros_(parameter)
    assert mp.load_adapter_state_dict(other, state) == ([], [])
    x = torch.randn(2, 8)
    assert torch.equal(other(x), model(x))


def test_the_base_state_has_the_plain_models_names():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    state = mp.base_state_dict(make())
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e300])
def test_numbers_that_are_not_finite_are_loaded_with_a_warning(value):
    model = make()
    state = {n: v.clone().double() for n, v in mp.adapter_state_dict(model).items()}
    state["2.lora_b"][1, 0] = value  # 1e300 is infinite in float32
    with pytest.warns(RuntimeWarning, match=r"\['2\.lora_b'\] \(1 in all\) hold NaN or Inf"):
        mp.load_adapter_state_dict(model, state)
    assert not model[2].lora_b[1, 0].isfinite()
    before = model[0].lora_a.clone()
    state["0.lora_a"] += 1
    with pytest.raises(RuntimeWarning):  # where warnings are errors nothing is copied
        mp.load_adapter_state_dict(model, state)
    assert torch.equal(model[0].lora_a, before)


def broken_states(state):
    missing = dict(state)
    missing.pop("2.lora_b")
    return {
        "missing": missing,
        "unexpected": {**state, "4.lora_a": torch.zeros(2, 8)},
        "shape": {**state, "2.lora_b": torch.zeros(8, 3)},
        "integers": {**state, "2.lora_b": torch.zeros(8, 2, dtype=torch.int64)},
    }


@pytest.mark.parametrize("kind", ["missing", "unexpected", "shape", "integers"])
def test_a_wrong_state_raises_before_anything_is_copied(kind):
    model = make()
    state = {name: value + 1 for name, value in mp.adapter_state_dict(model).items()}
    before = {name: value.clone() for name, value in mp.adapter_state_dict(model).items()}
    with pytest.raises(ValueError, match=r"2\.lora_b|4\.lora_a"):
        mp.load_adapter_state_dict(model, broken_states(state)[kind])
    for name, value in mp.adapter_state_dict(model).items():
        assert torch.equal(value, before[name])


def test_not_strict_returns_what_was_missing_and_unexpected():
    model = make()
    state = {"0.lora_a": torch.ones(2, 8), "5.lora_a": torch.ones(1)}
    missing, unexpected = mp.load_adapter_state_dict(model, state, strict=False)
    assert missing == ["0.lora_b", "2.lora_a", "2.lora_b"]
    assert unexpected == ["5.lora_a"]
    assert (model[0].lora_a == 1).all()


def test_disabling_nests_and_survives_an_exception():
    model, x = make(), torch.randn(2, 8)
    on = model(x)
    model[0].enabled = False
    partly = model(x)
    with mp.disable_adapters(model):
        off = model(x)
        with mp.disable_adapters(model):
            assert torch.equal(model(x), off)
        assert torch.equal(model(x), off)
    assert torch.equal(model(x), partly), "each adapter's own state comes back"
    model[0].enabled = True
    with pytest.raises(KeyError), mp.disable_adapters(model):
        raise KeyError
    assert torch.equal(model(x), on)
    assert not torch.equal(on, off)


def test_the_scale_is_absolute():
    model, x = make(), torch.randn(2, 8)
    on = model(x)
    assert mp.scale_adapters(model, 0.5) == ["0", "2"]
    mp.scale_adapters(model, 0.5)
    assert model[0].scale == 0.5
    mp.scale_adapters(model, 1.0)
    assert torch.equal(model(x), on)
    for factor in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factor"):
            mp.scale_adapters(model, factor)


def test_functions_on_a_model_without_adapters_raise():
    plain = nn.Sequential(nn.Linear(2, 2))
    calls = (
        lambda: mp.scale_adapters(plain, 1.0),
        lambda: mp.load_adapter_state_dict(plain, {}),
        lambda: mp.merge(plain),
        lambda: mp.unmerge(plain),
        lambda: mp.remove(plain),
        lambda: mp.save_peft(plain, "nowhere"),
        lambda: mp.disable_adapters(plain).__enter__(),
    )
    for call in calls:
        with pytest.raises(ValueError, match="no adapter"):
            call()


def test_freeze_keeps_what_adapters_own():
    model = make()
    model[0].base.weight.requires_grad_(True)
    model[2].lora_a.requires_grad_(False)
    mp.freeze(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["0.lora_a", "0.lora_b", "2.lora_b"]


def test_counts_equal_counting_by_hand():
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 10, bias=False))
    mp.inject_qlora(model, ["0"], 4, skip=["1"])
    count = mp.count_parameters(model)
    assert count.trainable == 4 * 128 + 64 * 4
    assert count.total == 128 * 64 + 64 + 64 * 10 + count.trainable
    codes, scales = 128 * 64 // 2, 128 + 4 + 4  # 128 blocks in one group, and the offset
    assert count.bytes == codes + scales + 4 * (64 + 64 * 10 + count.trainable)


def test_bits_of_a_llama_layer():
    shapes = [(4096, 4096), (4096, 11008)]
    model = nn.Sequential(*(mp.NF4Linear(i, o, bias=False, device="meta") for i, o in shapes))
    # bits a weight are a quotient of whole numbers; only the last group is not full
    assert abs(mp.memory_report(model).packed.bits - (4 + 8 / 64 + 32 / (64 * 256))) < 1e-4
    dense = mp.memory_report(nn.Linear(2, 2))
    assert math.isnan(dense.packed.bits) and dense.together == dense.dense == (6, 24)


def test_what_cannot_be_scaled_says_that_a_name_chooses():
    model = make()
    model.prefix = mp.PrefixEncoder([(2, 4, 4)], 3)
    with pytest.raises(ValueError, match=r"PrefixEncoder.*name= scales one") as seen:
        mp.scale_adapters(model, 0.5)
    assert "['default']" in str(seen.value)
    assert model[0].scale == 1.0
