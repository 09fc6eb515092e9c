"""LoftQ: the alternation, the iteration that is kept, and that the codes come back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import LoRALinear, NF4Linear
from minipeft.layers import DoRALinear, NF4Conv1D


def decaying(rows=65, columns=128):
    """A weight with singular values 1, 1/2, 1/3, ..."""
    u = torch.linalg.qr(torch.randn(rows, rows)).Q
    v = torch.linalg.qr(torch.randn(columns, rows)).Q
    return u * (1 / torch.arange(1, rows + 1)) @ v.T


def dense(rows=65, columns=128):
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        linear.weight.copy_(decaying(rows, columns))
    return linear


def started(linear, rank=8, iterations=5, kind=LoRALinear, block_size=64, double_quant=True):
    base = NF4Linear.from_linear(linear, block_size=block_size, double_quant=double_quant)
    return kind(base, rank, 16, init=mp.starts.loftq(iterations).for_weight(linear))


def distance(layer, linear):
    return float((layer.exact_parameters()["weight"] - linear.weight).detach().norm())


def by_hand(weight, rank, iterations, block_size):
    """Errors of each iteration, by whole products and public functions (paper: algorithm 1)."""
    low, errors = torch.zeros_like(weight), []
    for _ in range(iterations):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight = nn.Parameter(weight - low)
        quantised = NF4Linear.from_linear(plain, block_size=block_size).dequantize(torch.float32)
        u, s, v = torch.linalg.svd((weight - quantised).double(), full_matrices=False)
        low = (u[:, :rank] * s[:rank] @ v[:rank]).float()
        errors.append(float((weight - quantised - low).norm()))
    return errors


@pytest.mark.parametrize("block_size", [32, 64])
def test_the_nearest_iteration_of_the_paper_is_kept(block_size, capsys):
    linear = dense()
    rounded = NF4Linear.from_linear(linear, block_size=block_size).dequantize(torch.float32)
    plain = float((linear.weight.detach() - rounded).norm())
    errors = by_hand(linear.weight.detach(), 8, 5, block_size)
    for iterations in range(1, 6):
        found = distance(started(linear, 8, iterations, block_size=block_size), linear)
        # a code may turn where float32 sums differ in their order
        assert found == pytest.approx(min(errors[:iterations]), rel=1e-3)
    with capsys.disabled():
        shown = ", ".join(f"{error / plain:.3f}" for error in errors)
        print(f"\nLoftQ, rank 8 of 65, blocks of {block_size}: errors of 5 iterations by that of "
              f"NF4: {shown}")  # fmt: skip
    assert min(errors) < 0.8 * plain


@pytest.mark.parametrize("double_quant", [True, False])
def test_settings_of_the_base_stay(double_quant):
    linear = dense()
    layer = started(linear, block_size=32, double_quant=double_quant)
    assert layer.base.block_size == 32 and layer.base.double_quant == double_quant
    assert not layer.base.packed.requires_grad
    x = torch.randn(3, 128)
    exact = nn.functional.linear(x, layer.exact_parameters()["weight"], linear.bias)
    torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-5)  # float32 sums


def test_conv1d_dora_and_a_rank_above_the_sizes():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv = Conv1D(65, 128)
    with torch.no_grad():
        conv.weight.copy_(decaying().T)
    layer = LoRALinear(NF4Conv1D.from_linear(conv), 8, init=mp.starts.loftq().for_weight(conv))
    plain = NF4Conv1D.from_linear(conv)
    off = (layer.exact_parameters()["weight"] - conv.weight).norm()
    assert off < 0.8 * (plain.weight - conv.weight).norm()
    linear = dense()
    # float32 norms of 2,112 numbers; the magnitude is a rounding away from that of the sum
    assert distance(started(linear, kind=DoRALinear), linear) == pytest.approx(
        distance(started(linear), linear), rel=1e-4
    )  # the magnitude is that of the sum
    small = dense(7, 64)
    with pytest.warns(UserWarning, match="rank 9 is above"):
        assert distance(started(small, rank=9), small) < 1e-5  # every direction is kept


def test_the_codes_come_back_bit_for_bit_also_from_copies():
    linear = dense()
    plain = NF4Linear.from_linear(linear).packed_parameters()
    layer = started(linear)
    kept = sum(t.numel() for t in layer.__dict__["codes_before"].values())
    assert kept == sum(t.numel() for t in plain.values())  # bytes: what NF4 takes, once more
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not torch.equal(each.base.packed, plain["packed"])
        each.restore_base()
        found = each.base.packed_parameters()
        assert all(torch.equal(found[name], value) for name, value in plain.items())
        each.restore_base()  # once; then it does nothing
        assert torch.equal(each.base.packed, plain["packed"])


def test_what_is_refused_leaves_the_base_as_it_was():
    linear = dense()
    base = NF4Linear.from_linear(linear)
    before = {name: t.clone() for name, t in base.packed_parameters().items()}
    own = NF4Linear(128, 65, codebook=[-1 + i / 7.5 for i in range(16)])
    init = mp.starts.loftq().for_weight(linear)
    for make, message in (
        (lambda: LoRALinear(base, 4, init=mp.starts.loftq()), "before quantisation"),
        (
            lambda: LoRALinear(base, 4, init=mp.starts.loftq().for_weight(linear.weight.T)),
            r"\(128, 65\)",
        ),
        (lambda: LoRALinear(LoRALinear(base, 2), 4, init=init), "over NF4Linear"),
        (lambda: LoRALinear(own, 4, init=init), "codebook"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
        assert all(torch.equal(t, before[n]) for n, t in base.packed_parameters().items())
