"""A PEFT adapter: saved here, loaded in PEFT where it is installed, and loaded here again."""

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import minipeft as mp

torch.manual_seed(0)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def plain_model() -> nn.Module:
    torch.manual_seed(1)
    return TwoLayers()


x = torch.randn(8, 32)
model = plain_model()
mp.inject_lora(model, "all-linear", rank={"up": 4, "down": 2}, alpha=8)
optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=1e-2)
for _ in range(20):
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    optimizer.step()
trained = model(x).detach()

with tempfile.TemporaryDirectory() as directory:
    mp.save_peft(model, directory)
    config = json.loads((Path(directory) / "adapter_config.json").read_text())
    print("files:", sorted(path.name for path in Path(directory).iterdir()))
    print("targets:", config["target_modules"], "ranks:", config["r"], config["rank_pattern"])

    again = plain_model()
    names = mp.load_peft(again, directory)
    print("loaded here:", names, "difference:", (again(x) - trained).abs().max().item())

    theirs = None
    if find_spec("peft"):
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(plain_model(), directory)(x)
        print("loaded in PEFT, difference:", (theirs - trained).abs().max().item())
    else:
        print('PEFT is not installed: pip install "minipeft[peers]" to load the files in it')

assert torch.equal(again(x), trained)
assert theirs is None or torch.allclose(theirs, trained, atol=1e-6)
