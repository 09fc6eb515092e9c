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


def losses_of_rows(model, batch):
    logits = model(batch["ids"])
    return F.cross_entropy(logits[:, :-1].mT, batch["ids"][:, 1:], reduction="none")


def infinite(model, batch):
    return loss(model, batch) / 0


def of_the_batch_alone(model, batch):
    return batch["ids"].float().mean()


def that_reads_values(model, batch):
    return loss(model, batch) * (1 if float(batch["ids"].sum()) >= 0 else 2)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, row):
        return make_batch(row)["ids"][0]


def loaded_batch(step):
    from itertools import islice

    from torch.utils.data import DataLoader

    loader = DataLoader(Rows(), 2, num_workers=1)
    return {"ids": next(islice(loader, step, None))}


def model_that_warns():
    import warnings

    warnings.warn("the head is not tied", stacklevel=1)
    return GPT()


def model_that_keeps_its_process():
    import threading
    import time

    threading.Thread(target=time.sleep, args=(60,)).start()
    return GPT()


def refuses(model):
    raise ValueError("not on a Friday")


def breaks_our_layer(model):
    import minipeft as mp

    mp.inject_lora(model, ["up"], rank=0)


def broken_batch(step):
    raise OSError(f"no data at step {step}")


def dies():
    import os

    os._exit(7)


def body_only(model):
    """LoRA on the blocks alone, the caller's way."""
    import minipeft as mp

    mp.inject_lora(model, ["up", "down"], rank=4)
