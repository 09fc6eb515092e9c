"""One run of the claims job on CoNLL-2003 named entities with MiniLM; the score is span F1."""

import random
from functools import cache
from typing import Any, NamedTuple

import torch

from benchmarks import ner
from benchmarks.claims_arms import Arm
from benchmarks.claims_methods import groups_of, prepare, train
from benchmarks.ner_data import LABELS, Row, collate, encode, sentences, shuffled

HEAD_RATE = 5e-3  # of the new head, in every arm but "head only", which tunes it
TARGETS = {
    "all": r"bert\.encoder\..*(query|key|value|dense)",
    "attention": r"bert\.encoder\.layer\.\d+\.attention\..*(query|key|value|dense)",
    "mlp": r"bert\.encoder\.layer\.\d+\.(intermediate|output)\.dense",
}


class Sizes(NamedTuple):
    """Sentences of each part, and how often the training sentences are seen."""

    train: int = 400
    valid: int = 200
    test: int = 400
    epochs: int = 3


@cache
def rows(part: str, count: int) -> list[Row]:
    """The first sentences of a part, as tokens."""
    return encode(ner.load_tokenizer(), sentences(part, count))


def build() -> Any:
    """MiniLM with a new head of nine labels, without dropout."""
    from transformers import BertForTokenClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the head is new is known
    logging.disable_progress_bar()
    return BertForTokenClassification.from_pretrained(
        ner.folder(), num_labels=len(LABELS), dtype=torch.float32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def run(arm: Arm, rate: float, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train with one rate and seed; F1 on validation and on test sentences after the last epoch.

    The seed draws the head, the factors or the prefix, and the order of the sentences.
    """
    torch.manual_seed(seed)
    order = random.Random(seed)
    model = build()
    prepare(model, arm, TARGETS[arm.settings.get("where", "all")], "classifier")
    data = rows("train", sizes.train)
    batches = [some for _ in range(sizes.epochs) for some in shuffled(data, arm.batch, order)]

    def loss_at(step: int) -> torch.Tensor:
        ids, mask, labels = collate(batches[step])
        loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss

    found = train(
        model, groups_of(model, arm, rate, "classifier", HEAD_RATE), len(batches), loss_at
    )
    for part, count in (("valid", sizes.valid), ("test", sizes.test)):
        found[part] = ner.evaluate(model, rows(part, count)) if found["finite"] else None
    return found
