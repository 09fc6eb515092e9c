"""LLaMA, tuned as alpaca-lora does (tloen/alpaca-lora: finetune.py), here on SmolLM2-135M.

Theirs: q and v, rank 8, alpha 16, dropout .05; 3e-4, falling in a line after 100 warm-up steps of
about 1,200; 256 tokens.  Their base is 8-bit of bitsandbytes; this one is float32.
`train_on_inputs` is True there unless it is turned off: the prompt trains too, and so it does here.
"""

import tempfile

import torch
from common import IGNORED, batches, mean_loss, train

import minipeft as mp
from benchmarks.models import load_model, load_tokenizer

torch.manual_seed(0)
tokenizer = load_tokenizer()
data = batches(tokenizer, "alpaca", count=3, size=2, length=96, everything=True)
masked = batches(tokenizer, "alpaca", count=3, size=2, length=96)
learnt, answers = (sum(int((one["labels"] != IGNORED).sum()) for one in d) for d in (data, masked))
print(f"{learnt} tokens train; with the prompt masked {answers} would")

model = load_model(None, torch.float32, seed=0)
names = mp.inject_lora(model, ["q_proj", "v_proj"], rank=8, alpha=16, dropout=0.05)
before, after = train(model, data, lr=3e-4, steps=12, schedule="linear", warmup=0.08)
print(f"{len(names)} layers of q and v: loss {before:.3f} -> {after:.3f}")

with tempfile.TemporaryDirectory() as folder:
    mp.save_peft(model, folder)
    other = load_model(None, torch.float32, seed=0)
    mp.load_peft(other, folder)
again = mean_loss(other, data)
print(f"the adapter's file in another model: loss {again:.3f}")

assert after < before and again == after
assert learnt > answers > 0
