"""Keywords of PEFT's get an error that says this library's."""

import inspect

import pytest
from torch import nn

import minipeft as mp
from minipeft.model.peft_words import OURS

FUNCTIONS = [mp.inject_lora, mp.inject_qlora, lambda model, *a, **k: mp.inject_lora(
    model, *a, **k, name="second")]  # fmt: skip


def model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


@pytest.mark.parametrize("function", FUNCTIONS, ids=["inject_lora", "inject_qlora", "one more"])
@pytest.mark.parametrize("word", OURS)
def test_a_word_of_peft_gets_ours_and_nothing_changes(function, word):
    plain = model()
    before = [(name, id(part)) for name, part in plain.named_modules()]
    with pytest.raises(TypeError, match=f"PEFT's {word} is here {OURS[word][:5]}"):
        function(plain, ["0"], **{word: 8})
    with pytest.raises(TypeError, match=f"no keyword '{word}'"):
        function(plain, ["0"], 4, **{word: 8})
    assert [(name, id(part)) for name, part in plain.named_modules()] == before


def test_every_argument_by_the_words_of_peft():
    with pytest.raises(TypeError, match="PEFT's target_modules is here target"):
        mp.inject_lora(model(), target_modules=["0"], r=8, lora_alpha=16)


@pytest.mark.parametrize(
    ("word", "hint"),
    [("drpout", "did you mean dropout"), ("lora_r", "it takes model, target, rank, alpha"),
     ("lora_alphas", "did you mean alpha")],
)  # fmt: skip
def test_a_word_of_nobody_gets_the_nearest_one_or_all(word, hint):
    with pytest.raises(TypeError, match=hint):
        mp.inject_lora(model(), ["0"], 4, **{word: 0.1})


def test_words_that_are_known_pass():
    names = mp.inject_lora(
        model(), ["0"], rank=2, alpha=4, exclude=["2"], dropout=0.1, rank_stabilized=True,
        init=mp.starts.gaussian(), dora=True,
    )  # fmt: skip
    assert names == ["0"]


def test_signature_and_docstring_stay():
    parameters = inspect.signature(mp.inject_lora).parameters
    assert list(parameters)[:4] == ["model", "target", "rank", "alpha"]
    assert mp.inject_lora.__doc__.startswith("Wrap the layers")
