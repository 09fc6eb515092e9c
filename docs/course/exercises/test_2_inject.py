"""A model with a shared layer, and a wrap that refuses the last layer."""

import pytest
import torch
from torch import nn

import minipeft as mp


def make() -> nn.Module:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), shared)
    return nn.ModuleDict({"first": inner, "tied": shared, "last": nn.Linear(4, 2)})


def test_every_linear_is_wrapped_once(mine):
    model = make()
    names = mine.swap_linear(model, lambda linear: mp.LoRALinear(linear, rank=2))
    assert sorted(names) == ["first.0", "first.2", "last", "tied"]
    assert all(isinstance(model.get_submodule(name), mp.LoRALinear) for name in names)
    assert model["tied"] is model["first"][2]
    assert not isinstance(model["tied"].base, mp.LoRALinear)


def test_after_an_error_the_model_is_as_it_was(mine):
    def wrap(linear: nn.Linear) -> nn.Module:
        if linear.out_features == 2:
            raise ValueError("not this one")
        return mp.LoRALinear(linear, rank=2)

    model = make()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="not this one"):
        mine.swap_linear(model, wrap)
    assert dict(model.named_modules()) == before
