"""Products of 16-bit numbers: the same values on every CPU, and no slow loop in silence."""

import warnings

import pytest
import torch
from torch import nn

import minipeft as mp
from benchmarks.models import training_dtype
from minipeft.adapters import products
from minipeft.layers.mixture import by_expert

HALVES = (torch.bfloat16, torch.float16)
# one rounding to the result's dtype; the order of sums may move a sum across a midpoint
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture
def slow(monkeypatch):
    """A CPU without 16-bit products, whatever this one is."""
    monkeypatch.setattr(products, "SLOW_ON_CPU", frozenset(HALVES))
    monkeypatch.setattr(products, "_warned", False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def fast(monkeypatch):
    """A CPU that has them."""
    monkeypatch.setattr(products, "SLOW_ON_CPU", frozenset())
    monkeypatch.setattr(products, "_warned", False)


def close_to(value, exact, dtype):
    """Within one rounding of a sum, whose terms can be larger than it is."""
    # one rounding of the result to the dtype is half a ULP; two leave room for the sum's own
    torch.testing.assert_close(
        value.double(), exact, rtol=2 * ULP[dtype], atol=2 * ULP[dtype] * float(exact.abs().max())
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 65])
def test_products_in_float32_are_the_exact_ones_rounded_once(slow, dtype, rows):
    x, w = torch.randn(rows, 63).to(dtype), torch.randn(33, 63).to(dtype)
    bias, out = torch.randn(33).to(dtype), torch.randn(rows, 33).to(dtype)
    exact = x.double() @ w.double().T
    for value, wanted in (
        (products.linear(x, w, bias), exact + bias.double()),
        (products.addmm(out, x, w.T, 0.5), out.double() + 0.5 * exact),
    ):
        assert value.dtype == dtype
        # float32's own rounding of 63 terms is below 2^-16 of their size: one ulp of the result
        torch.testing.assert_close(value.double(), wanted, rtol=ULP[dtype], atol=2.0**-14)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layer_of", [mp.NF4Linear.from_linear, lambda x: mp.LoRALinear(
    mp.NF4Linear.from_linear(x), rank=4)], ids=["NF4Linear", "QLoRA"])  # fmt: skip
def test_a_4_bit_layer_gives_the_same_numbers_with_and_without_such_products(
    monkeypatch, dtype, layer_of
):
    layer = layer_of(nn.Linear(128, 96).to(dtype))
    if isinstance(layer, mp.LoRALinear):
        nn.init.normal_(layer.lora_b, std=0.1)
    given, grad = torch.randn(5, 128).to(dtype), torch.randn(5, 96).to(dtype)
    found = {}
    for name, kinds in (("slow", frozenset(HALVES)), ("fast", frozenset())):
        monkeypatch.setattr(products, "SLOW_ON_CPU", kinds)
        x = given.clone().requires_grad_()
        out = layer(x)
        trained = [p for p in layer.parameters() if p.requires_grad]
        found[name] = (out, *torch.autograd.grad(out, [x, *trained], grad))
    for one, other in zip(found["slow"], found["fast"], strict=True):
        assert one.dtype == other.dtype
        close_to(one.detach(), other.detach().double(), dtype)


def test_compute_dtype_overrides_the_choice(slow):
    linear = nn.Linear(64, 32).bfloat16()
    plain = mp.NF4Linear.from_linear(linear)
    wide = mp.NF4Linear.from_linear(linear, compute_dtype=torch.float32)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    exact = x.double() @ plain.dequantize(torch.float32).double().T + plain.bias.double()
    rounded = x.double() @ plain.dequantize(torch.bfloat16).double().T + plain.bias.double()
    assert (wide(x) - exact).abs().max() <= (wide(x) - rounded).abs().max()
    close_to(plain(x), rounded, torch.bfloat16)


def test_experts_take_the_same_path(slow):
    x, expert = torch.randn(6, 64, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 2, 0, 1])
    weight = torch.randn(3, 32, 64, dtype=torch.bfloat16)
    exact = torch.einsum("ti,toi->to", x.double(), weight.double()[expert])
    close_to(by_expert(x, expert, weight), exact, torch.bfloat16)
    experts = mp.layers.NF4Experts.from_weight(weight)
    decoded = experts.dequantize().double()[expert]
    close_to(experts(x, expert), torch.einsum("ti,toi->to", x.double(), decoded), torch.bfloat16)


def test_where_torch_cannot_be_asked_a_product_counts_as_slow():
    assert products._multiplied_by("int3") is False


def test_a_dense_16_bit_layer_warns_once_and_names_the_remedy(slow):
    with pytest.warns(
        mp.SlowProductsWarning, match=r"no products of bfloat16.*\(model.float\(\)\)"
    ):
        mp.LoRALinear(nn.Linear(8, 8).bfloat16(), rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp.LoRALinear(nn.Linear(8, 8).bfloat16(), rank=2)


@pytest.mark.parametrize("base", [
    lambda: nn.Linear(8, 8), lambda: mp.NF4Linear.from_linear(nn.Linear(64, 8).bfloat16()),
], ids=["float32", "4-bit"])  # fmt: skip
def test_what_is_not_slow_does_not_warn(slow, base):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp.LoRALinear(base(), rank=2)
        mp.layers.LoRAEmbedding(nn.Embedding(8, 4).bfloat16(), rank=2)


def test_a_cpu_with_such_products_does_not_warn(fast):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp.LoRALinear(nn.Linear(8, 8).bfloat16(), rank=2)


def test_backend_says_where_products_are_in_float32(slow):
    said = mp.backend(dtype=torch.bfloat16)
    assert said["nf4_linear"].startswith(("numba ", "pytorch "))
    assert said["nf4_linear"].endswith(", products in float32 (this CPU has none of bfloat16)")
    assert "float32" not in said["dequantize_nf4"]
    assert "products in float32" not in mp.backend(dtype=torch.float32)["nf4_linear"]


def test_benchmarks_choose_the_dtype_that_the_cpu_multiplies_and_print_it(slow, capsys):
    assert training_dtype() == torch.float32
    assert "float32 (this CPU has no products of bfloat16)" in capsys.readouterr().out
    assert training_dtype("bf16") == torch.bfloat16
    assert training_dtype(device="cuda") == torch.bfloat16


def test_benchmarks_take_bfloat16_where_the_cpu_multiplies_it(fast, capsys):
    assert training_dtype() == torch.bfloat16
    assert "bfloat16" in capsys.readouterr().out
