"""The matrix of the survey's systems: each cell is measured again."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import families

# logits of up to about 10 in float32, whose sums of some hundred products come in another order
# (with a cache, in a merged weight, PEFT's scaling behind B): a few units in the last place of 1e-6
ROUNDING = 1e-5
BOUNDS = {
    "LoRA": ROUNDING, "P-tuning v2": ROUNDING, "special step": ROUNDING,
    "QLoRA": 0,  # the same numbers in the same order
    "files": 1e-8,  # the same; [PAD]'s row is a mean of 96, a unit in the last place of .06
}  # fmt: skip
FAST = {
    ("LLaMA, alpaca-lora", "LoRA"), ("LLaMA, alpaca-lora", "special step"),
    ("Falcon-7B", "QLoRA"), ("MOSS", "P-tuning v2"), ("ChatGLM-6B", "LoRA"),
    ("ChatGLM-6B", "P-tuning v2"), ("VisualGLM", "files"), ("PandaGPT", "files"),
}  # fmt: skip
CELLS = [
    pytest.param(name, cell, marks=() if (name, cell) in FAST else (pytest.mark.slow,))
    for name in families.systems()
    for cell in families.CELLS
]


@pytest.mark.parametrize(("name", "cell"), CELLS)
def test_cell(name, cell):
    value = families.measured(name, cell)
    assert value <= BOUNDS[cell]


def test_the_page_has_a_row_for_each_system():
    text = families.PATH.read_text()
    for name, system in families.systems().items():
        assert f"\n| {name} | " in text
        assert f"{system.special[0]}: " in text and f"{system.files[0]}: " in text


def test_a_difference_would_be_seen():
    """A cell's measure is not 0 whatever happens: another model's logits differ."""
    system = families.systems()["LLaMA, alpaca-lora"]
    logits = torch.zeros(2, 9, families.VOCABULARY)
    assert families.steps.off(system.build(), logits, system.inputs()) > 0.1


def test_a_cell_of_nan_is_nan(monkeypatch):
    """PEFT's logits come second: a NaN there must not be passed over."""
    values = iter([0.0, float("nan")])
    monkeypatch.setattr(families.steps, "off", lambda *_: next(values))
    assert families.measured("LLaMA, alpaca-lora", "LoRA") != 0
    assert families.steps.worst(0.0, float("nan")) != 0 and families.steps.worst(1.0, 2.0) == 2
