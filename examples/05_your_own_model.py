"""Your own model: a small vision transformer that knows no library, pre-trained and adapted.

It learns to tell which quarter of an image holds a bright square; then the squares become dark,
and QLoRA on its frozen 4-bit layers learns the new task.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import minipeft as mp

torch.manual_seed(0)


class Block(nn.Module):
    """Self-attention and an MLP over a width of 64, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=4
        )
        x = x + self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """16 x 16 images in patches of 4 x 4, two blocks, mean over the patches, four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.position = nn.Linear(16, 64), nn.Parameter(0.1 * torch.randn(16, 64))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor:
        patches = rearrange(images, "b (y p) (x q) -> b (y x) (p q)", p=4, q=4)
        return self.head(self.blocks(self.patch(patches) + self.position).mean(dim=1))


def batch(sign: float, n: int = 128) -> tuple[Tensor, Tensor]:
    """Noise with a square of size 4 in one quarter (the label); sign +1 bright, -1 dark."""
    labels = torch.randint(4, (n,))
    images = torch.randn(n, 16, 16)
    for image, label in zip(images, labels.tolist(), strict=True):
        y, x = 8 * (label // 2) + 2, 8 * (label % 2) + 2
        image[y : y + 4, x : x + 4] += 2 * sign
    return images, labels


def train(model: nn.Module, sign: float, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        images, labels = batch(sign)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def accuracy(model: nn.Module, sign: float) -> float:
    images, labels = batch(sign, 1000)
    with torch.no_grad():
        return (model(images).argmax(dim=1) == labels).float().mean().item()


model = VisionTransformer()
train(model, +1, steps=150, lr=2e-3)
start = accuracy(model, -1)
print(f"pre-trained on bright squares: {accuracy(model, +1):.1%}; on dark ones: {start:.1%}")

names = mp.inject_qlora(model, ["qkv", "out", "up", "down"], rank=4, skip=["patch", "head"])
count = mp.count_parameters(model)
print(f"QLoRA on {len(names)} layers: {count.trainable} of {count.total} parameters train")

train(model, -1, steps=150, lr=1e-2)
adapted = accuracy(model, -1)
with mp.disable_adapters(model):
    print(f"after training on dark squares: {adapted:.1%}; adapters off: {accuracy(model, -1):.1%}")

assert adapted > 0.9 > start
