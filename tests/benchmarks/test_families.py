"""The matrix of the survey's systems: each cell is measured again."""

import pytest
import torch

for package in ("transformers", "peft", "safetensors"):
    pytest.importorskip(package)

from benchmarks import families

# logits of up to about 10 in float32, whose sums of some hundred products may come in another
# order (with a cache, or in a merged weight): a few units in the last place, each 1e-6
ROUNDING = 2e-5
EXACT = ("LoRA", "QLoRA", "files")  # the same numbers in the same order
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
    assert value <= (0 if cell in EXACT else ROUNDING)


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
