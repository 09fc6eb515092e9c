"""Conversations as batches: chat format, labels on the replies only, validation kept apart.

The chit-chat data set has two people talking.  The first to speak is the user, the other the
assistant, whose replies are learnt.  Each conversation is cut to the sequence length.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.models import data_file

IGNORED = -100  # the label of a token that is not learnt
Message = dict[str, str]


class Batches(NamedTuple):
    """Token ids, labels and attention masks, each (rows, length) int64; padded on the right."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor

    def rows(self, first: int, last: int) -> "Batches":
        """Some of the rows."""
        return Batches(*(tensor[first:last] for tensor in self))

    def digest(self) -> str:
        """A sha256 that shows that two runs had the same batches."""
        digest = hashlib.sha256()
        for tensor in self:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def conversations() -> list[list[Message]]:
    """Every conversation with at least two turns, in the file's order."""
    path = data_file("chitchat-dataset", "chitchat_dataset/dataset.json")
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        messages = []
        for turn in entry["messages"]:
            text = "\n".join(part["text"].strip() for part in turn if part["text"].strip())
            if text:
                role = "assistant" if len(messages) % 2 else "user"
                messages.append({"role": role, "content": text})
        if len(messages) >= 2:
            found.append(messages)
    return found


def lines_of(path: Path) -> list[list[Message]]:
    """A JSON Lines file: in each line {"messages": [{"role": ..., "content": ...}, ...]}.

    A line {"text": ...} is one reply, so that all of it is learnt.

    Raises:
        ValueError: another line; its number and the file are named.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if "text" in entry:
                entry = {"messages": [{"role": "assistant", "content": entry["text"]}]}
            messages = [{"role": str(m["role"]), "content": str(m["content"])}
                        for m in entry["messages"]]  # fmt: skip
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"messages": [...]}} or {{"text": ...}} '
                f"({error!r})"
            ) from error
        found.append(messages)
    return found


def encode(tokenizer: Any, messages: list[Message], length: int) -> tuple[list[int], list[int]]:
    """Token ids of a conversation in ChatML, and labels: reply tokens and their end mark."""
    ids: list[int] = []
    labels: list[int] = []

    def add(text: str, learnt: bool) -> None:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(tokens)
        labels.extend(tokens if learnt else [IGNORED] * len(tokens))

    for message in messages:
        reply = message["role"] == "assistant"
        add(f"<|im_start|>{message['role']}\n", False)
        add(f"{message['content']}<|im_end|>", reply)
        add("\n", False)
        if len(ids) >= length:
            break
    return ids[:length], labels[:length]


def split(count: int, seed: int) -> list[int]:
    """The conversations' order: the first are for validation, the next for training."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def chat_batches(
    tokenizer: Any, *, train_rows: int, validation_rows: int, length: int, seed: int,
    data: str | None = None,
) -> tuple[Batches, Batches]:  # fmt: skip
    """Training and validation rows from different conversations; the same for the same seed.

    `data` is a JSON Lines file (`lines_of`); None: the chit-chat data set.
    """
    every = conversations() if data is None else lines_of(Path(data))
    rows: list[tuple[list[int], list[int]]] = []
    for index in split(len(every), seed):
        ids, labels = encode(tokenizer, every[index], length)
        if any(label != IGNORED for label in labels[1:]):
            rows.append((ids, labels))
        if len(rows) == train_rows + validation_rows:
            break
    else:
        raise ValueError(
            f"chat_batches: {train_rows + validation_rows} rows asked for, the data has {len(rows)}"
        )
    shape = (len(rows), length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.int64)
    labels_ = torch.full(shape, IGNORED)
    for row, (ids, labels) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels_[row, : len(ids)] = torch.tensor(labels)
        mask[row, : len(ids)] = 1
    batches = Batches(input_ids, labels_, mask)
    return batches.rows(validation_rows, len(rows)), batches.rows(0, validation_rows)


def random_batches(
    vocabulary: int, *, train_rows: int, validation_rows: int, length: int, seed: int
) -> tuple[Batches, Batches]:
    """Random tokens for models with random weights; every token is learnt."""
    generator = torch.Generator().manual_seed(seed)
    shape = (train_rows + validation_rows, length)
    ids = torch.randint(vocabulary, shape, generator=generator)
    batches = Batches(ids, ids.clone(), torch.ones_like(ids))
    return batches.rows(validation_rows, shape[0]), batches.rows(0, validation_rows)
