"""Prompts and prefixes on SmolLM2: `python -m benchmarks.prompts`.

What each method learns from the same chit-chat in the same number of steps: loss of replies that
were not trained on, before and after, and trainable parameters.  The learning rates are those that
papers and PEFT's examples give for each kind, not tuned here; one seed, few steps.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import minipeft as mp
from benchmarks.data import Batches, chat_batches
from benchmarks.inits import validation_loss
from benchmarks.loss import loss_of
from benchmarks.models import load_model, load_tokenizer
from benchmarks.output import save_result
from minipeft.adapters.progress import Progress

RESULTS = Path(__file__).parent / "results"
TEXT = "The following is a casual chat between two people. The reply is short and friendly."


def _nf4_prefix(model: Any, length: int) -> Any:
    mp.quantize_model(model)
    return mp.attach_prefix(model, length)


def _from_text(model: Any, length: int) -> Any:
    ids = load_tokenizer()(TEXT, return_tensors="pt").input_ids
    return mp.attach_prompt(model, length, init=ids)


METHODS: dict[str, tuple[float, Callable[[Any, int], Any]]] = {
    "prefix": (1e-2, lambda m, n: mp.attach_prefix(m, n)),
    "prefix, MLP of 64": (1e-3, lambda m, n: mp.attach_prefix(m, n, hidden=64)),
    "prefix, gated": (1e-2, lambda m, n: mp.attach_prefix(m, n, gated=True)),
    "prefix on NF4": (1e-2, _nf4_prefix),
    "prompt, random": (3e-2, lambda m, n: mp.attach_prompt(m, n)),
    "prompt, from the vocabulary": (3e-2, lambda m, n: mp.attach_prompt(m, n, init="vocabulary")),
    "prompt, from a text": (3e-2, _from_text),
    "P-tuning v1, MLP": (1e-3, lambda m, n: mp.attach_prompt(m, n, kind="mlp", hidden=128)),
}


def logits(model: Any, batches: Batches) -> torch.Tensor:
    """Of one row."""
    with torch.no_grad():
        row = batches.rows(0, 1)
        found: torch.Tensor = model(
            input_ids=row.input_ids, attention_mask=row.attention_mask, use_cache=False
        ).logits
    return found


def run(name: str, arguments: argparse.Namespace, train: Batches, valid: Batches) -> dict[str, Any]:
    """Attach, train and evaluate one method."""
    torch.manual_seed(arguments.seed)
    model: Any = load_model(None, torch.bfloat16, 0).eval()
    rate, attach = METHODS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(model, arguments.prompt_length)
    with mp.disable_adapters(model):
        untouched = validation_loss(model, valid)
        base = logits(model, valid)
    started = validation_loss(model, valid)
    model.train()
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, arguments.steps)
    losses, begun = [], time.perf_counter()
    for step in Progress(range(arguments.steps), desc=name, leave=False):
        loss = loss_of(model, train.rows(step * arguments.batch, (step + 1) * arguments.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mp.adapter_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    seconds = time.perf_counter() - begun
    after = validation_loss(model, valid)
    model.eval()
    with mp.disable_adapters(model):
        off = logits(model, valid)
    return {
        "learning_rate": rate, "untouched": untouched, "at_start": started, "after": after,
        "trainable": mp.count_parameters(model).trainable, "seconds_per_step":
        seconds / arguments.steps, "off_bit_equal": bool(torch.equal(off, base)),
        "train_losses": losses,
    }  # fmt: skip


def main() -> int:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=192, help="tokens in a conversation")
    parser.add_argument("--prompt-length", type=int, default=16)
    parser.add_argument("--validation-rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    train, valid = chat_batches(
        load_tokenizer(), train_rows=arguments.batch * arguments.steps,
        validation_rows=arguments.validation_rows, length=arguments.length, seed=arguments.seed,
    )  # fmt: skip
    table = Table("method", "parameters", "lr", "untouched", "at start", "after", "s/step", "off")
    found: dict[str, Any] = {}
    for name in arguments.methods:
        found[name] = row = run(name, arguments, train, valid)
        table.add_row(
            name, f"{row['trainable']:,}", f"{row['learning_rate']:g}", f"{row['untouched']:.3f}",
            f"{row['at_start']:.3f}", f"{row['after']:.3f}", f"{row['seconds_per_step']:.2f}",
            "bit-equal" if row["off_bit_equal"] else "differs",
        )  # fmt: skip
        print(f"{name}: {row['untouched']:.3f} -> {row['after']:.3f}", flush=True)
    Console(width=110).print(table)
    options = {k: v for k, v in vars(arguments).items() if k != "output"}
    save_result(arguments.output, "prompts", options=options, methods=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
