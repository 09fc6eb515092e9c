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
    groups = {
        g["name"]: g for g in mp.optim.lora_plus_groups(model, 0.5, ratio=4, weight_decay=0.1)
    }
    assert {n: (g["lr"], g["weight_decay"], len(g["params"])) for n, g in groups.items()} == {
        "a": (0.5, 0.1, 1), "b": (2.0, 0.1, 2), "other": (0.5, 0.0, 4),
    }  # fmt: skip
    every = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    fused = nn.Sequential(nn.Linear(8, 6))
    mp.inject(fused, ["0"], lambda m: mp.layers.LoRAFusedLinear(m, 2, slices={"q": 4, "v": 2}))
    assert [g["name"] for g in mp.optim.lora_plus_groups(fused, 1.0)] == ["a", "b"]
    for arguments in ((0.0,), (-1.0,)):
        with pytest.raises(ValueError, match="above 0"):
            mp.optim.lora_plus_groups(model, *arguments)
    with pytest.raises(ValueError, match="no trainable"):
        mp.optim.lora_plus_groups(nn.Linear(2, 2), 1.0)


def test_a_step_of_lora_plus_moves_b_by_the_ratio():
    model = model_of()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(mp.optim.lora_plus_groups(model, 0.01, ratio=16))
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = {"lora_a": 0.01, "lora_b": 0.16}.get(name.rpartition(".")[2], 0.0)
        moved = before[name] if parameter.grad is None else before[name] - rate * parameter.grad
        torch.testing.assert_close(parameter.detach(), moved)


def test_the_gradient_of_lora_fa_equals_float64():
    grad, a = torch.randn(6, 3), torch.randn(3, 8)
    exact = grad.double() @ torch.linalg.inv(a.double() @ a.double().T) / 4
    # an inverse in float32, of condition up to 100: measured 4e-8
    torch.testing.assert_close(projected(grad, a, 2.0).double(), exact, rtol=1e-4, atol=1e-5)
    grad, a = torch.randn(6, 12), torch.randn(12, 8)  # A A^T is singular
    exact = grad.double() @ torch.linalg.pinv(a.double() @ a.double().T)
    # a pseudo-inverse: singular values near 0 are cut; measured 2e-6
    torch.testing.assert_close(projected(grad, a, 1.0).double(), exact, rtol=1e-4, atol=2e-5)


def test_lora_fa_is_the_step_nearest_to_that_of_the_whole_weight():
    """Of all changes of B, the one whose s dB A is nearest to the weight's gradient."""
    model, x = model_of(), torch.randn(5, 8)
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
    a = model[0].lora_a.detach().clone()
    optimizer = mp.optim.LoRAFA(model, lr=0.01, weight_decay=0.0)
    assert not model[0].lora_a.requires_grad and not model[2].lora_a.requires_grad
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
    other = mp.optim.LoRAFA(again, lr=0.01, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run, step in ((model, optimizer), (again, other)):
        run(x).square().mean().backward()
        step.step()
    assert torch.equal(model[0].lora_b, again[0].lora_b)
    for bad in ({"lr": -1.0}, {"nonsense": 1}):
        model = model_of()
        with pytest.raises((ValueError, TypeError)):
            mp.optim.LoRAFA(model, **bad)
        assert model[0].lora_a.requires_grad
    with pytest.raises(ValueError, match="no LoRALinear"):
        mp.optim.LoRAFA(nn.Linear(2, 2))


def test_lora_fa_of_a_closure_of_a_scale_of_zero_and_of_a_copy():
    results = []
    for by_closure in (True, False):
        model = model_of()
        optimizer, x = mp.optim.LoRAFA(model, lr=0.1, weight_decay=0.0), torch.randn(5, 8)

        def closure(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            if by_closure:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
        results.append(model[0].lora_b.detach().clone())
    assert torch.equal(*results)
    model[0].scale = 0.0
    closure()
    optimizer.step()
    assert model[0].lora_b.isfinite().all()
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def lora_fa_of_peft(model, config, x, y):
    """PEFT's optimizer over the same factors: its model and the B factors after three steps."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_lorafa_optimizer

    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(model[0].base)), config)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(model[0].lora_a)
        layer.lora_B["default"].weight.copy_(model[0].lora_b)
    optimizer = create_lorafa_optimizer(theirs, r=3, lora_alpha=6, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (theirs(x) - y).square().mean().backward()
        optimizer.step()
    return layer.lora_B["default"].weight.detach()


@pytest.mark.filterwarnings("ignore")
def test_lora_fa_is_float32_where_peft_rounds_to_bf16(capsys):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(8, 6)), torch.randn(9, 8), torch.randn(9, 6)
    mp.inject_lora(model, ["0"], 3, 6)
    nn.init.normal_(model[0].lora_b, std=0.3)
    start = model[0].lora_b.detach().clone()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    theirs = lora_fa_of_peft(model, config, x, y)

    # AdamW by hand, float64
    weight, bias = model[0].base.weight.double(), model[0].base.bias.double()
    a, b = model[0].lora_a.detach().double(), start.double()
    first, second, x64, y64 = torch.zeros_like(b), torch.zeros_like(b), x.double(), y.double()
    for step in range(1, 4):
        error = x64 @ (weight + 2 * b @ a).T + bias - y64
        gradient = 2 * error.T @ x64 / error.numel()  # of the whole weight
        gradient = (2 * gradient @ a.T) @ torch.linalg.inv(a @ a.T) / 4
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        b = b - 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-6)
    optimizer = mp.optim.LoRAFA(model, lr=0.01, weight_decay=0.0, eps=1e-6)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    moved = (b - start).abs().max()
    ours_off, theirs_off = (
        float((found.detach() - b).abs().max() / moved) for found in (model[0].lora_b, theirs)
    )
    with capsys.disabled():
        print(f"\nLoRA-FA, B off float64 after three steps: ours {ours_off:.0e}, "
              f"PEFT's {theirs_off:.0e}")  # fmt: skip
    assert ours_off < 1e-4  # float32 gradients, divided by their own size
    assert ours_off < theirs_off < 0.1  # the same formula; PEFT's product is taken in bf16


NOT_A_MODEL = """
import minipeft as mp
from torch import nn

model = nn.Sequential(nn.Linear(8, 8))
mp.inject_lora(model, ["0"], 2)
for call in (mp.optim.LoRAFA, lambda given: mp.optim.lora_plus_groups(given, 1e-3)):
    for given in (mp.adapter_parameters(model), mp.adapter_state_dict(model), list(model)):
        try:
            call(given)
        except TypeError as error:
            print(error)
"""


def test_parameters_in_the_place_of_the_model_are_told(plain_python):
    lines = plain_python(NOT_A_MODEL).splitlines()
    expected = [f"{who}: expected the model, got {what};" for who in ("LoRAFA", "lora_plus_groups")
                for what in ("generator", "dict", "list")]  # fmt: skip
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
