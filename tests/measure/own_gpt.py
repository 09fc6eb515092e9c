"""A small GPT of one's own and its batches, which tests of minipeft.benchmark import."""

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, LENGTH = 64, 64, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2)
                   for part in self.qkv(self.first(x)).chunk(3, -1))  # fmt: skip
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        return self.head(self.blocks(self.embed(ids)))


def make_model():
    return GPT()


def make_batch(step):
    return {"ids": torch.randint(VOCABULARY, (2, LENGTH), generator=torch.manual_seed(step))}


def loss(model, batch):
    logits = model(batch["ids"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())


def broken_batch(step):
    raise OSError(f"no data at step {step}")


def dies():
    import os

    os._exit(7)


def body_only(model):
    """LoRA on the blocks alone, the caller's way."""
    import minipeft as mp

    mp.inject_lora(model, ["up", "down"], rank=4)
