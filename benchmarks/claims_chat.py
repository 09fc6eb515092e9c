"""One run of the claims job on conversations with SmolLM2-135M; the score is the replies' loss.

Weights, factors and prefixes are as in the other jobs: the frozen model is in bfloat16, what trains
is in float32.  Full fine-tuning keeps its weights in float32 and computes in bfloat16 (autocast):
in bfloat16 a small update of a weight would be lost in rounding.
"""

import copy
import math
import pydoc_data.topics
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

from benchmarks.claims_arms import SEEDS, Arm
from benchmarks.claims_methods import groups_of, prepare, train
from benchmarks.data import Batches, chat_batches
from benchmarks.data_types import text_loss
from benchmarks.inits import validation_loss
from benchmarks.loss import loss_of
from benchmarks.models import load_model, load_tokenizer

TEXT_TOKENS = 1024  # of Python's documentation: what the model still knows of other text


class Sizes(NamedTuple):
    """Steps of training, tokens of a conversation, conversations that are held out."""

    steps: int = 30
    length: int = 192
    valid: int = 16
    test: int = 24


@cache
def data(sizes: Sizes, batch: int) -> tuple[Batches, Batches, Batches]:
    """Training rows for all seeds one after the other, validation rows, test rows."""
    training, held_out = chat_batches(
        load_tokenizer(), train_rows=len(SEEDS) * sizes.steps * batch,
        validation_rows=sizes.valid + sizes.test, length=sizes.length, seed=0,
    )  # fmt: skip
    return training, held_out.rows(0, sizes.valid), held_out.rows(sizes.valid, 10**9)


@cache
def text() -> torch.Tensor:
    """The first tokens of Python's documentation."""
    topics = pydoc_data.topics.topics
    words = "\n".join(topics[name] for name in sorted(topics))[: 8 * TEXT_TOKENS]
    return torch.tensor(load_tokenizer()(words)["input_ids"][:TEXT_TOKENS])


@cache
def started(name: str, arm_settings: str) -> Any:
    """The prepared model of an arm whose start takes a decomposition of every weight."""
    from benchmarks.claims_arms import BY_NAME

    model = load_model(None, torch.bfloat16, 0)
    prepare(model, BY_NAME[name], "all-linear", None)
    return model


def build(arm: Arm) -> Any:
    """SmolLM2, prepared for the arm."""
    if arm.settings.get("start"):  # the same for every seed and rate
        return copy.deepcopy(started(arm.name, repr(arm.settings)))
    model = load_model(None, torch.float32 if arm.method == "full" else torch.bfloat16, 0)
    prepare(model, arm, "all-linear", None)
    return model


def run(arm: Arm, rate: float, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train with one rate and seed; the loss of replies of other conversations after the last step.

    The seed draws the factors or the prefix, and which conversations are trained on.
    """
    torch.manual_seed(seed)
    model = build(arm)
    training, valid, test = data(sizes, arm.batch)
    first = seed * sizes.steps * arm.batch

    def precision() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if arm.method == "full" else nullcontext()

    def loss_at(step: int) -> torch.Tensor:
        start = first + step * arm.batch
        with precision():
            return loss_of(model, training.rows(start, start + arm.batch))

    found = train(model, groups_of(model, arm, rate, None, rate), sizes.steps, loss_at)
    model.eval()
    with precision():
        scores = {
            "valid": validation_loss(model, valid), "test": validation_loss(model, test),
            "text": text_loss(model, text()),
        }  # fmt: skip
    finite = {key: value if math.isfinite(value) else None for key, value in scores.items()}
    return {**found, **finite}
