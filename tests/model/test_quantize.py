"""Whole models in 4 bits and back: what is taken, what is left and why, ties, experts."""

import copy

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import NF4Linear
from minipeft.adapters.targets import survey
from minipeft.layers import NF4Conv1D, NF4Embedding, NF4Experts
from minipeft.model.quantize import quantizable


class Experts(nn.Module):
    """The layout of mixtures of experts: two 3-D parameters, indexed one expert at a time."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 32, 64) / 8)
        self.down = nn.Parameter(torch.randn(4, 64, 32) / 8)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        picked = [i % 4 for i in range(len(rows))]
        out = [row @ self.up[e].T @ self.down[e].T for e, row in zip(picked, rows, strict=True)]
        return torch.stack(out).view(x.shape)


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.mixer = nn.Linear(64, 64)
        self.experts = Experts()
        self.position = nn.Parameter(torch.randn(1, 5, 64))  # 3-D, and no experts
        self.head = nn.Linear(64, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, rows):
        return self.head(self.experts(self.mixer(self.embed(rows)) + self.position))


ROWS = torch.arange(10).view(2, 5)


def everything(model):
    return mp.quantize_model(model, embeddings=True, experts=True, head=())


def test_everything_in_four_bits_and_back():
    model = Model()
    names = everything(model)
    assert sorted(names) == ["embed", "experts.down", "experts.up", "head", "mixer"]
    kinds = [type(model.get_submodule(name)) for name in sorted(names)]
    assert kinds == [NF4Embedding, NF4Experts, NF4Experts, NF4Linear, NF4Linear]
    assert names.left_out == {"position": "a bare parameter of a Model, which is no linear layer"}
    expected = model(ROWS)
    weights = {name: model.get_submodule(name).weight for name in names}
    assert mp.count_parameters(model).total == mp.count_parameters(Model()).total
    assert sorted(mp.dequantize_model(model)) == sorted(names)
    assert isinstance(model.experts.up, nn.Parameter) and type(model.embed) is nn.Embedding
    for name, weight in weights.items():
        holder, _, own = name.rpartition(".")
        plain = getattr(model.get_submodule(holder), own)
        values = plain if isinstance(plain, nn.Parameter) else plain.weight
        assert torch.equal(values, weight) and not values.requires_grad
    torch.testing.assert_close(model(ROWS), expected, rtol=1e-5, atol=1e-5)  # order of sums
    assert set(model.state_dict()) == set(Model().state_dict())
    with pytest.raises(ValueError, match="no 4-bit layer"):
        mp.dequantize_model(model)


def test_what_is_left_dense_is_named_with_its_reason():
    model = Model(tied=True)
    names = mp.quantize_model(model)
    assert names == ["mixer"]
    assert names.left_out == {
        "embed": "an embedding (embeddings=True quantises it)",
        "head": "its weight is tied to another module's",
        "experts.up": "a 3-D weight of experts (experts=True quantises it)",
        "experts.down": "a 3-D weight of experts (experts=True quantises it)",
        "position": "a bare parameter of a Model, which is no linear layer",
    }
    report = str(mp.memory_report(model, names.left_out))
    assert report.splitlines()[0].startswith("4-bit: 1 layer, 4,096 weights in 2,120 bytes, 4.141")
    assert "left dense: head (its weight is tied to another module's)" in report


def test_one_more_adapter_is_refused_where_its_base_could_not_be_quantised():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert mp.inject_qlora(model, ["0"], 2, name="fr", skip=["1"]) == ["0"]
    assert sorted(mp.adapter_state_dict(model, name="fr")) == ["0.lora_a", "0.lora_b"]
    with pytest.raises(ValueError, match=r"'de' would be one more adapter.*inject_lora\(name=\)"):
        mp.inject_qlora(model, ["1"], 2, name="de")
    assert type(model[1]) is nn.Linear


def test_ties_are_kept():
    model = Model(tied=True)
    before = model(ROWS)
    with pytest.raises(ValueError, match="tied to another"):
        mp.quantize_model(model, embeddings=True)
    assert torch.equal(model(ROWS), before)
    mp.quantize_model(model, experts=True)
    assert model.head.weight is model.embed.weight


def test_skipping_experts_and_embeddings():
    names = mp.quantize_model(Model(), experts=True, skip=["mixer"], head=())
    assert sorted(names) == ["experts.down", "experts.up", "head"]
    with pytest.raises(ValueError, match="no 3-D weight"):
        mp.quantize_model(Model(), experts=True, skip=["experts"])
    with pytest.raises(ValueError, match="no 3-D weight"):
        mp.quantize_model(nn.Sequential(nn.Linear(64, 4)), experts=True)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model = Model()
    model.experts.down.data[3, 2, 1] = float("nan")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"experts.down: .*index \(3, 2, 1\)"):
        everything(model)
    assert dict(model.named_modules()) == before
    model.experts.down.data.nan_to_num_()
    everything(model)
    before = dict(model.named_modules())

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(NF4Experts, "dense", fail)
    with pytest.raises(MemoryError):
        mp.dequantize_model(model)
    assert dict(model.named_modules()) == before


def test_shared_layers_stay_shared():
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(64, 4))
    mp.quantize_model(model, head=())
    assert model[0] is model[2] and isinstance(model[0], NF4Linear)
    mp.dequantize_model(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear


def test_dequantising_under_adapters_keeps_them():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    init = lambda layer: nn.init.normal_(layer.lora_b)  # noqa: E731
    mp.inject_qlora(model, ["0"], rank=2, init=init, head=())
    x = torch.randn(3, 64)
    expected = model(x)
    assert sorted(mp.dequantize_model(model)) == ["0.base", "2"]
    assert type(model[0].base) is nn.Linear and type(model[2]) is nn.Linear
    # float32, the same products with the decoded weight: measured 0
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert mp.count_parameters(model).trainable == 2 * (64 + 64)


def test_gpt2_in_four_bits():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    reference = copy.deepcopy(model)
    names = mp.quantize_model(model)
    assert len(names) == 8 and all(type(model.get_submodule(n)) is NF4Conv1D for n in names)
    assert "lm_head" in names.left_out
    for name in names:
        layer = reference.get_submodule(name)
        layer.weight.data = model.get_submodule(name).weight
    rows = torch.randint(50, (2, 7))
    expected = reference(rows).logits
    # float32, the same products: measured 0
    torch.testing.assert_close(model(rows).logits, expected, rtol=1e-5, atol=1e-5)
    mp.dequantize_model(model)
    # the same
    torch.testing.assert_close(model(rows).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["T5", "Bloom", "Mixtral"])
def test_models_that_read_weights_get_the_dequantised_ones(family):
    """T5 and BLOOM look at the dtype of a layer's weight; Mixtral indexes its experts."""
    transformers = pytest.importorskip("transformers")
    rows = torch.randint(3, 50, (2, 7))
    if family == "T5":
        config = transformers.T5Config(
            vocab_size=50, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            decoder_start_token_id=0, feed_forward_proj="gated-gelu",
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config).eval()
        inputs = {"input_ids": rows, "labels": rows}
    elif family == "Bloom":
        config = transformers.BloomConfig(vocab_size=50, hidden_size=64, n_layer=2, n_head=4)
        model = transformers.BloomForCausalLM(config).eval()
        inputs = {"input_ids": rows}
    else:
        config = transformers.MixtralConfig(
            vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        )  # fmt: skip
        model = transformers.MixtralForCausalLM(config).eval()
        inputs = {"input_ids": rows}
        with pytest.raises(ValueError, match="set_experts_implementation"):
            mp.quantize_model(model, experts=True)
        model.set_experts_implementation("eager")
    names = mp.quantize_model(model, experts=family == "Mixtral")
    assert any("experts" in name for name in names) == (family == "Mixtral")
    logits = model(**inputs).logits
    reference = copy.deepcopy(model)
    mp.dequantize_model(reference)
    expected = reference(**inputs).logits
    # float32, the same products through two layers: measured 0
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    weight = model.get_submodule(names[0]).weight
    assert weight.dtype == torch.float32 and weight.dim() == (3 if "experts" in names[0] else 2)


def test_reading_the_weight_in_an_encoder_layer():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    mp.quantize_model(layer)
    x = torch.randn(2, 5, 64)
    trained = layer.train()(x)
    with torch.no_grad():  # the fast path multiplies by linear1.weight itself
        fast = layer.eval()(x)
    # float32, other kernels of torch, values up to 3: measured 6e-7
    torch.testing.assert_close(fast, trained, rtol=1e-5, atol=1e-5)


def test_quantizable_says_the_same_on_meta():
    with torch.device("meta"):
        model = Model()
    chosen, left_out = quantizable(survey(model))
    assert list(chosen) == ["mixer", "head"] and set(left_out) == {
        "embed", "experts.up", "experts.down", "position",
    }  # fmt: skip


class NeverRun(nn.Linear):
    def forward(self, x):
        raise AssertionError("it was not to be tried")


def test_what_stays_dense_anyway_is_not_tried():
    model = nn.Sequential(NeverRun(64, 64), NeverRun(64, 32), nn.Linear(64, 64))
    names = mp.quantize_model(model, skip=["0"], head="1")
    assert names == ["2"] and names.left_out["0"] == "skipped"


def test_offloaded_weights_are_refused_before_anything_changes():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(64, 64))
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        mp.inject_lora(model, ["0"], 2)
    assert type(model[0]) is nn.Linear


def test_hooks_survive_quantisation():
    model, calls = nn.Sequential(nn.Linear(64, 8)), []
    handle = model[0].register_forward_hook(lambda *a: calls.append(1))
    mp.quantize_model(model)
    model(torch.randn(1, 64))
    handle.remove()
    model(torch.randn(1, 64))
    assert calls == [1]
