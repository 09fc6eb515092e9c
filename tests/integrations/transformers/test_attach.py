"""Each function that attaches names itself in its errors, and says what is true of the model."""

import sys

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io.prefixes import load_prefix, save_prefix

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "vocab_size": 97}  # fmt: skip
ATTACH = {"attach_prefix": mp.attach_prefix, "attach_prompt": mp.attach_prompt}


def llama(**settings):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **settings)).eval()


def flash():
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


def ibert():
    return transformers.IBertModel(transformers.IBertConfig(**SIZES))


def on_meta():
    with torch.device("meta"):
        return llama()


def taken():
    model = llama()
    mp.attach_prefix(model, 3)
    return model


def with_rows():
    model = llama()
    mp.inject_lora(model, ["q_proj"], 2)
    mp.use_adapters(model, rows=["default", None])
    return model


MODELS = {
    "no transformers model": (lambda: nn.Linear(4, 4), "expected a transformers model, got Linear"),
    "no table": (ibert, "IBertModel embeds its input by a QuantEmbedding"),
    "another implementation": (flash, "attention implementation 'flash_attention_2'"),
    "no values": (on_meta, "the model has no values yet"),
    "a name that is taken": (taken, "has a prefix called 'default' already"),
    "rows": (with_rows, "rows of a batch use different adapters"),
}


@pytest.mark.parametrize("function", ATTACH)
@pytest.mark.parametrize("case", MODELS)
def test_errors_begin_with_the_function_that_was_called(function, case):
    make, message = MODELS[case]
    model = make()
    with pytest.raises((ValueError, TypeError)) as error:
        ATTACH[function](model, 3)
    assert str(error.value).startswith(f"{function}: ")
    assert message in str(error.value)


def test_loading_names_the_loader(tmp_path):
    for attach, save, load in (
        (mp.attach_prefix, mp.save_peft, mp.load_peft),
        (mp.attach_prompt, save_prefix, load_prefix),
    ):
        model = llama()
        attach(model, 3)
        folder = tmp_path / load.__name__
        save(model, folder)
        with pytest.raises(ValueError, match=f"^{load.__name__}: attention implementation"):
            load(flash(), folder)


def test_load_tokens_names_itself():
    model = llama()
    prefix = mp.attach_prefix(model, 3)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"^load_tokens: attention implementation"):
        prefix.load_tokens(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("function", ATTACH)
def test_without_transformers_the_extra_is_named(function, monkeypatch):
    model = llama()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=rf"^{function} needs transformers .*minipeft\[hf\]"):
        ATTACH[function](model, 3)


def test_a_key_that_no_dictionary_of_modules_takes():
    for function, attach in ATTACH.items():
        with pytest.raises(ValueError, match=f"^{function}: name='keys' means something"):
            attach(llama(), 3, name="keys")
