"""LoRA by hand: what LoRALinear computes, in four lines, on a layer that has learnt a task.

A linear layer fits y = x W^T.  The task then changes by something of rank 2, and a LoRA of rank 2
learns the change while W stays as it was.
"""

import torch
from torch import nn

import minipeft as mp

torch.manual_seed(0)

base = nn.Linear(64, 32, bias=False)
change = torch.randn(32, 2) @ torch.randn(2, 64) / 8  # the new task: W + something of rank 2
new_weight = base.weight.detach() + change
before = base.weight.detach().clone()

layer = mp.LoRALinear(base, rank=2)
x = torch.randn(256, 64)
by_hand = x @ base.weight.T + layer.scaling * (x @ layer.lora_a.T @ layer.lora_b.T)
same = torch.allclose(layer(x), by_hand, atol=1e-5)
unchanged = torch.equal(layer(x), base(x))
print(f"equals the formula: {same}; B = 0 leaves the base's output as it was: {unchanged}")

count = mp.count_parameters(layer)
print(f"trainable: {count.trainable} of {count.total} parameters")

optimizer = torch.optim.Adam(mp.adapter_parameters(layer), lr=2e-2)
losses = []
for _ in range(600):
    loss = (layer(x) - x @ new_weight.T).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss: {losses[0]:.4f} -> {losses[-1]:.1e}")

error = (layer.delta() - change).norm() / change.norm()
print(f"the learnt delta is off the true change by {error:.0e} of its norm")

assert same and unchanged
assert error < 0.01 and torch.equal(base.weight, before), "LoRA must learn it, and W must not move"
