"""Chinese-Vicuna (Facico/Chinese-Vicuna: finetune_4bit.py, finetune_chatglm.py), small and random.

LLaMA in 4 bits, q and v, rank 8, alpha 16, dropout .05, 3e-4, 256 tokens, Alpaca's template.
Their code masks the prompt, and the collator then makes labels of all ids: the prompt trains.
Meant is the mask, and the batches here keep it.  The ChatGLM variant (rank 32, alpha 32,
dropout .1, 2e-5 in a line after a warm-up of .1) takes thirds of query_key_value for q, k and v;
ChatGLM keeps q, k, v head by head, so that half of that "q" are rows of queries.  Meant is an
adapter for each of the three, which is what slices by head are.
"""

import torch
from common import IGNORED, batches, tiny_llama, train, train_tokenizer
from glm import GLM, GLMConfig
from transformers import DataCollatorForLanguageModeling

import minipeft as mp
from minipeft.layers.fused import LoRAFusedLinear, per_head

torch.manual_seed(0)
tokenizer = train_tokenizer()
tokenizer.pad_token = "<pad>"
data = batches(tokenizer, "alpaca", length=256)
ours = data[0]["labels"][0]
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
row = {name: values[0].tolist() for name, values in data[0].items()}
theirs = collator([row])["labels"][0]
counts = [int((labels != IGNORED).sum()) for labels in (ours, theirs)]
print(f"learnt tokens of the first row: {counts[0]}; behind their collator: {counts[1]}")

model = tiny_llama(len(tokenizer))
mp.inject_qlora(model, ["q_proj", "v_proj"], rank=8, alpha=16, dropout=0.05, double_quant=False)
before, after = train(model, data, lr=3e-4, faster=10)
print(f"LLaMA: loss {before:.3f} -> {after:.3f}")

tokens = train_tokenizer("<unk>", "[gMASK]", "<bos>", "<eop>")
torch.manual_seed(0)
glm, rows = GLM(GLMConfig(len(tokens), initializer_range=0.1)), per_head(4, 16)
names = mp.inject(
    glm, ["query_key_value"],
    lambda base: LoRAFusedLinear(base, 32, 32, slices=rows, dropout=0.1),
)  # fmt: skip
talk = [{k: one[k] for k in ("input_ids", "labels")} for one in batches(tokens, "chatglm")]
first, last = train(glm, talk, lr=2e-5, faster=50, schedule="linear", warmup=0.1)
third = range(64)  # what their "q" are
queries = len(set(rows["q"].tolist()) & set(third))
print(f"ChatGLM: loss {first:.3f} -> {last:.3f}; {queries} of {len(third)} 'q' rows are queries")

assert after < before and last < first
assert counts[0] < counts[1]
assert queries < len(third)
