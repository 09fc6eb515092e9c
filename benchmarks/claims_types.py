"""One run of the claims job on data types: errors of weights, and what they do to a text's loss.

The score is how much the loss of SmolLM2 on a text rises when all its linear layers but the head
are rounded; a seed is another part of the text, and other Gaussian weights.
"""

import pydoc_data.topics
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.claims_arms import Arm
from benchmarks.data_types import CODEBOOKS, minilm_weights, rounded, text_loss
from benchmarks.models import load_model, load_tokenizer
from minipeft.adapters.targets import survey
from minipeft.model.quantize import quantizable


class Sizes(NamedTuple):
    """Tokens of text for each seed."""

    tokens: int = 2048


@cache
def text(seed: int, tokens: int) -> Tensor:
    """The part of Python's documentation that this seed reads."""
    topics = pydoc_data.topics.topics
    words = "\n".join(topics[name] for name in sorted(topics))[: 8 * tokens * (seed + 1)]
    return torch.tensor(load_tokenizer()(words)["input_ids"])[tokens * seed : tokens * (seed + 1)]


@cache
def exact_loss(seed: int, tokens: int) -> float:
    """The loss of the model as it is."""
    return text_loss(load_model(None, torch.float32, 0).eval(), text(seed, tokens))


def relative_error(weights: list[Tensor], settings: dict[str, Any]) -> float:
    """|error| / |w| in the Euclidean norm over all the weights."""
    book, lost, whole = CODEBOOKS[settings["kind"]], 0.0, 0.0
    for w in weights:
        error = rounded(w, book, settings["block_size"], settings["nested"]) - w
        lost += float(error.double().square().sum())
        whole += float(w.double().square().sum())
    return (lost / whole) ** 0.5


def run(arm: Arm, rate: float, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Round all weights of a data type and block size; `rate` has no use here."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = [torch.randn(1024, 1024, generator=generator) for _ in range(2)]
    model = load_model(None, torch.float32, 0).eval()
    chosen, _ = quantizable(survey(model))
    layers = [layer for layer in chosen.values() if isinstance(layer, nn.Linear)]
    found = {
        "error_gaussian": relative_error(gaussian, arm.settings),
        "error_minilm": relative_error(minilm_weights(), arm.settings) if seed == 0 else None,
    }
    lost = whole = 0.0
    for layer in layers:
        w = layer.weight.data
        layer.weight.data = rounded(
            w, CODEBOOKS[arm.settings["kind"]], arm.settings["block_size"], arm.settings["nested"]
        )
        lost += float((layer.weight.data - w).double().square().sum())
        whole += float(w.double().square().sum())
    rise = text_loss(model, text(seed, sizes.tokens)) - exact_loss(seed, sizes.tokens)
    return {**found, "error_smollm2": (lost / whole) ** 0.5, "valid": rise, "test": rise,
            "trainable": 0}  # fmt: skip
