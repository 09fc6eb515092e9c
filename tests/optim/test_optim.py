"""LoRA+ groups and LoRA-FA against float64 and PEFT."""

import copy

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.optim.lora_fa import projected


def model_of(rank=3, **lora):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    mp.inject_lora(model, ["0", "2"], rank, 6, **lora)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_b, std=0.3)
    return model


def test_every_trainable_parameter_comes_once_at_its_rate():
    model = model_of(dora=True)
    mp.train_biases(model)
    model[0].base.lora_a.requires_grad_(False)
    groups = {g["name"]: g for g in mp.lora_plus_groups(model, 0.5, ratio=4, weight_decay=0.1)}
    assert {n: (g["lr"], g["weight_decay"], len(g["params"])) for n, g in groups.items()} == {
        "a": (0.5, 0.1, 1), "b": (2.0, 0.1, 2), "other": (0.5, 0.0, 4),
    }  # fmt: skip
    every = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    fused = nn.Sequential(nn.Linear(8, 6))
    mp.inject(fused, ["0"], lambda m: mp.LoRAFusedLinear(m, 2, slices={"q": 4, "v": 2}))
    assert [g["name"] for g in mp.lora_plus_groups(fused, 1.0)] == ["a", "b"]
    for arguments in ((0.0,), (-1.0,)):
        with pytest.raises(ValueError, match="above 0"):
            mp.lora_plus_groups(model, *arguments)
    with pytest.raises(ValueError, match="no trainable"):
        mp.lora_plus_groups(nn.Linear(2, 2), 1.0)


def test_a_step_of_lora_plus_moves_b_by_the_ratio():
    model = model_of()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(mp.lora_plus_groups(model, 0.01, ratio=16))
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = {"lora_a": 0.01, "lora_b": 0.16}.get(name.rpartition(".")[2], 0.0)
        moved = before[name] if parameter.grad is None else before[name] - rate * parameter.grad
        torch.testing.assert_close(parameter.detach(), moved)


def test_the_gradient_of_lora_fa_equals_float64():
    grad, a = torch.randn(6, 3), torch.randn(3, 8)
    exact = grad.double() @ torch.linalg.inv(a.double() @ a.double().T) / 4
    torch.testing.assert_close(projected(grad, a, 2.0).double(), exact, rtol=1e-4, atol=1e-5)


def test_lora_fa_is_the_step_nearest_to_that_of_the_whole_weight():
    """Of all changes of B, the one whose s dB A is nearest to the weight's gradient."""
    model, x = model_of(), torch.randn(5, 8)
    mp.freeze_a(model)
    layer = model[0]
    weight = layer.weight.detach().requires_grad_()
    hidden = torch.nn.functional.linear(x, weight, layer.bias)
    model[2](model[1](hidden)).square().sum().backward()
    model.zero_grad()
    model(x).square().sum().backward()
    ours = projected(layer.lora_b.grad, layer.lora_a, layer.scaling)
    solution = torch.linalg.lstsq(layer.scaling * layer.lora_a.detach().T, weight.grad.T).solution
    torch.testing.assert_close(ours, solution.T, rtol=1e-3, atol=1e-4)  # float32, two solvers


def test_lora_fa_trains_b_alone_and_resumes():
    model, x = model_of(), torch.randn(5, 8)
    with pytest.raises(ValueError, match="freeze_a"):
        mp.LoRAFA(model)
    assert mp.freeze_a(model) == ["0.lora_a", "2.lora_a"]
    a = model[0].lora_a.detach().clone()
    optimizer = mp.LoRAFA(model, lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(model[0].lora_a, a)
    again = copy.deepcopy(model)
    other = mp.LoRAFA(again, lr=0.01, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run, step in ((model, optimizer), (again, other)):
        run(x).square().mean().backward()
        step.step()
    assert torch.equal(model[0].lora_b, again[0].lora_b)
    with pytest.raises(ValueError, match="no LoRALinear"):
        mp.freeze_a(nn.Linear(2, 2))
