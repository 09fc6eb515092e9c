"""Guanaco of QLoRA (artidoro/qlora: scripts/finetune_guanaco_7b.sh), on SmolLM2-135M.

NF4 with double quantisation; every linear layer but the head, rank 64, alpha 16, dropout .1;
2e-4 constant after a warm-up of .03, gradients clipped to .3, Adam's beta2 .999; batches of texts
of like length.  The prompt is empty there and a conversation is one target: user turns train too,
as the paper says.  Their paged optimiser is left to bitsandbytes.
"""

import torch
from common import IGNORED, batches, train

import minipeft as mp
from benchmarks.models import load_model, load_tokenizer

torch.manual_seed(0)
data = batches(load_tokenizer(), "guanaco", size=2, turns=4, length=96, everything=True)
data.sort(key=lambda one: one["input_ids"].shape[1])  # group_by_length

model = load_model(None, torch.float32, seed=0)
names = mp.inject_qlora(model, "all-linear", rank=64, alpha=16, dropout=0.1)
packed = mp.memory_report(model).packed
codes = {name: t.clone() for name, t in model.state_dict().items() if name.endswith("packed")}
print(f"{len(names)} layers, {packed.bits:.3f} bits per quantised weight")

before, after = train(model, data, lr=2e-4, steps=12, warmup=0.03, clip=0.3, betas=(0.9, 0.999))
print(f"loss {before:.3f} -> {after:.3f}")
state = model.state_dict()
moved = sum(not torch.equal(state[name], code) for name, code in codes.items())
print(f"{moved} of {len(codes)} layers' codes changed")

text = all((one["labels"] != IGNORED).equal(one["attention_mask"].bool()) for one in data)
assert after < before and moved == 0 and packed.bits < 4.13
assert text  # user turns train too
