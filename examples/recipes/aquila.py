"""Aquila-7B by LoRA (FlagAI-Open/FlagAI: Aquila-chat-lora.yaml, aquila_chat.py), small and random.

wq and wv, rank 16, alpha 32, dropout .05; 4e-5 and a cosine after 200 warm-up steps, 10 epochs,
batches of 4, 2,048 tokens, "### Human: ..\\n### Assistant: ..".  There the human turns are masked,
but the header, the words "### Assistant:" and the end of each turn train; meant is the answer, and
that is what trains here.  The published model is a LLaMA in transformers: wq is q_proj.
"""

import torch
from common import IGNORED, batches, tiny_llama, train, train_tokenizer

import minipeft as mp

torch.manual_seed(0)
tokenizer = train_tokenizer()
data = batches(tokenizer, "aquila", turns=4, length=256)
text = tokenizer.decode([label for label in data[0]["labels"][0].tolist() if label != IGNORED])
print(f"learnt of the first row: {text!r}")

model = tiny_llama(len(tokenizer))
names = mp.inject_lora(model, ["q_proj", "v_proj"], rank=16, alpha=32, dropout=0.05)
before, after = train(model, data, lr=4e-5, faster=50, schedule="cosine", warmup=0.1)
print(f"{len(names)} layers: loss {before:.3f} -> {after:.3f}")

assert after < before
assert "###" not in text and text.count("</s>") == 2
