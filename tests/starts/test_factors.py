"""Initialisations: what they start as, that the base stays, and what PEFT makes of the same."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import LoRALinear, NF4Linear
from minipeft.layers import LoRAConv

STARTED = {
    "PiSSA": mp.starts.pissa(),
    "fast PiSSA": mp.starts.pissa(32),
    "OLoRA": mp.starts.olora(),
}


def bases():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return {"linear": nn.Linear(64, 33), "NF4": NF4Linear.from_linear(nn.Linear(64, 33)),
            "Conv1D": Conv1D(33, 64), "stacked": LoRALinear(nn.Linear(64, 33), 2)}  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "NF4", "Conv1D", "stacked"])
@pytest.mark.parametrize("init", STARTED)
def test_the_output_starts_at_the_base_and_the_base_keeps_its_bits(kind, init):
    base, x = bases()[kind], torch.randn(5, 64)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    layer = LoRALinear(base, 4, 8, init=STARTED[init])
    torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-5)  # B A - B0 A0
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    assert layer.lora_a.abs().sum() > 0 and layer.lora_b.abs().sum() > 0
    assert not layer.lora_a0.requires_grad
    with torch.no_grad():
        layer.lora_b.add_(torch.randn_like(layer.lora_b))
    a, b = layer.factors()
    assert a.shape == (8, 64) and b.shape == (33, 8)
    plain = LoRALinear(base, 8, 16)
    with torch.no_grad():
        plain.lora_a.copy_(a)
        plain.lora_b.copy_(b)
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-4, atol=1e-4)  # a plain LoRA
    # float32: the product is rounded into the weight, values up to 14: measured 3e-6
    torch.testing.assert_close(layer.eval().merged()(x), layer(x), rtol=1e-4, atol=1e-4)


def test_pissa_is_the_best_approximation_of_its_rank():
    base = nn.Linear(64, 33)
    layer = LoRALinear(base, 4, 8, init=mp.starts.pissa())
    u, s, v = np.linalg.svd(base.weight.detach().double().numpy(), full_matrices=False)
    best = torch.from_numpy(u[:, :4] * s[:4] @ v[:4])
    product = layer.scaling * (layer.lora_b @ layer.lora_a).double()
    torch.testing.assert_close(product, best, rtol=1e-4, atol=1e-5)  # a float32 decomposition
    fast = LoRALinear(base, 4, 8, init=mp.starts.pissa(64))
    rest = (base.weight - fast.scaling * fast.lora_b @ fast.lora_a).norm()
    assert rest < 1.01 * np.sqrt((s[4:] ** 2).sum())  # power iterations come near the best


def test_olora_is_the_start_of_an_orthogonal_factorisation():
    base = nn.Linear(64, 33)
    layer = LoRALinear(base, 4, init=mp.starts.olora())
    # float32 sums of 33 products: measured 4e-7
    torch.testing.assert_close(layer.lora_b.T @ layer.lora_b, torch.eye(4), rtol=1e-5, atol=1e-5)
    # Q^T W = R: its first rows
    torch.testing.assert_close(layer.lora_b.T @ base.weight, layer.lora_a, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_step_of_training_leads_where_pefts_does(init):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 33)), torch.randn(9, 64)
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init),
    )
    mp.inject_lora(
        model, ["0"], 4, 8, init={"pissa": mp.starts.pissa(), "olora": mp.starts.olora()}[init]
    )
    results = []
    for run in (model, theirs):
        parameters = [p for p in run.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        run(x).square().mean().backward()
        optimizer.step()
        results.append(run(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)  # signs of vectors do not matter


def test_orthogonal_and_gaussian_start_at_the_base():
    base, x = nn.Linear(64, 33), torch.randn(5, 64)
    layer = LoRALinear(base, 8, init=mp.starts.orthogonal())
    assert layer.lora_b.abs().sum() > 0
    torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-4)  # B A = 0 up to rounding
    with pytest.raises(ValueError, match="odd"):
        LoRALinear(base, 3, init=mp.starts.orthogonal())
    layer = LoRALinear(nn.Linear(4096, 8), 8, init=mp.starts.gaussian())
    x = torch.randn(2, 4096)
    assert torch.equal(layer(x), layer.base(x))
    # 32,768 draws: the deviation of a deviation is 0.4 %
    assert abs(layer.lora_a.std().item() - 1 / 8) < 0.03 / 8


def test_other_layers_and_the_meta_device_are_refused():
    for init in (
        mp.starts.pissa(),
        mp.starts.olora(),
        mp.starts.orthogonal(),
        mp.starts.pissa(iterations=16),
    ):
        with pytest.raises(ValueError, match="linear layers only"):
            LoRAConv(nn.Conv1d(4, 4, 3), 2, init=init)
    with pytest.raises(ValueError, match="meta device"):
        LoRALinear(nn.Linear(8, 8, device="meta"), 2, init=mp.starts.pissa())
    with pytest.raises(ValueError, match="iterations=0"):
        mp.starts.pissa(0)


def test_dora_keeps_its_magnitude():
    base = nn.Linear(64, 33)
    layer = mp.layers.DoRALinear(base, 4, init=mp.starts.pissa())
    # a float32 norm of 64 numbers: measured 6e-8
    torch.testing.assert_close(layer.magnitude, base.weight.norm(dim=1), rtol=1e-5, atol=1e-6)
    x = torch.randn(3, 64)
    # W - B A + B A in float32: measured 0
    torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-4)


def decaying(rows=96, columns=128):
    """A matrix with singular values 1, 1/2, 1/3, ..., plus noise."""
    u = torch.linalg.qr(torch.randn(rows, rows)).Q
    v = torch.linalg.qr(torch.randn(columns, rows)).Q
    return u * (1 / torch.arange(1, rows + 1)) @ v.T


def test_loftq_comes_nearer_to_the_weight_and_is_undone_bit_for_bit():
    linear = nn.Linear(128, 96)
    with torch.no_grad():
        linear.weight.copy_(decaying())
    model = nn.Sequential(copy.deepcopy(linear), nn.Linear(96, 4))
    plain = NF4Linear.from_linear(linear)
    mp.inject_qlora(model, ["0"], 8, init=mp.starts.loftq(), skip=["1"])
    layer = model[0]
    ours = (linear.weight - layer.weight).norm()
    rounded = (linear.weight - plain.weight).norm()
    assert ours < 0.85 * rounded, (ours, rounded)  # 8 of 96 directions of the rounding error
    assert not torch.equal(layer.base.packed, plain.packed)
    mp.remove(model)
    assert all(torch.equal(p, plain.packed_parameters()[n])
               for n, p in model[0].packed_parameters().items())  # fmt: skip


def test_loftq_needs_the_dense_weight():
    with pytest.raises(ValueError, match="inject_qlora"):
        mp.inject_lora(nn.Sequential(nn.Linear(64, 64)), ["0"], 4, init=mp.starts.loftq())
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 32)), 4)
    with pytest.raises(ValueError, match=r"\(31, 64\)"):
        mp.starts.loftq().for_weight(torch.randn(31, 64))(layer)
    with pytest.raises(ValueError, match="over NF4Linear"):
        mp.starts.loftq().for_weight(torch.randn(8, 8))(LoRALinear(nn.Linear(8, 8), 2))
    with pytest.raises(ValueError, match="iterations"):
        mp.starts.loftq(0)
