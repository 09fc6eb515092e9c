"""Luotuo (LC1332/Luotuo-Chinese-LLM): adapters on LLaMA like alpaca-lora's, small, random.

Its notebook loads a folder of PEFT that has adapter_model.bin, a pickled file, onto LLaMA-7B; the
training code is not published, so q and v with rank 8, alpha 16, dropout .05 and 3e-4 are
alpaca-lora's.  CamelBell, its sister, is LoRA on ChatGLM-6B: query_key_value of the GLM module.
The file is read without running what a pickle can hold, and training goes on from it.
"""

import tempfile
from pathlib import Path

import torch
from common import batches, mean_loss, tiny_llama, train, train_tokenizer
from glm import GLM, GLMConfig
from safetensors.torch import load_file

import minipeft as mp

torch.manual_seed(0)
tokenizer = train_tokenizer()
data = batches(tokenizer, "alpaca")
model = tiny_llama(len(tokenizer))
mp.inject_lora(model, ["q_proj", "v_proj"], rank=8, alpha=16, dropout=0.05)
before, after = train(model, data, lr=3e-4, faster=10, schedule="linear", warmup=0.08)
print(f"LLaMA, q and v: loss {before:.3f} -> {after:.3f}")

with tempfile.TemporaryDirectory() as folder:
    mp.save_peft(model, folder)
    weights = Path(folder) / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))  # as a Luotuo folder has it
    weights.unlink()
    again = tiny_llama(len(tokenizer))
    mp.load_peft(again, folder)
loaded = mean_loss(again, data)
_, later = train(again, data, lr=3e-4, faster=10)
print(f"adapter_model.bin loaded: {loaded:.3f}, trained on: {later:.3f}")

tokens = train_tokenizer("<unk>", "[gMASK]", "<bos>", "<eop>")
camel = GLM(GLMConfig(len(tokens), initializer_range=0.1))
names = mp.inject_lora(camel, ["query_key_value"], rank=8, alpha=16, dropout=0.05)
talk = [{k: one[k] for k in ("input_ids", "labels")} for one in batches(tokens, "chatglm")]
first, last = train(camel, talk, lr=3e-4, faster=10)
print(f"CamelBell, {names}: {first:.3f} -> {last:.3f}")

assert after < before and loaded == after and later < loaded
assert last < first
