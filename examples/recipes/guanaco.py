"""Guanaco of QLoRA (artidoro/qlora: scripts/finetune_guanaco_7b.sh), on a small random LLaMA.

NF4 with double quantisation; every linear layer but the head, rank 64, alpha 16, dropout .1;
2e-4 constant after a warm-up of .03, gradients clipped to .3, Adam's beta2 .999; batches of texts
of like length, targets of up to 512 tokens.  The source is <s> alone there and a conversation with
its </s> is one target: user turns train too, as the paper says.  Paged optimisers are left to
bitsandbytes.
"""

import torch
from common import IGNORED, batches, tiny_llama, train, train_tokenizer

import minipeft as mp

torch.manual_seed(0)
tokenizer = train_tokenizer()
data = batches(tokenizer, "guanaco", turns=4, length=512, everything=True)
data.sort(key=lambda one: one["input_ids"].shape[1])  # group_by_length

model = tiny_llama(len(tokenizer), hidden_size=128, intermediate_size=256)
names = mp.inject_qlora(model, "all-linear", rank=64, alpha=16, dropout=0.1)
bits = mp.memory_report(model).packed.bits
state = {name: t.clone() for name, t in model.state_dict().items() if t.dtype == torch.uint8}
print(f"{len(names)} layers, {bits:.3f} bits per quantised weight")

before, after = train(
    model, data, lr=2e-4, faster=10, warmup=0.03, clip=0.3, betas=(0.9, 0.999)
)  # fmt: skip
print(f"loss {before:.3f} -> {after:.3f}")
moved = [name for name, codes in state.items() if not model.state_dict()[name].equal(codes)]
print(f"{len(moved)} of {len(state)} tensors of codes and scales changed")

assert after < before and not moved
assert any(2 in one["labels"] for one in data)  # </s>, by which an answer stops
assert 4 < bits < 4.2  # 4, 8 / 64 for the scales, and the scales of those
assert all((one["labels"] != IGNORED).equal(one["attention_mask"].bool()) for one in data)
