"""Other people's optimisers take our parameters, and go on from a saved state in every bit.

None of them is ours: what is tested is that adapters suit them, and that save_training_state keeps
what they keep (8-bit moments, the maps and scales that decode them, counts of steps).
"""

import copy

import pytest
import torch
from torch import nn

import minipeft as mp


def model_of(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 640), nn.ReLU(), nn.Linear(640, 16))
    if method == "qlora":
        mp.quantize_model(model, head=())
    # rank 8: factors of 8192 and 5120 numbers; from 4096 on bitsandbytes keeps moments in 8 bits
    mp.inject_lora(model, ["0"], rank=8, dora=method == "dora")
    return model


def bitsandbytes(name):
    optim = pytest.importorskip("bitsandbytes").optim
    return lambda parameters: getattr(optim, name)(parameters, lr=1e-2)


def torchao(name):
    optim = pytest.importorskip(
        "torchao.optim", reason="torchao is not installed: its optimisers were not tried"
    )
    return lambda parameters: getattr(optim, name)(parameters, lr=1e-2)


OPTIMIZERS = {
    "bitsandbytes AdamW8bit": lambda: bitsandbytes("AdamW8bit"),
    "bitsandbytes PagedAdamW8bit": lambda: bitsandbytes("PagedAdamW8bit"),
    "torchao AdamW8bit": lambda: torchao("AdamW8bit"),
    "torch fused": lambda: lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "torch foreach": lambda: lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
}


def steps(model, optimizer, count, seed):
    """Losses of so many steps on one batch of data."""
    x, losses = torch.randn(6, 1024, generator=torch.Generator().manual_seed(seed)), []
    for _ in range(count):
        optimizer.zero_grad()
        loss = (model(x) - 1.0).square().mean()
        loss.backward()
        try:
            optimizer.step()
        except (NotImplementedError, RuntimeError, AttributeError) as error:
            pytest.skip(f"{type(optimizer).__name__} does not run on this CPU: {error}")
        losses.append(loss.item())
    return losses


def all_equal(a, b):
    """Whether two nested states are equal, tensors in every bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(all_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(all_equal, a, b))
    return a == b


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, about bitsandbytes
@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_trains_adapters_and_goes_on_in_every_bit(name, method, tmp_path):
    make = OPTIMIZERS[name]()
    model = model_of(method)
    optimizer = make(list(mp.adapter_parameters(model)))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = steps(model, optimizer, 3, seed=1)
    mp.save_training_state(tmp_path, model, optimizer, step=3)
    saved = copy.deepcopy(optimizer.state_dict())
    losses += steps(model, optimizer, 3, seed=2)
    assert losses[2] < losses[0] and losses[5] < losses[3]
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())

    other = model_of(method)
    again = make(list(mp.adapter_parameters(other)))
    assert mp.load_training_state(tmp_path, other, again) == 3
    assert all_equal(again.state_dict(), saved)
    assert steps(other, again, 3, seed=2) == losses[3:]
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert all_equal(again.state_dict(), optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_bitsandbytes_keeps_our_moments_in_8_bits(name):
    model = model_of("lora")
    optimizer = bitsandbytes(name)(list(mp.adapter_parameters(model)))
    steps(model, optimizer, 2, seed=1)  # in the first, B is zero and A has no gradient
    for parameter in mp.adapter_parameters(model):
        state = optimizer.state[parameter]
        assert parameter.numel() >= 4096
        for key in ("state1", "state2"):
            assert state[key].dtype == torch.uint8 and state[key].shape == parameter.shape
            assert bool((state[key] != state[key].flatten()[0]).any())


def test_8_bit_moments_of_another_adapter_are_refused(tmp_path):
    make = bitsandbytes("AdamW8bit")
    model = model_of("lora")
    optimizer = make(list(mp.adapter_parameters(model)))
    steps(model, optimizer, 1, seed=1)
    mp.save_training_state(tmp_path, model, optimizer, step=1)
    other = model_of("dora")
    with pytest.raises(ValueError, match=r"magnitude.* are not in the file"):
        mp.load_training_state(tmp_path, other, make(list(mp.adapter_parameters(other))))
    plain = torch.optim.AdamW(list(mp.adapter_parameters(model)))
    with pytest.raises(ValueError, match=r"state of a bitsandbytes.*AdamW8bit; .*torch"):
        mp.load_training_state(tmp_path, model, plain)
