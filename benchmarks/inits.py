"""Initialisations of LoRA over an NF4 base: `python -m benchmarks.inits`.

SmolLM2-135M in NF4, the same rank, batches, steps and learning rate for each; what differs is
where the factors start.  Losses are of replies that were not trained on.  One seed, few steps: a
difference of a few thousandths means nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import minipeft as mp
from benchmarks.data import Batches, chat_batches
from benchmarks.loss import decoder_and_head, loss_of
from benchmarks.models import load_model, load_tokenizer
from benchmarks.output import save_result
from minipeft.adapters.progress import Progress

RESULTS = Path(__file__).parent / "results"
INITS: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "Gaussian": mp.starts.gaussian,
    "orthogonal": mp.starts.orthogonal,
    "PiSSA": mp.starts.pissa,
    "OLoRA": mp.starts.olora,
    "LoftQ": mp.starts.loftq,
    "EVA": lambda: None,  # set after injection, from batches
}


def validation_loss(model: Any, batches: Batches) -> float:
    """Mean cross-entropy of the replies."""
    total = count = 0.0
    model.eval()
    with torch.no_grad():
        for first in range(0, len(batches.input_ids), 4):
            batch = batches.rows(first, first + 4)
            learnt = float((batch.labels[:, 1:] != -100).sum())
            total += float(loss_of(model, batch)) * learnt
            count += learnt
    return total / count


def run(name: str, arguments: argparse.Namespace, train: Batches, valid: Batches) -> dict[str, Any]:
    """Prepare, train and evaluate one initialisation."""
    torch.manual_seed(arguments.seed)
    model = load_model(None, torch.bfloat16, 0)
    start = time.perf_counter()
    mp.inject_qlora(model, "all-linear", arguments.rank, arguments.alpha, init=INITS[name]())
    if name == "EVA":
        decoder, _ = decoder_and_head(model)
        size = arguments.batch
        batches = [train.rows(i * size, (i + 1) * size) for i in range(arguments.eva_batches)]
        mp.starts.eva(
            model, batches,
            forward=lambda _, b: decoder(
                input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False
            ),
        )  # fmt: skip
    prepared = time.perf_counter() - start
    before = validation_loss(model, valid)
    model.train()
    trained = [p for p in mp.adapter_parameters(model) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    losses = []
    for step in Progress(range(arguments.steps), desc=name, leave=False):
        loss = loss_of(model, train.rows(step * arguments.batch, (step + 1) * arguments.batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {
        "seconds_to_prepare": prepared, "validation_before": before,
        "validation_after": validation_loss(model, valid), "train_losses": losses,
        "trainable": mp.count_parameters(model).trainable,
    }  # fmt: skip


def main() -> int:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--inits", nargs="+", choices=list(INITS), default=list(INITS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--eva-batches", type=int, default=8)
    parser.add_argument("--validation-rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    train, valid = chat_batches(
        load_tokenizer(), train_rows=arguments.batch * arguments.steps,
        validation_rows=arguments.validation_rows, length=arguments.length, seed=arguments.seed,
    )  # fmt: skip
    table = Table("initialisation", "to prepare s", "loss before", "after", "against default")
    found: dict[str, Any] = {}
    for name in arguments.inits:
        found[name] = run(name, arguments, train, valid)
        after = found[name]["validation_after"]
        against = after - found["default"]["validation_after"] if "default" in found else None
        table.add_row(
            name, f"{found[name]['seconds_to_prepare']:.1f}",
            f"{found[name]['validation_before']:.4f}", f"{after:.4f}",
            "-" if against is None else f"{against:+.4f}",
        )  # fmt: skip
    Console(width=100).print(table)
    options = {k: v for k, v in vars(arguments).items() if k != "output"}
    print(", ".join(f"{key} {value}" for key, value in options.items() if key != "inits"))
    save_result(arguments.output, "inits", options=options, inits=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
