"""A vocabulary that grows: `python -m benchmarks.vocabulary`, under three minutes on one core.

SmolLM2-135M writes most Chinese characters as two or three bytes.  The 200 pieces that save most
tokens in Chinese conversations get tokens of their own, and their rows alone train:

    before      the model and its tokenizer as they are
    new         200 rows more, each the mean of the rows that its piece was written with
    trained     after some steps on other conversations
    loaded      from the adapter's file, onto the model as it was
    merged      into one plain table

Perplexity is that of a character, so that tokenizers compare.  The table and the head are tied.
"""

import argparse
import math
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minipeft as mp
from benchmarks.models import data_file, load_model, load_tokenizer
from benchmarks.output import save_result

RESULTS = Path(__file__).parent / "results"
PACKAGE, FOLDER = "chatterbot-corpus", "chatterbot_corpus/data/chinese"
HELD_OUT = 6  # every sixth conversation is for validation
LONGEST, RAREST = 4, 3  # characters of a piece; times that it must be there
ROWS = 8  # conversations of a batch
IGNORED = -100
# of the perplexity: float32 sums in another order over 30 layers
ALLOWED = 1e-4


def conversations() -> list[str]:
    """The different Chinese conversations, a turn a line, in the files' order."""
    import yaml

    found: dict[str, None] = {}
    for path in sorted(data_file(PACKAGE, FOLDER).glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            found["\n".join(str(turn).strip() for turn in turns) + "\n"] = None
    return list(found)


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Conversations to train on, and those to validate with."""
    train = [text for number, text in enumerate(texts) if number % HELD_OUT]
    return train, list(texts[::HELD_OUT])


def new_pieces(texts: Iterable[str], tokenizer: Any, count: int) -> list[str]:
    """The `count` runs of Chinese characters that save most tokens as one each, best first."""
    times: Counter[str] = Counter()
    for text in texts:
        for run in re.findall("[\u4e00-\u9fff]+", text):
            for size in range(1, LONGEST + 1):
                times.update(run[i : i + size] for i in range(len(run) - size + 1))
    often = [piece for piece, number in times.items() if number >= RAREST]
    tokens = {piece: len(tokenizer.encode(piece, add_special_tokens=False)) for piece in often}
    saved = {piece: times[piece] * (tokens[piece] - 1) for piece in often if tokens[piece] > 1}
    return sorted(saved, key=lambda piece: (-saved[piece], piece))[:count]


def starts(model: Any, tokenizer: Any, pieces: Iterable[str]) -> Tensor:
    """For each piece the mean of the rows that it is written with so far: (pieces, dim)."""
    table = model.get_input_embeddings().weight.detach()
    ids = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    return torch.stack([table[own].mean(0) for own in ids])


def batch(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and labels, (texts, tokens); each text begins with a token that is not learnt."""
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(t, add_special_tokens=False)] for t in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
    wanted = torch.tensor([[False] + [True] * (len(r) - 1) + [False] * (longest - len(r))
                           for r in rows])  # fmt: skip
    return ids, ids.where(wanted, IGNORED)


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """exp of the loss of all tokens over the number of characters."""
    total = 0.0
    by_length = sorted(texts, key=len)
    for first in range(0, len(texts), ROWS):
        ids, labels = batch(tokenizer, by_length[first : first + ROWS])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
        )
    return math.exp(total / sum(map(len, texts)))


def train(
    model: Any, tokenizer: Any, texts: Sequence[str], *, steps: int, rate: float
) -> list[float]:
    """The loss of each step, a token's, on batches in a fixed order."""
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=rate, weight_decay=0.0)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    losses = []
    model.train()
    for step in range(steps):
        chosen = [texts[order[(step * ROWS + i) % len(texts)]] for i in range(ROWS)]
        ids, labels = batch(tokenizer, chosen)
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def run(
    model: Any, fresh: Any, tokenizer: Any, texts: Sequence[str], *, count: int, steps: int,
    rate: float, validate: int,
) -> dict[str, Any]:  # fmt: skip
    """All figures; `fresh` is the model once more, for loading onto.

    Raises:
        RuntimeError: training does not lower the loss, or a loaded or merged model differs.
    """
    learnt, held_out = split(texts)
    held_out = held_out[:validate]
    found: dict[str, Any] = {"characters": sum(map(len, held_out))}

    def measure(what: str, own: Any) -> None:
        tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in held_out)
        found[what] = perplexity(own, tokenizer, held_out)
        print(f"{what:8} {tokens / found['characters']:.2f} tokens a character, "
              f"perplexity of a character {found[what]:.3f}", flush=True)  # fmt: skip

    measure("before", model)
    pieces = new_pieces(learnt, tokenizer, count)
    rows = starts(model, tokenizer, pieces)
    old = len(tokenizer)
    if tokenizer.add_tokens(pieces) != len(pieces) or old != model.config.vocab_size:
        raise RuntimeError("the new tokens' ids are not those behind the table")
    mp.extend_vocabulary(model, len(pieces), init=rows)
    found["trainable"] = mp.count_parameters(model).trainable
    measure("new", model)
    found["losses"] = train(model, tokenizer, learnt, steps=steps, rate=rate)
    measure("trained", model)
    with tempfile.TemporaryDirectory() as folder:
        mp.save_peft(model, folder)
        found["bytes"] = sum(path.stat().st_size for path in Path(folder).iterdir())
        mp.load_peft(fresh, folder)
    measure("loaded", fresh)
    mp.remove(model, merge=True)
    measure("merged", model)
    losses: list[float] = found["losses"]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    print(
        f"{len(pieces)} pieces, {found['trainable']:,} numbers train; loss of a token "
        f"{first:.3f} > {last:.3f} in {steps} steps; file of {found['bytes']:,} bytes"
    )
    if not found["trained"] < found["new"] or not last < first:
        raise RuntimeError("training did not lower the loss")
    for what in ("loaded", "merged"):
        if abs(found[what] / found["trained"] - 1) > ALLOWED:
            raise RuntimeError(f"{what}: {found[what]}, and trained {found['trained']}")
    return {"pieces": pieces, **found}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures to the folder of results."""
    parser = argparse.ArgumentParser(prog="benchmarks.vocabulary")
    parser.add_argument("--pieces", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--validate", type=int, default=16, help="conversations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    model, fresh = (load_model(None, torch.float32, 0).eval() for _ in range(2))
    found = run(
        model, fresh, load_tokenizer(), conversations(), count=options.pieces,
        steps=options.steps, rate=options.rate, validate=options.validate,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s")
    settings = {k: v for k, v in vars(options).items() if k != "output"}
    save_result(options.output, "vocabulary", settings=settings, seconds=seconds, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
