"""A prefix on attention of your own: P-tuning v2 steers a frozen model of this file.

A small causal model learns to count modulo 16, up or down: only the second number of a sequence
tells which.  Then everything is frozen, and four trained keys and values a layer make it count
down from the first number on.  Attention needs one line for that.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import minipeft as mp

torch.manual_seed(0)
NUMBERS, LENGTH, WIDTH, HEADS, LAYERS = 16, 8, 64, 4, 2


class Attention(nn.Module):
    """Causal self-attention; `prefix` is set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, prefix: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=HEADS)
        y = mp.prefix_attention(q, k, v, *prefix)  # instead of scaled_dot_product_attention
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


class Counter(nn.Module):
    """Two pre-norm blocks over learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.positions = nn.Embedding(NUMBERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS))
        self.attentions = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, NUMBERS)
        self.prefix = mp.PrefixEncoder([(HEADS, WIDTH // HEADS, WIDTH // HEADS)] * LAYERS, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.numbers(x) + self.positions.weight[: x.shape[1]]
        for i, prefix in enumerate(self.prefix()):
            y = y + self.attentions[i](self.norms[2 * i](y), prefix)
            y = y + self.mlps[i](self.norms[2 * i + 1](y))
        return self.head(y)


def batch(directions: list[int], n: int = 256) -> Tensor:
    """Sequences that count by one of `directions` from a random start."""
    step = torch.tensor(directions)[torch.randint(len(directions), (n, 1))]
    return (torch.randint(NUMBERS, (n, 1)) + step * torch.arange(LENGTH + 1)) % NUMBERS


def train(model: nn.Module, directions: list[int], steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        x = batch(directions)
        optimizer.zero_grad()
        F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    """How often the second number of a sequence that counts down is foreseen."""
    x = batch([-1], 1000)
    with torch.no_grad():
        return (model(x[:, :1])[:, 0].argmax(-1) == x[:, 1]).float().mean().item()


model = Counter()
with mp.disable_adapters(model):  # pre-training knows no prefix
    train(model, [+1, -1], steps=300, lr=3e-3)
    base = accuracy(model)

mp.freeze(model)
count = mp.count_parameters(model)
print(f"up or down is a guess for the frozen model: {base:.1%} right")

train(model, [-1], steps=150, lr=1e-2)
steered = accuracy(model)
print(f"with a prefix of {count.trainable} of {count.total} parameters: {steered:.1%}")
with mp.disable_adapters(model):
    print(f"switched off again: {accuracy(model):.1%}")

assert steered > 0.95 > 0.8 > base
