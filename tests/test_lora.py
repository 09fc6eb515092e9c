"""LoRALinear: properties, a float64 reference, PEFT."""

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minipeft as mp
from minipeft import LoRALinear, NF4Linear
from minipeft.lora import add_lora

SIZES = st.sampled_from([1, 2, 7, 63, 65])


def trained(base, rank=4, alpha=None, **arguments):
    """A layer whose B is not zero."""
    layer = LoRALinear(base, rank, alpha, **arguments)
    nn.init.normal_(layer.lora_b, std=0.1)
    return layer


@given(in_features=SIZES, out_features=SIZES, batch=st.sampled_from([(), (1,), (3,), (2, 5)]))
def test_zero_b_leaves_the_output_unchanged(in_features, out_features, batch):
    base = nn.Linear(in_features, out_features)
    layer = LoRALinear(base, 1)
    x = torch.randn(*batch, in_features)
    assert torch.equal(layer(x), base(x))


@given(
    in_features=SIZES, out_features=SIZES, rank=st.sampled_from([1, 3]),
    batch=st.sampled_from([(), (1,), (7,), (2, 5)]), scaling=st.sampled_from([0.25, 1.0, 3.0]),
)  # fmt: skip
def test_output_and_gradients_equal_a_float64_loop(in_features, out_features, rank, batch, scaling):
    x = torch.randn(*batch, in_features, requires_grad=True)
    a = torch.randn(rank, in_features, requires_grad=True)
    b = torch.randn(out_features, rank, requires_grad=True)
    base_out = torch.randn(*batch, out_features, requires_grad=True)
    grad = torch.randn(*batch, out_features)
    y = add_lora(base_out, x, a, b, scaling)
    y.backward(grad)
    x64, a64, b64, g64 = (t.detach().double() for t in (x, a, b, grad))
    rows, grows = x64.reshape(-1, in_features), g64.reshape(-1, out_features)
    expected = base_out.detach().double().reshape(-1, out_features).clone()
    da, db, dx = torch.zeros_like(a64), torch.zeros_like(b64), torch.zeros_like(rows)
    delta = scaling * sum(torch.outer(b64[:, k], a64[k]) for k in range(rank))
    for i, (row, g) in enumerate(zip(rows, grows, strict=True)):
        expected[i] += delta @ row
        dx[i] = delta.T @ g
        for k in range(rank):
            da[k] += scaling * (b64[:, k] @ g) * row
            db[:, k] += scaling * (a64[k] @ row) * g
    # float32 sums of at most 65 products; values up to 330: measured 7e-5, or 2.4e-6 of the largest
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.double(), expected.view(y.shape), **tolerance)
    torch.testing.assert_close(x.grad.double(), dx.view(x.shape), **tolerance)
    torch.testing.assert_close(a.grad.double(), da, **tolerance)
    torch.testing.assert_close(b.grad.double(), db, **tolerance)
    assert torch.equal(base_out.grad, grad)


def test_first_and_second_derivatives():
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True)
               for s in ((2, 3, 5), (2, 3, 7), (2, 7), (5, 2))]  # fmt: skip

    def function(base_out, x, a, b):
        return add_lora(base_out, x, a, b, 0.7)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_functional_transforms():
    layer = trained(nn.Linear(5, 3).double(), 2, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    x, tangent = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)(parameters, x)
    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    layer(x).square().sum().backward()
    # float64; the same sums in another order
    torch.testing.assert_close(grads["lora_a"], layer.lora_a.grad, rtol=1e-12, atol=1e-12)
    # float64; the same sums in another order: measured 2e-16
    torch.testing.assert_close(per_row["lora_b"].sum(0), layer.lora_b.grad, rtol=1e-12, atol=1e-12)
    _, moved = torch.func.jvp(layer, (x,), (tangent,))
    # the same
    torch.testing.assert_close(moved, tangent @ layer.weight.T, rtol=1e-12, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        moved = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    # the same
    torch.testing.assert_close(moved, tangent @ layer.weight.T, rtol=1e-12, atol=1e-12)


def test_backward_keeps_x_and_x_a_and_the_factors_only():
    layer, x = trained(nn.Linear(64, 96), rank=4), torch.randn(10, 64, requires_grad=True)
    saved = []

    def record(tensor):
        saved.append(sorted(tensor.shape))  # a transposed view is the same memory
        return tensor

    base_out = layer.base(x).detach()
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        add_lora(base_out, x, layer.lora_a, layer.lora_b, 1.0)
    assert sorted(saved) == [[4, 10], [4, 64], [4, 96], [10, 64]]


def test_bf16_adds_in_float32_and_rounds_once():
    base, x = nn.Linear(64, 32, bias=False).bfloat16(), torch.randn(9, 64).bfloat16()
    layer = trained(base)
    assert layer.lora_a.dtype == torch.float32
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = x.double() @ (base.weight.double() + layer.delta().double()).T
    # base(x), x A^T and the sum are rounded to bf16: three roundings of 2**-9 and cancellation
    assert ((y.double() - exact).abs() <= 4 * 2.0**-8 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_another_dtype(dtype):
    layer = trained(nn.Linear(8, 4), dtype=dtype)
    assert layer.lora_a.dtype == dtype
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.lora_a.grad.dtype == dtype


def test_autocast_computes_in_its_dtype():
    layer = trained(nn.Linear(8, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(2, 8))
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_b.grad.dtype == torch.float32


def test_dropout_acts_in_training_only_and_on_the_branch_only():
    layer, x = trained(nn.Linear(64, 8), dropout=0.5), torch.randn(4, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    # float32, sums of 64 products: measured 2e-7
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5
    )
    silent = LoRALinear(nn.Linear(64, 8), 2, dropout=0.9)  # B = 0: the base path sees no dropout
    assert torch.equal(silent(x), silent.base(x))


def test_scaling():
    assert LoRALinear(nn.Linear(4, 4), 2).scaling == 1
    assert LoRALinear(nn.Linear(4, 4), 2, 6).scaling == 3
    assert LoRALinear(nn.Linear(4, 4), 4, 6, rank_stabilized=True).scaling == 3


def test_the_default_initialisation_is_uniform_with_bound_one_over_root_in():
    layer = LoRALinear(nn.Linear(256, 16), 16)
    assert layer.lora_a.abs().max() <= 1 / 16
    # a uniform on [-c, c] has deviation c / sqrt(3); 4,096 draws: 1 % is four standard errors
    assert abs(layer.lora_a.std().item() - 1 / 16 / 3**0.5) < 0.02 / 16
    assert (layer.lora_b == 0).all()


def test_weight_is_effective_and_differentiable():
    layer, x = trained(nn.Linear(16, 8)), torch.randn(3, 16)
    # float32, sums of 16 products: measured 1e-7
    torch.testing.assert_close(
        F.linear(x, layer.weight, layer.bias), layer(x), rtol=1e-5, atol=1e-6
    )
    layer.weight.sum().backward()
    assert layer.lora_a.grad is not None
    with mp.disable_adapters(layer):
        assert torch.equal(layer.weight, layer.base.weight)
    for name in ("weight", "bias"):
        with pytest.raises(AttributeError, match="belongs to the base"):
            setattr(layer, name, nn.Parameter(torch.zeros(8, 16)))


@given(in_features=SIZES, out_features=SIZES, rank=st.sampled_from([1, 2, 5]))
def test_delta_has_at_most_the_rank(in_features, out_features, rank):
    delta = mp.lora_delta(torch.randn(rank, in_features), torch.randn(out_features, rank), 2.0)
    assert delta.shape == (out_features, in_features)
    # singular values below 1e-5 of the largest are float32 round-off of the product
    assert torch.linalg.matrix_rank(delta.double(), rtol=1e-5) <= rank


def linear_like():
    class OwnLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 16, 8
            self.weight = nn.Parameter(torch.randn(8, 16))

        def forward(self, x):
            return x @ self.weight.T

    bases = {"linear": nn.Linear(16, 8), "no bias": nn.Linear(16, 8, bias=False),
             "NF4": NF4Linear.from_linear(nn.Linear(16, 8)), "own": OwnLinear()}  # fmt: skip
    if "transformers" in sys.modules or pytest.importorskip("transformers"):
        from transformers.pytorch_utils import Conv1D

        bases["Conv1D"] = Conv1D(8, 16)
        nn.init.normal_(bases["Conv1D"].bias)
    return bases


@pytest.mark.parametrize("kind", ["linear", "no bias", "NF4", "own", "Conv1D"])
def test_every_linear_like_base(kind):
    base, x = linear_like()[kind], torch.randn(3, 5, 16)
    layer = trained(base, alpha=8)
    expected = base(x) + mp.lora_forward(x, layer.lora_a, layer.lora_b, layer.scaling)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)  # order of float32 sums
    assert layer.weight.shape == base.weight.shape
    plain = layer.merged()
    # values up to 12; the product is rounded into the weight: measured 1e-6
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)
    assert not isinstance(plain, LoRALinear | NF4Linear)
    layer.eval().merge()
    # the same
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    with mp.disable_adapters(layer):
        assert torch.equal(layer(x), base(x))


def test_the_base_is_called_with_its_hooks():
    base, calls = nn.Linear(4, 4), []
    base.register_forward_hook(lambda module, args, out: calls.append(1))
    LoRALinear(base, 1)(torch.randn(2, 4))
    assert calls == [1]


def test_copies():
    layer, x = trained(nn.Linear(8, 4), dropout=0.1).eval(), torch.randn(2, 8)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))
        assert again.lora_a.data_ptr() != layer.lora_a.data_ptr()


def test_a_rank_above_the_sizes_warns():
    with pytest.warns(UserWarning, match="rank 9 is above"):
        LoRALinear(nn.Linear(8, 8), 9)


def test_bad_input_raises(plain_python):
    """Without the annotations' own checks, which would come first."""
    plain_python("""
import math, pytest
from torch import nn
from minipeft import LoRALinear
linear = nn.Linear(8, 8)
for rank in (0, -1, 1.5, True, "8"):
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(linear, rank)
for alpha in (0, -1.0, math.nan, math.inf, "1"):
    with pytest.raises(ValueError, match="alpha"):
        LoRALinear(linear, 2, alpha)
for dropout in (1, -0.1, math.nan):
    with pytest.raises(ValueError, match="dropout"):
        LoRALinear(linear, 2, dropout=dropout)
with pytest.raises(TypeError, match="module"):
    LoRALinear(linear.weight, 2)
others = (nn.LayerNorm(8), nn.Embedding(8, 8), nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Bilinear(4, 4, 4))
for base in others:
    with pytest.raises(ValueError, match="no linear layer"):
        LoRALinear(base, 2)
assert linear.weight.requires_grad  # nothing is half-done
assert not LoRALinear(LoRALinear(linear, 2), 2).base.base.weight.requires_grad  # layers stack
""")


def test_output_and_gradients_equal_peft(capsys):
    peft_layer = pytest.importorskip("peft.tuners.lora.layer")
    from peft import LoraConfig

    base, x = nn.Linear(65, 33), torch.randn(7, 65)
    theirs = peft_layer.Linear(
        copy.deepcopy(base), "default", config=LoraConfig(r=4, lora_alpha=12), r=4, lora_alpha=12
    )
    ours = trained(base, 4, 12)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_a)
        theirs.lora_B["default"].weight.copy_(ours.lora_b)
    grad, results = torch.randn(7, 33), []
    for layer in (ours, theirs):
        y = layer(inputs := x.clone().requires_grad_())
        y.backward(grad)
        results.append([y.detach(), inputs.grad])
    results[0] += [ours.lora_a.grad, ours.lora_b.grad]
    results[1] += [theirs.lora_A["default"].weight.grad, theirs.lora_B["default"].weight.grad]
    differences = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True)
    ]
    with capsys.disabled():
        print(f"\nLoRA against PEFT, float32, y dx da db: {[f'{d:.1e}' for d in differences]}")
    assert max(differences) <= 1e-6  # the same products; only the order of sums may differ
