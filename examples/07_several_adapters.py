"""Two adapters on one model: trained one after the other, then served side by side in one batch.

A small network learns to add its inputs.  One adapter turns it into one that subtracts, another
into one that takes the larger; the base still adds.
"""

import torch
from torch import nn

import minipeft as mp

TASKS = {"minus": lambda x: x[:, 0] - x[:, 1], "largest": lambda x: x.max(1).values}


def train(model: nn.Module, parameters: list[nn.Parameter], answer, steps: int = 400) -> float:
    """Fit the model's output to `answer`; returns the last mean squared error."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        x = torch.rand(64, 2) * 2 - 1
        loss = (model(x)[:, 0] - answer(x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    """Train the base and both adapters, then let every row of a batch use its own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    print(f"base, x + y: error {train(model, list(model.parameters()), lambda x: x.sum(1)):.4f}")
    for name, answer in TASKS.items():
        mp.inject_lora(
            model, ["0", "2", "4"], rank=1 if name == "minus" else {"2": 8, ".*": 1}, name=name
        )
        mp.use_adapters(model, name)
        error = train(model, list(mp.adapter_parameters(model, name=name)), answer)
        print(f"adapter {name!r}: error {error:.4f}")

    rows = ["minus", "largest", None]
    mp.use_adapters(model.eval(), rows=rows)
    x = torch.tensor([[0.5, -0.3]]).expand(3, 2)
    with torch.no_grad():
        out = model(x)[:, 0]
    for name, value in zip(rows, out.tolist(), strict=True):
        print(f"row with {name}: {value:+.2f}")
    expected = torch.tensor([0.8, 0.5, 0.2])
    assert (out - expected).abs().max() < 0.1, "each row is answered by its own adapter"


if __name__ == "__main__":
    main()
