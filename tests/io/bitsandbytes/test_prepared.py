"""Injected on the meta device, then filled: bit for bit what the other order gives."""

import copy

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io.bitsandbytes import load_quantized, save_quantized
from tests.io.bitsandbytes.test_load import (
    Small,
    assert_equal_models,
    gpt2,
    llama,
    on_meta,
    saved,
)  # fmt: skip

LAYERS = ["a", "b", "c"]


def both_orders(kind, path, target, rank=4, nf4=None, **lora):
    """The model injected on meta and filled, and the one filled and injected: from one seed."""
    nf4 = nf4 or {}
    first = on_meta(kind)
    names = mp.inject_qlora(first, target, rank, **nf4, **lora)
    torch.manual_seed(3)
    coded = load_quantized(first, path)
    second = on_meta(kind)
    assert sorted(load_quantized(second, path)) == sorted(coded)
    torch.manual_seed(3)
    assert mp.inject_lora(second, target, rank, **lora) == names
    return first, second


def assert_same(first, second):
    assert_equal_models(first, second)
    trained = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (first, second)]
    assert trained[0] == trained[1]
    assert not any(t.is_meta for t in [*first.parameters(), *first.buffers()])
    assert repr(first) == repr(second)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_model_of_your_own(tmp_path, double_quant):
    model = Small().eval()
    nf4 = {"double_quant": double_quant, "block_size": 32}
    mp.quantize_model(model, **nf4)
    save_quantized(model, tmp_path / "four")
    first, second = both_orders(Small, tmp_path / "four", LAYERS, nf4=nf4)
    assert_same(first, second)
    assert first.head.weight is first.embed.weight
    rows = torch.tensor([1, 5])
    assert torch.equal(first.eval()(rows), model(rows))  # B = 0
    first(rows).square().sum().backward()
    assert mp.check_gradients(first) == 6


@pytest.mark.parametrize("init", [None, mp.starts.gaussian(), mp.starts.orthogonal()])
@pytest.mark.parametrize("dora", [False, True])
def test_starts_and_dora(tmp_path, init, dora):
    saved(tmp_path / "four")
    first, second = both_orders(Small, tmp_path / "four", LAYERS, init=init, dora=dora)
    assert_same(first, second)


def test_lora_alone_on_meta_becomes_qlora(tmp_path):
    saved(tmp_path / "four")
    first = on_meta()
    mp.inject_lora(first, LAYERS, 4)
    torch.manual_seed(3)
    assert load_quantized(first, tmp_path / "four") == LAYERS
    second = on_meta()
    load_quantized(second, tmp_path / "four")
    torch.manual_seed(3)
    mp.inject_lora(second, LAYERS, 4)
    assert_same(first, second)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_models_of_transformers(tmp_path, make):
    model = make()
    mp.quantize_model(model)
    save_quantized(model, tmp_path / "four")
    first = mp.meta_model(tmp_path / "four")
    mp.inject_qlora(first, "all-linear", 4)
    torch.manual_seed(3)
    load_quantized(first, tmp_path / "four")
    second = mp.meta_model(tmp_path / "four")
    load_quantized(second, tmp_path / "four")
    torch.manual_seed(3)
    mp.inject_lora(second, "all-linear", 4)
    assert_same(first, second)
    ids = torch.arange(8)[None]
    assert torch.equal(first.eval()(ids).logits, second.eval()(ids).logits)


def test_quantize_model_on_meta_computes_nothing_and_has_the_shapes():
    plain, meta = Small(), on_meta()
    assert mp.quantize_model(plain) == mp.quantize_model(meta)
    state = [m.state_dict(keep_vars=True) for m in (plain, meta)]
    shapes = [{n: (t.shape, t.dtype, t.requires_grad) for n, t in s.items()} for s in state]
    assert shapes[0] == shapes[1]
    assert all(t.is_meta for t in meta.parameters())


def test_adapters_that_have_values_keep_them(tmp_path):
    saved(tmp_path / "four")
    model = on_meta()
    mp.inject_qlora(model, LAYERS, 4)
    load_quantized(model, tmp_path / "four")
    nn.init.normal_(model.a.lora_b)
    before = copy.deepcopy(model)
    load_quantized(model, tmp_path / "four")
    assert_equal_models(model, before)


def _quantised_otherwise(model):
    mp.inject_qlora(model, LAYERS, 4, block_size=32)


def _without_double_quant(model):
    mp.inject_qlora(model, LAYERS, 4, double_quant=False)


def _of_another_shape(model):
    model.a = nn.Linear(64, 65, bias=False, device="meta")
    mp.inject_qlora(model, LAYERS, 4)


def _an_adapter_by_hand(model):
    model.a = mp.LoRALinear(model.a, 4)


def _table_in_4_bits(model):
    model.head.weight = nn.Parameter(torch.empty(20, 64, device="meta"))  # untied
    mp.quantize_model(model, embeddings=True, skip=["head"])


REFUSED = {
    "block size": (_quantised_otherwise, "a.weight has block_size=64, double_quant=True"),
    "double quant": (_without_double_quant, "model's layer has 64 and False"),
    "shape": (_of_another_shape, r"codes of a weight \(64, 64\); the model's is \(65, 64\)"),
    "by hand": (_an_adapter_by_hand, r"a \(LoRALinear\) is an adapter on the meta device"),
    "dense in the file": (
        _table_in_4_bits,
        "embed.weight is dense, and the model's layer is 4-bit",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_the_model_as_it_was(tmp_path, case):
    prepare, message = REFUSED[case]
    saved(tmp_path / "four")
    model = on_meta()
    prepare(model)
    before = {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        load_quantized(model, tmp_path / "four")
    assert {n: id(p) for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("init", [mp.starts.pissa(), mp.starts.olora(), mp.starts.loftq()])
def test_starts_that_need_the_weight_are_refused_on_meta(init):
    model = on_meta()
    with pytest.raises(ValueError, match="on the meta device"):
        mp.inject_qlora(model, LAYERS, 4, init=init)
    assert isinstance(model.a, nn.Linear)


def test_an_init_that_fails_leaves_the_model_as_it_was(tmp_path):
    saved(tmp_path / "four")
    model, calls = on_meta(), []

    def init(layer):
        calls.append(layer)
        if not layer.lora_a.is_meta:
            raise ValueError("not today")

    mp.inject_qlora(model, LAYERS, 4, init=init)
    before = {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="a: not today"):
        load_quantized(model, tmp_path / "four")
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert all(p.is_meta for p in model.parameters()) and len(calls) == 4
