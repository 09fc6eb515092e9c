"""Aquila-7B by LoRA (FlagAI-Open/FlagAI: Aquila-chat-lora.yaml, aquila_chat.py), small and random.

wq and wv, rank 16, alpha 32, dropout .05; 4e-5 and a cosine after 200 warm-up steps, 10 epochs,
batches of 4, 2,048 tokens, "### Human: ..\\n### Assistant: ..".  There the human turns are masked,
but the header, the words "### Assistant:" and the end of each turn train; meant is the answer, and
that is what trains here.  FlagAI's class turns neighbouring numbers, transformers' LLaMA halves:
wq is q_proj with its rows in another order, and so is B of its adapter.
"""

import tempfile
from pathlib import Path

import torch
from common import IGNORED, batches, mean_loss, tiny_llama, train, train_tokenizer
from safetensors.torch import load_file

import minipeft as mp
from minipeft.io.lora import load_lora, save_meta_lora

torch.manual_seed(0)
tokenizer = train_tokenizer()
data = batches(tokenizer, "aquila", turns=4, length=256)
text = tokenizer.decode([label for label in data[0]["labels"][0].tolist() if label != IGNORED])
print(f"learnt of the first row: {text!r}")

model = tiny_llama(len(tokenizer))
names = mp.inject_lora(model, ["q_proj", "v_proj"], rank=16, alpha=32, dropout=0.05)
before, after = train(model, data, lr=4e-5, faster=50, schedule="cosine", warmup=0.1)
print(f"{len(names)} layers: loss {before:.3f} -> {after:.3f}")

with tempfile.TemporaryDirectory() as folder:
    save_meta_lora(model, folder)  # layers.0.attention.wq, as FlagAI has it
    file = load_file(Path(folder) / "adapter_model.safetensors")
    again, straight = (tiny_llama(len(tokenizer)) for _ in range(2))
    load_lora(again, folder)
    load_lora(straight, folder, rotary_rows="halves")  # rows as they lie: another model
loaded, wrong = (mean_loss(other, data) for other in (again, straight))
print(f"{next(iter(file))}")
print(f"FlagAI's file loaded: {loaded:.6f}; with rows as they lie: {wrong:.6f}")

assert loaded == after != wrong
assert after < before
assert "###" not in text and text.count("</s>") == 2
