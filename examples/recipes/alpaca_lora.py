"""LLaMA, tuned as alpaca-lora does (tloen/alpaca-lora: finetune.py), small and random.

Theirs: q and v, rank 8, alpha 16, dropout .05; 3e-4, falling in a line after 100 warm-up steps of
about 1,200; batches of 128, 256 tokens.  Their base is 8-bit of bitsandbytes; this one is dense.
`train_on_inputs` is True there unless it is turned off: the prompt trains too, and so it does here.
"""

import tempfile

import torch
from common import IGNORED, batches, mean_loss, tiny_llama, train, train_tokenizer

import minipeft as mp

torch.manual_seed(0)
tokenizer = train_tokenizer()
data = batches(tokenizer, "alpaca", length=256, everything=True)
masked = batches(tokenizer, "alpaca", length=256)
learnt, answers = (sum(int((one["labels"] != IGNORED).sum()) for one in d) for d in (data, masked))
print(f"{learnt} tokens train; with the prompt masked {answers} would")

model = tiny_llama(len(tokenizer))
names = mp.inject_lora(model, ["q_proj", "v_proj"], rank=8, alpha=16, dropout=0.05)
before, after = train(model, data, lr=3e-4, faster=10, schedule="linear", warmup=100 / 1200)
print(f"{len(names)} layers of q and v: loss {before:.3f} -> {after:.3f}")

with tempfile.TemporaryDirectory() as folder:
    mp.save_peft(model, folder)
    other = tiny_llama(len(tokenizer))
    mp.load_peft(other, folder)
again = mean_loss(other, data)
print(f"the adapter's file in another model: loss {again:.3f}")

assert after < before and again == after
assert learnt > answers > 0
