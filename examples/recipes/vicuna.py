"""Vicuna (lm-sys/FastChat: train_vicuna_7b.sh, train_lora.py --q_lora), on a small random LLaMA.

Conversations of several turns, "USER: .. ASSISTANT: ..</s>", of which answers alone train.  Their
mask counts the tokens of each turn by itself and takes off 2 for what LLaMA's tokeniser adds in
front; with another tokeniser the count is off, and such a row is masked as a whole, with a line on
the screen.  Meant is: answers train.  Labels by characters do that with any tokeniser.
Rank 8, alpha 16, dropout .05 on q and v over NF4; 2e-5 and a cosine after a warm-up of .04.
"""

import torch
from common import IGNORED, TEMPLATES, batches, encode_turns, tiny_llama, train, train_tokenizer

import minipeft as mp

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
mp.inject_qlora(model, ["q_proj", "v_proj"], rank=8, alpha=16, dropout=0.05)
before, after = train(model, data, lr=2e-5, faster=50, schedule="cosine", warmup=0.04)
print(f"loss {before:.3f} -> {after:.3f}")

assert after < before and masked == 0
assert learnt.replace(" ", "") == f"{turns[1]}</s>{turns[3]}</s>".replace(" ", "")
