"""What is removed leaves nothing behind: no attribute, hook, method or registered name."""

import functools
import gc
import sys

import pytest
import torch
from torch import nn

import minipeft as mp

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "vocab_size": 97}  # fmt: skip
MODELS = {
    "attention": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "cache": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES)),
}


def state(model):
    """Of each module: its class, and the identity of all that its instance holds, hooks by id."""
    found = {}
    for place, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "config":  # attaching copies it, so that nobody shares it
                found[place, key] = {**vars(value)}
            elif isinstance(value, dict | list | set):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                found[place, key] = [(k, id(v)) for k, v in items]
            elif isinstance(value, functools.partial):  # a method of the instance
                found[place, key] = value.func, [id(argument) for argument in value.args]
            else:
                found[place, key] = value if isinstance(value, bool) else id(value)
        found[place, "class"] = type(module)
    return found


def registered():
    """The names of ours that transformers knows."""
    gc.collect()
    maps = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    return [name for m in maps for name in m._global_mapping if name.startswith("minipeft")]


PUT_IN = {
    "lora": lambda m: mp.inject_lora(m, "all-linear", 2),
    "prefix": lambda m: mp.attach_prefix(m, 3),
    "gated prefix": lambda m: mp.attach_prefix(m, 3, gated=True),
    "prompt": lambda m: mp.attach_prompt(m, 3),
    "4-bit and lora": lambda m: mp.inject_lora(m, "all-linear", 2),
    "lora and prefix": lambda m: (mp.inject_lora(m, "all-linear", 2), mp.attach_prefix(m, 3)),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("what", PUT_IN)
def test_remove_leaves_nothing_behind(what, kind):
    model = MODELS[kind]().eval()
    if what == "4-bit and lora":
        mp.quantize_model(model)
    text = torch.randint(3, 97, (2, 5))
    with torch.no_grad():
        expected = model(text).logits
        before, names = state(model), registered()
        PUT_IN[what](model)
        assert state(model) != before
        model(text)
        mp.remove(model)
        after = state(model)
        assert {key: after.get(key) for key in before | after} == {
            key: before.get(key) for key in before | after
        }
        assert set(registered()) <= set(names)  # the names of models that are gone may go
        assert torch.equal(model(text).logits, expected)


def test_freeing_a_model_changes_no_table_that_others_may_be_reading():
    """Python frees at any moment, also while torch.compile traces a look at that table."""
    model = MODELS["attention"]()
    before = registered()
    mp.attach_prefix(model, 3)
    own = set(registered()) - set(before)
    assert own
    del model
    assert own <= set(registered())
    mp.attach_prefix(MODELS["attention"](), 3)
    assert not own & set(registered())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "what", ["attach the first", "attach a second", "take one off", "the last"]
)
def test_an_error_after_the_last_step_puts_everything_back(what, kind, monkeypatch):
    """A listener may fail when all is done; the prefix that was there then computes as before."""
    model, text = MODELS[kind]().eval(), torch.randint(3, 97, (2, 5))
    if what != "attach the first":
        mp.attach_prefix(model, 3)
    if what == "take one off":
        mp.attach_prefix(model, 2, name="other")
        mp.use_adapters(model, "default")
    with torch.no_grad():
        expected = model(text).logits
        before = state(model)

        def fail(model):
            raise MemoryError("no room")

        def change():
            if what.startswith("attach"):
                mp.attach_prefix(model, 4, name="new")
            else:
                model.minipeft_prefix.remove(name="other" if what == "take one off" else None)

        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["minipeft.inject"], "after_swap", [fail])
            with pytest.raises(MemoryError):
                change()
        assert state(model) == before
        assert torch.equal(model(text).logits, expected)


def test_save_pretrained_is_the_models_own_again_after_remove():
    class Saves(nn.Sequential):
        def save_pretrained(self, path, model_name=None):
            return path, model_name

    model = Saves(nn.Linear(8, 8))
    mp.inject_lora(model, ["0"], 2)
    mp.remove(model)
    assert model.save_pretrained(path="here", model_name="x") == ("here", "x")
