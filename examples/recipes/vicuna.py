"""Vicuna (lm-sys/FastChat: train_vicuna_7b.sh, train_lora.py), on a small random LLaMA.

Conversations of several turns, "USER: .. ASSISTANT: ..</s>", of which answers alone train.  Their
mask counts the tokens of each turn by itself and takes off 2 for what LLaMA's tokeniser adds in
front; with another tokeniser the count is off, and such a row is masked as a whole, with a line on
the screen.  Meant is: answers train.  Labels by characters do that with any tokeniser.
LoRA, rank 8, alpha 16, dropout .05, on q and v (--q_lora: over NF4); 2e-5 and a cosine after a
warm-up of .04.  The published weights are a float16 difference from LLaMA's.
"""

import tempfile
from pathlib import Path

import torch
from common import IGNORED, TEMPLATES, batches, encode_turns, tiny_llama, train, train_tokenizer
from transformers import LlamaForCausalLM

import minipeft as mp
from minipeft.io.delta import apply_delta, make_delta

torch.manual_seed(0)
tokenizer = train_tokenizer()
turns = ["Hi! ", "Hello,  how are you?", "Fine.", "Good \u201cto\u201d hear\n"]
ids, labels = encode_turns(tokenizer, TEMPLATES["vicuna"], turns)
learnt = tokenizer.decode([label for label in labels if label != IGNORED])
print(f"learnt of a conversation: {learnt!r}")

data = batches(tokenizer, "vicuna", turns=6, length=160)
rows = sum(len(one["labels"]) for one in data)
masked = sum(int((one["labels"] == IGNORED).all(1).sum()) for one in data)
print(f"{masked} of {rows} conversations are masked as a whole")

model = tiny_llama(len(tokenizer))
mp.inject_lora(model, ["q_proj", "v_proj"], rank=8, alpha=16, dropout=0.05)
before, after = train(model, data, lr=2e-5, faster=50, schedule="cosine", warmup=0.04)
print(f"loss {before:.3f} -> {after:.3f}")

mp.remove(model, merge=True)  # as a program that publishes a difference needs it
with tempfile.TemporaryDirectory() as folder:
    base, tuned, delta, made = (Path(folder) / name for name in ("base", "tuned", "delta", "made"))
    tiny_llama(len(tokenizer)).half().save_pretrained(base)
    model.half().save_pretrained(tuned)
    report = make_delta(base, tuned, delta, dtype=torch.float16)
    apply_delta(base, delta, made)
    again = LlamaForCausalLM.from_pretrained(made, dtype=torch.float16).state_dict()
equal = all(torch.equal(again[name], t) for name, t in model.state_dict().items())
print(f"base + float16 difference is the tuned model in every bit: {equal}")

assert equal
assert after < before and masked == 0
assert learnt.replace(" ", "") == f"{turns[1]}</s>{turns[3]}</s>".replace(" ", "")
