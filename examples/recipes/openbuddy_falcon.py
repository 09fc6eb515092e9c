"""OpenBuddy-Falcon (OpenBuddy/OpenBuddy): Falcon-7B with a longer vocabulary for more languages.

The published models have more tokens than Falcon, and their embeddings trained; how is not said.
Here: the table grows by the tokens of a few Chinese words, each started at the mean of the old
rows; the head is tied to it and grows with it; the table trains whole, once for both, beside LoRA
on the fused layer (rank 8, alpha 16, dropout .05, 3e-4: alpaca-lora's numbers).
"""

import torch
from common import (
    CHINESE,
    TEMPLATES,
    WORDS,
    batch,
    batches,
    encode_turns,
    train,
    train_tokenizer,
)  # fmt: skip
from transformers import FalconConfig, FalconForCausalLM

import minipeft as mp

TEXT = "".join(turn for talk in CHINESE for turn in talk)

torch.manual_seed(0)
tokenizer = train_tokenizer()
old = len(tokenizer)
pieces = len(tokenizer(TEXT).input_ids)
tokenizer.add_tokens(WORDS)
print(f"{len(tokenizer) - old} new tokens: {pieces} pieces of the talks become "
      f"{len(tokenizer(TEXT).input_ids)}")  # fmt: skip

model = FalconForCausalLM(FalconConfig(
    vocab_size=old, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    bos_token_id=1, eos_token_id=2, attention_dropout=0.0, hidden_dropout=0.0,
))  # fmt: skip
mp.extend_vocabulary(model, len(tokenizer) - old, init="mean", whole_table=True)
mp.inject_lora(model, ["query_key_value"], rank=8, alpha=16, dropout=0.05)
start = model.get_input_embeddings().weight.detach().clone()
chinese = batch([encode_turns(tokenizer, TEMPLATES["guanaco"], talk) for talk in CHINESE])
data = [*batches(tokenizer, "guanaco", count=3), chinese]
before, after = train(model, data, lr=3e-4, faster=10)
print(f"loss {before:.3f} -> {after:.3f}")

with torch.no_grad():
    moved = (model.get_input_embeddings().weight - start).abs().amax(1) > 0
    states = model.transformer(**{k: v for k, v in chinese.items() if k != "labels"})[0]
    tied = states @ model.get_input_embeddings().weight.T
    logits = model(**chinese).logits
print(f"{int(moved[old:].sum())} of the new rows and {int(moved[:old].sum())} old ones moved")

assert after < before and moved[old:].all()
# the head computes by the trained table: the same products, of up to about 10 in float32
assert (tied - logits).abs().max() < 1e-4
