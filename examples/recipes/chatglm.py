"""ChatGLM-6B by P-tuning v2 over 4-bit weights, and by LoRA (THUDM/ChatGLM-6B: ptuning/).

Theirs: 128 prefix tokens at 2e-2, 3,000 steps of 16 texts, 64 + 64 tokens; the weights are 4-bit
and the prefix stays in float32.  `context [gMASK] <bos> answer <eop>`: labels start after <bos>.
A prefix has no position of its own: text is numbered from 0.  Their LoRA comparison has a rate of
5e-4; query_key_value, rank 8 and alpha 32 are ours, as theirs are not written down.
"""

import tempfile
from pathlib import Path

import torch
from common import batches, mean_loss, train, train_tokenizer
from glm import GLM, GLMConfig

import minipeft as mp
from minipeft.io.prefixes import load_prefix_encoder, save_prefix_encoder

tokenizer = train_tokenizer("<unk>", "[gMASK]", "<bos>", "<eop>")
data = [
    {name: one[name] for name in ("input_ids", "labels")}  # padding comes last and is causal
    for one in batches(tokenizer, "chatglm", length=128)
]


def build() -> GLM:
    """The same random weights each time, 4-bit but for the head."""
    torch.manual_seed(0)
    model = GLM(GLMConfig(len(tokenizer), initializer_range=0.1))
    mp.quantize_model(model)
    return model.eval()


model, example = build(), {"input_ids": data[0]["input_ids"][:1]}
prefix = mp.attach_prefix(model, 128, example=example)
before, after = train(model, data, lr=2e-2, schedule="linear")
print(f"prefix {prefix.position!r}: loss {before:.3f} -> {after:.3f}")

question = data[0]["input_ids"][:1]
question = question[:, : question[0].tolist().index(2) + 1]
same = torch.equal(model.answer(question, 8), model.answer(question, 8, use_cache=False))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "prefix.safetensors"
    save_prefix_encoder(model, path, key="transformer.prefix_encoder.embedding.weight")
    other = build()
    load_prefix_encoder(other, path, example=example)
again = mean_loss(other, data)
print(f"ChatGLM's own file: loss {again:.3f}; with and without a cache the same answer: {same}")

lora = build()
mp.inject_lora(lora, ["query_key_value"], rank=8, alpha=32, dropout=0.1)
first, last = train(lora, data, lr=5e-4, faster=10)
print(f"LoRA: loss {first:.3f} -> {last:.3f}")

assert after < before and last < first
assert prefix.position == "none" and same and again == after
