"""A 4-bit Hugging Face model made dense is a dense model for transformers too."""

import copy

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.integrations.transformers.meta import meta_model

transformers = pytest.importorskip("transformers")
ROWS = torch.arange(14).view(2, 7)


def plain():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def four_bit(tmp_path):
    """A model read from a 4-bit checkpoint, whose configuration says so."""
    model = plain()
    mp.quantize_model(model)
    mp.io.bitsandbytes.save_quantized(model, tmp_path / "four")
    loaded = meta_model(tmp_path / "four").eval()
    mp.io.bitsandbytes.load_quantized(loaded, tmp_path / "four")
    assert loaded.config.quantization_config["load_in_4bit"]
    return loaded


def dequantised(model):
    mp.dequantize_model(model)


def merged(model):
    mp.inject_lora(model, "all-linear", 2)
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.05)
    mp.remove(model, merge=True)


@pytest.mark.parametrize("make_dense", [dequantised, merged])
def test_it_is_saved_and_loaded_with_equal_logits(make_dense, tmp_path):
    model = four_bit(tmp_path)
    make_dense(model)
    expected = model(ROWS).logits
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert torch.equal(again(ROWS).logits, expected)


def test_what_the_loader_set_goes_too(tmp_path):
    model = four_bit(tmp_path)
    model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
    model.hf_quantizer, model.is_quantized = object(), True
    mp.dequantize_model(model)
    for name in ("is_loaded_in_4bit", "quantization_method", "hf_quantizer", "is_quantized"):
        assert name not in vars(model), name
    model.half()  # transformers refuses to cast a model that says it is 4-bit


def test_it_stays_while_a_layer_is_in_four_bits(tmp_path):
    model = four_bit(tmp_path)
    mp.inject_lora(model, ["q_proj"], 2)
    mp.remove(model, merge=True)
    assert isinstance(model.model.layers[0].self_attn.k_proj, mp.NF4Linear)
    assert model.config.quantization_config["load_in_4bit"]
    mp.inject_lora(model, ["v_proj"], 2)
    with pytest.warns(UserWarning, match="moved them by"):
        mp.remove(model, merge=True, requantize=True)
    assert model.config.quantization_config["load_in_4bit"]
    mp.dequantize_model(model)
    assert not hasattr(model.config, "quantization_config")


def test_a_failure_leaves_it(tmp_path, monkeypatch):
    model = four_bit(tmp_path)
    before, said = dict(model.named_modules()), copy.deepcopy(model.config.quantization_config)

    def fail(*args):
        raise MemoryError("no room")

    last = model.model.layers[1].mlp.down_proj
    monkeypatch.setattr(last, "dense", fail, raising=False)
    with pytest.raises(MemoryError):
        mp.dequantize_model(model)
    assert dict(model.named_modules()) == before
    assert model.config.quantization_config == said


def test_what_another_library_says_of_its_own_layers_stays():
    model = plain()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    mp.inject_lora(model, ["q_proj"], 2)
    mp.remove(model, merge=True)
    assert model.config.quantization_config["quant_method"] == "gptq"
