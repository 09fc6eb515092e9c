"""A head in which some tokens have weight rows of their own."""

import copy

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.layers.trained_head import TrainedHeadRows

IDS = [4, 1]
X = torch.randn(3, 6)
ROUNDING = 1e-6  # float32, sums of up to 64 products, values up to 4: measured 2.4e-7


def made(bias=True):
    layer = TrainedHeadRows(nn.Linear(6, 9, bias=bias).eval(), IDS)
    with torch.no_grad():
        layer.token_rows.add_(torch.randn_like(layer.token_rows))
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_with_its_rows_in_the_weight(bias):
    layer = made(bias)
    weight = layer.base.weight.detach().clone()
    weight[IDS] = layer.token_rows.detach()
    expected = nn.functional.linear(X, weight, layer.base.bias)
    torch.testing.assert_close(layer(X), expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(layer.merged()(X), expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0)
    others = [i for i in range(9) if i not in IDS]
    assert torch.equal(layer(X)[:, others], layer.base(X)[:, others])


def test_off_it_is_the_base_and_starts_there():
    layer = made()
    layer.enabled = False
    assert torch.equal(layer(X), layer.base(X))
    fresh = TrainedHeadRows(nn.Linear(6, 9), IDS)
    torch.testing.assert_close(fresh(X), fresh.base(X), rtol=0, atol=ROUNDING)


def test_only_the_rows_train():
    layer = made()
    layer(X).square().sum().backward()
    assert layer.token_rows.grad.abs().min() > 0
    assert layer.base.weight.grad is None and not layer.base.weight.requires_grad
    assert set(layer.adapter_parameters()) == {"token_rows"}


def test_a_copy_follows_its_own_rows():
    layer = made()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.token_rows.zero_()
    assert torch.equal(twin.merged().weight[IDS], torch.zeros(2, 6))
    assert layer(X)[:, IDS].abs().max() > 0


def test_a_four_bit_head_takes_rows():
    layer = TrainedHeadRows(mp.NF4Linear.from_linear(nn.Linear(64, 9)), IDS)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("base", "ids", "message"),
    [(nn.Embedding(9, 6), IDS, "no linear layer"), (nn.Linear(6, 9), [9], r"token ids \[9\]"),
     (nn.Linear(6, 9), [], "token ids"), (nn.Linear(6, 9), [1, 1], "token ids"),
     (nn.Linear(6, 9, device="meta"), IDS, "meta device")],
    ids=["embedding", "beyond", "none", "twice", "meta"],
)  # fmt: skip
def test_what_it_cannot_be_is_refused(base, ids, message):
    with pytest.raises(ValueError, match=message):
        TrainedHeadRows(base, ids)


@pytest.mark.slow
def test_a_compiled_head_computes_the_same_on_and_off(plain_python):
    out = plain_python(
        "import torch\n"
        "from torch import nn\n"
        "from minipeft.layers.trained_head import TrainedHeadRows\n"
        "layer = TrainedHeadRows(nn.Linear(6, 9), [4, 1]).eval()\n"
        "nn.init.normal_(layer.token_rows)\n"
        "x = torch.randn(3, 6)\n"
        "compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)\n"
        "for enabled in (True, False):\n"
        "    layer.enabled = enabled\n"
        # float32, numbers around 1: a few ulps for another order of sums
        "    print((compiled(x) - layer(x)).abs().max().item() <= 1e-6)\n"
        "    print(torch.equal(layer(x), layer.base(x)) != enabled)\n"
    )
    assert out.split() == ["True"] * 4
