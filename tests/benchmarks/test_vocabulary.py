"""The vocabulary benchmark: its pieces, its batches, and a tiny run."""

import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("yaml")

from benchmarks.models import LlamaSizes, load_model
from benchmarks.vocabulary import IGNORED, batch, new_pieces, perplexity, run, split


class Bytes:
    """A tokenizer of UTF-8 bytes, with two marks and new pieces behind them."""

    bos_token_id, eos_token_id = 256, 257

    def __init__(self):
        self.added = []

    def __len__(self):
        return 258 + len(self.added)

    def add_tokens(self, pieces):
        self.added += pieces
        return len(pieces)

    def encode(self, text, *, add_special_tokens):
        ids = []
        while text:
            piece = next((p for p in self.added if text.startswith(p)), text[0])
            whole = [258 + self.added.index(piece)] if piece in self.added else [*piece.encode()]
            ids += whole
            text = text[len(piece) :]
        return ids


TEXTS = ["你好吗\n我很好 ok\n", "你好\n再见\n", "我很好\n你呢\n", "再见 bye\n"] * 6


def test_pieces_are_those_that_save_most_tokens():
    tokenizer = Bytes()
    pieces = new_pieces(TEXTS, tokenizer, 3)
    # "我很好" is there 12 times and takes 9 bytes: 96 tokens less; each of the others saves fewer
    assert pieces[0] == "我很好" and len(set(pieces)) == 3
    assert all(len(tokenizer.encode(p, add_special_tokens=False)) > 1 for p in pieces)
    assert "ok" not in new_pieces(TEXTS, tokenizer, 1000)


def test_a_batch_learns_all_tokens_but_the_first_and_the_padding():
    ids, labels = batch(Bytes(), ["ab", "a"])
    assert ids.tolist() == [[256, 97, 98], [256, 97, 257]]
    assert labels.tolist() == [[IGNORED, 97, 98], [IGNORED, 97, IGNORED]]


def test_perplexity_is_that_of_a_character():
    class Uniform(torch.nn.Module):
        def forward(self, ids, use_cache):
            return type("Out", (), {"logits": torch.zeros(*ids.shape, 258)})()

    # three bytes a character, each one of 258 tokens
    assert perplexity(Uniform(), Bytes(), ["你好", "吗"]) == pytest.approx(258**3, rel=1e-5)


def test_training_and_validation_are_apart():
    train, held_out = split([str(i) for i in range(14)])
    assert held_out == ["0", "6", "12"] and not set(train) & set(held_out)


def test_a_tiny_run_goes_through_all_five():
    sizes = LlamaSizes(vocabulary=258)
    model, fresh = (load_model(sizes, torch.float32, 0).eval() for _ in range(2))
    found = run(model, fresh, Bytes(), TEXTS, count=4, steps=8, rate=1e-2, validate=3)
    assert found["trainable"] == 2 * 4 * sizes.hidden and len(found["pieces"]) == 4
    assert all(math.isfinite(found[w]) for w in ("before", "new", "trained", "loaded", "merged"))
    assert model.config.vocab_size == fresh.config.vocab_size == 262
