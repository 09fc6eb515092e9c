"""Which method for your model?  A GPT of plain PyTorch, compared in one call of mp.benchmark.

The model is LLaMA's: RMSNorm, rotary positions, SwiGLU.  Each method trains it in a process of its
own; memory is that process's, FLOPs are counted, and a gate checks what each method computes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import minipeft as mp

WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 512, 1376, 4, 8, 512
BATCH, LENGTH = 4, 128
METHODS = ["full", "lora", "qlora"]


class Norm(nn.Module):
    """A row divided by its root mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs (i, i + half) of each head, turned by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class Block(nn.Module):
    """Attention and a SwiGLU, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        row = self.norm1(x)
        q, k, v = (
            rearrange(layer(row), "b n (h d) -> b h n d", h=HEADS)
            for layer in (self.q, self.k, self.v)
        )
        q, k = rotated(q, angles), rotated(k, angles)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(rearrange(mixed, "b h n d -> b n (h d)"))
        row = self.norm2(x)
        return x + self.down(F.silu(self.gate(row)) * self.up(row))


class GPT(nn.Module):
    """Tokens in, the mean loss of the next token out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, False)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), Norm()

    def forward(self, ids: Tensor) -> Tensor:
        half = torch.arange(WIDTH // HEADS // 2, device=ids.device)
        positions = torch.arange(ids.shape[1], device=ids.device)
        angles = positions[:, None].float() @ 10000.0 ** (-half / len(half))[None]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, torch.cat([angles, angles], dim=-1))
        scores = self.head(self.norm(x)[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())


def make_model() -> nn.Module:
    return GPT()


def make_batch(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.manual_seed(step))


if __name__ == "__main__":
    report = mp.benchmark(make_model, make_batch, METHODS, head="head", steps=2, rounds=1)
    print("\n".join(str(report).splitlines()[: 1 + len(METHODS)]))
    full, lora, qlora = ({**report.runs(name)[0]} for name in METHODS)
    assert qlora["flops"] == lora["flops"] < full["flops"]
    assert qlora["step_peak_bytes"] < lora["step_peak_bytes"] < full["step_peak_bytes"]
