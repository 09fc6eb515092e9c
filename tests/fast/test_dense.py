"""Frozen 16-bit linear layers below adapters, on a CPU without products of 16 bits."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import minipeft as mp
from minipeft.adapters import products
from minipeft.fast import dense, panels

HALVES = (torch.bfloat16, torch.float16)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # one rounding, relative
SIZES = (160, 96)  # in and out: of 18 rows on, products are computed in panels


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    """A CPU without 16-bit products, whatever this one is."""
    monkeypatch.setattr(products, "SLOW_ON_CPU", frozenset(HALVES))
    monkeypatch.setattr(products, "_warned", True)


@pytest.fixture
def calls(monkeypatch):
    """The products that were computed in panels, True for those with the turned weight."""
    seen, multiplied = [], dense._multiplied

    def spy(x, weight, bias, turned):
        seen.append(turned)
        return multiplied(x, weight, bias, turned)

    monkeypatch.setattr(dense, "_multiplied", spy)
    return seen


def made(dtype=torch.bfloat16, *, sizes=SIZES, bias=True):
    return nn.Linear(*sizes, bias=bias).to(dtype).requires_grad_(False)


def assert_rounded_once(value, x, w, bias=None):
    """One rounding of x W^T + bias, up to the rounding errors of a float32 sum."""
    dtype, terms = value.dtype, x.shape[-1] + 1
    x, w, b = x.double(), w.double(), 0.0 if bias is None else bias.double()
    exact, size = x @ w.T + b, x.abs() @ w.abs().T + (0.0 if bias is None else b.abs())
    inside = terms * 2.0**-24 * size  # a sum of n numbers of float32 has n roundings
    # 2^-25: half of float16's least number
    bound = inside + UNIT[dtype] * (exact.abs() + inside) + 2.0**-25
    assert value.shape == exact.shape
    assert ((value.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bytes_of_a_panel", [2**14, 2**22], ids=["panels", "one panel"])
@pytest.mark.parametrize("rows", [18, 64, 65, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_exact_but_for_one_rounding(
    monkeypatch, calls, dtype, bytes_of_a_panel, rows, bias
):
    monkeypatch.setattr(panels, "PANEL_BYTES", bytes_of_a_panel)
    monkeypatch.setattr(dense, "FEW_FORWARD", 0)
    layer = made(dtype, bias=bias)
    x = torch.randn(rows, 160, dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, 96, dtype=dtype)
    y = products.call(layer, x)
    y.backward(grad)
    assert calls == [False, True]
    assert y.dtype == x.grad.dtype == dtype
    assert_rounded_once(y.detach(), x.detach(), layer.weight, layer.bias)
    assert_rounded_once(x.grad, grad, layer.weight.T)
    with torch.no_grad():
        assert torch.equal(products.call(layer, x), y)


@pytest.mark.parametrize("shape", [(2, 3, 7, 160), (60, 160)])
@pytest.mark.parametrize("how", ["contiguous", "strided", "expanded"])
def test_any_shape_and_stride(calls, shape, how):
    layer, x = made(), torch.randn(*shape, dtype=torch.bfloat16)
    if how == "strided":
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif how == "expanded":
        x = x[:1].expand(*shape)
    assert x.is_contiguous() == (how == "contiguous")
    x.requires_grad_()
    y = products.call(layer, x)
    assert_rounded_once(y.detach(), x.detach(), layer.weight, layer.bias)
    (dx,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
    assert_rounded_once(dx, torch.ones_like(y), layer.weight.T)
    assert calls == [False, True]
    layer.weight = nn.Parameter(layer.weight.T.contiguous().T, requires_grad=False)
    assert torch.equal(products.call(layer, x), y)


@pytest.mark.parametrize("shape", [(16, 160), (1, 160), (160,), (0, 160), (3, 0, 160)])
def test_what_torch_multiplies_as_fast_it_multiplies(calls, shape):
    layer, x = made(), torch.randn(*shape, dtype=torch.bfloat16)
    assert torch.equal(products.call(layer, x), layer(x))
    assert calls == []


def test_of_few_rows_the_gradient_alone_is_computed_here():
    layer = made(sizes=(512, 512))
    x = torch.randn(4, 512, dtype=torch.bfloat16, requires_grad=True)
    y, plain = products.call(layer, x), layer(x)
    assert "Product" in type(y.grad_fn).__name__
    assert torch.equal(y, plain)
    grad = torch.randn_like(y)
    assert_rounded_once(torch.autograd.grad(y, x, grad)[0], grad, layer.weight.T)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hooked(how):
    layer = made()
    hooks = {
        "pre": lambda: layer.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
        "after": lambda: layer.register_forward_hook(lambda _, args, out: 2 * out),
        "backward": lambda: layer.register_full_backward_hook(lambda _, dx, dy: (2 * dx[0],)),
        "before": lambda: layer.register_full_backward_pre_hook(lambda _, dy: (2 * dy[0],)),
    }  # fmt: skip
    hooks[how]()
    return layer


def _replaced():
    layer = made()
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    return layer


def _norm():
    return torch.nn.utils.parametrizations.weight_norm(made()).requires_grad_(False)


@pytest.mark.parametrize("make", [
    lambda: Doubled(*SIZES).bfloat16().requires_grad_(False), _replaced, _norm,
    *(partial(_hooked, how) for how in ("pre", "after", "backward", "before")),
], ids=["subclass", "replaced", "weight norm", "pre", "after", "backward", "before"])  # fmt: skip
def test_a_layer_that_is_more_than_its_formula_is_called(calls, make):
    layer = mp.LoRALinear(make(), rank=2)
    x = torch.randn(40, 160, dtype=torch.bfloat16, requires_grad=True)
    y, plain = layer(x), layer.base(x)
    assert torch.equal(y, plain)
    grad = torch.randn_like(y)
    (mine,), (wanted,) = (torch.autograd.grad(out, x, grad) for out in (y, plain))
    assert torch.equal(mine, wanted)  # lora_b is zero
    assert calls == []


def test_hooks_on_every_module_are_called(calls):
    seen, layer = [], made()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        products.call(layer, torch.randn(40, 160, dtype=torch.bfloat16))
    finally:
        handle.remove()
    assert seen == [1]
    assert calls == []


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_that_trains_gets_its_gradient(calls, name):
    layer = made()
    parameter = layer.get_parameter(name).requires_grad_()
    products.call(layer, torch.randn(40, 160, dtype=torch.bfloat16)).sum().backward()
    assert parameter.grad is not None
    assert calls == []


def test_a_wrong_input_gets_torchs_error(calls):
    layer = made()
    for x in (torch.randn(40, 160), torch.randn(40, 161, dtype=torch.bfloat16),
              torch.randn(40, 160, dtype=torch.float16)):  # fmt: skip
        with pytest.raises(RuntimeError):
            products.call(layer, x)
    layer.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
    with pytest.raises(RuntimeError):
        products.call(layer, torch.randn(40, 160, dtype=torch.bfloat16))
    assert calls == []


def test_transforms_and_forward_mode_take_torchs_operations(calls):
    layer, x = made(), torch.randn(3, 40, 160, dtype=torch.bfloat16)
    call, plain = partial(products.call, layer), layer
    assert torch.equal(torch.func.vmap(call)(x), torch.func.vmap(plain)(x))
    loss = lambda function: lambda x: function(x).float().pow(2).sum()  # noqa: E731
    assert torch.equal(torch.func.grad(loss(call))(x), torch.func.grad(loss(plain))(x))
    _, tangent = torch.func.jvp(call, (x,), (x,))
    assert torch.equal(tangent, torch.func.jvp(plain, (x,), (x,))[1])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert torch.equal(forward_ad.unpack_dual(call(dual)).tangent, tangent)
    assert calls == []


def test_a_mode_sees_torchs_operations(calls):
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        products.call(made(), torch.randn(40, 160, dtype=torch.bfloat16))
    assert "aten.addmm.default" in names
    assert calls == []


def test_a_profile_is_of_what_runs_without_it(calls):
    layer, x = made(), torch.randn(40, 160, dtype=torch.bfloat16, requires_grad=True)
    with torch.profiler.profile():
        products.call(layer, x).sum().backward()
    assert calls == [False, True]


def test_backward_keeps_the_weight_and_nothing_of_its_size():
    layer, kept = made(), []
    x = torch.randn(40, 160, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        products.call(layer, x)
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]


def test_a_weight_changed_before_backward_is_noticed():
    layer, x = made(), torch.randn(40, 160, dtype=torch.bfloat16, requires_grad=True)
    y = products.call(layer, x)
    layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_of_gradients():
    layer = made(bias=False)
    w = layer.weight.double()
    x = torch.randn(40, 160, dtype=torch.bfloat16, requires_grad=True)
    (dx,) = torch.autograd.grad(products.call(layer, x).pow(2).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(dx.sum(), x)
    exact = (2 * torch.ones(40, 160).double() @ w.T) @ w
    # three roundings to bfloat16 of numbers as large as the greatest one
    assert (twice.double() - exact).abs().max() <= 3 * UNIT[torch.bfloat16] * exact.abs().max()


def test_a_batch_of_gradients():
    layer, x = made(), torch.randn(40, 160, dtype=torch.bfloat16, requires_grad=True)
    grads = torch.randn(3, 40, 96, dtype=torch.bfloat16)
    y = products.call(layer, x)
    (batch,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for found, grad in zip(batch, grads, strict=True):
        # torch's own product of 16 bits: its loop rounds no more than the result
        assert_rounded_once(found, grad, layer.weight.T)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_number(calls, x_dtype):
    layer, grad = made(), torch.randn(40, 96, dtype=torch.bfloat16)
    x = torch.randn(40, 160, dtype=torch.bfloat16, requires_grad=True)
    wanted = products.call(layer, x)
    (gradient,) = torch.autograd.grad(wanted, x, grad)
    given = x.detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = products.call(layer, given)
        (dx,) = torch.autograd.grad(y, given, grad)
    assert y.dtype == torch.bfloat16
    assert dx.dtype == x_dtype
    assert torch.equal(y, wanted)
    assert torch.equal(dx, gradient.to(x_dtype))
    assert calls == [False, True] * 2
    with torch.autocast("cpu", dtype=torch.float16):
        assert products.call(layer, given).dtype == torch.float16  # torch casts the weight
    assert len(calls) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(calls, reentrant):
    layer = mp.LoRALinear(made(), rank=4)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(40, 160, dtype=torch.bfloat16, requires_grad=True)
    wanted = [x, layer.lora_a, layer.lora_b]
    plain = torch.autograd.grad(layer(x).sum(), wanted)
    for parameter in wanted:
        parameter.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(wanted, plain, strict=True))
    assert calls.count(False) == 3  # forward was computed again


def test_inference_mode_and_what_follows(calls):
    layer, x = made(), torch.randn(40, 160, dtype=torch.bfloat16)
    with torch.inference_mode():
        first = products.call(layer, x).clone()
    assert torch.equal(products.call(layer, x.requires_grad_()), first)
    assert calls == [False, False]


@pytest.mark.parametrize("make", [mp.LoRALinear, mp.layers.DoRALinear])
def test_adapters_call_their_base_so_merged_or_not(calls, make):
    layer = make(made(torch.float16), 4)
    nn.init.normal_(layer.lora_b, std=0.1)
    layer.eval()
    x = torch.randn(40, 160, dtype=torch.float16)
    with torch.no_grad():
        y = layer(x)
        layer.merge()
        merged, weight = layer(x), layer.weight
        layer.unmerge()
    assert len(calls) == 2
    assert_rounded_once(merged, x, weight, layer.base.bias)
    # the sum rounded at the end, or the weight rounded before: a rounding of each of 160 products
    torch.testing.assert_close(merged, y, rtol=0, atol=160**0.5 * 2.0**-11 * float(y.abs().max()))


def test_rows_of_different_adapters_call_it_too(calls):
    model = nn.Sequential(made())
    for name in ("one", "two"):
        mp.inject_lora(model, ["0"], rank=2, name=name)
    mp.use_adapters(model, rows=["one", "two"] * 20)
    with torch.no_grad():
        model.eval()(torch.randn(40, 160, dtype=torch.bfloat16))
    assert calls == [False]


def test_the_table_says_so_and_can_be_told_otherwise(calls):
    layer, x = made(), torch.randn(40, 160, dtype=torch.bfloat16)
    assert mp.backend()["dense_linear"] == (
        "pytorch, products in float32 (this CPU has none of bfloat16)"
    )
    assert mp.backend(dtype=torch.float32)["dense_linear"].startswith("plain (not pytorch: not for")
    with mp.use_kernels("plain"):
        assert mp.backend()["dense_linear"].startswith("plain (")
        assert torch.equal(products.call(layer, x), layer(x))
    assert calls == []


def test_a_cpu_with_such_products_uses_them(calls, monkeypatch):
    monkeypatch.setattr(products, "SLOW_ON_CPU", frozenset())
    layer, x = mp.LoRALinear(made(), rank=2), torch.randn(40, 160, dtype=torch.bfloat16)
    assert torch.equal(layer(x), layer.base(x))
    assert mp.backend()["dense_linear"].startswith("plain (not pytorch: not for torch.bfloat16")
    assert calls == []


@pytest.mark.slow
def test_compiled_code_is_torchs(plain_python):
    script = """
import torch
from torch import nn
import minipeft as mp
from minipeft.adapters import products
from minipeft.fast import dense
products.SLOW_ON_CPU = frozenset([torch.bfloat16])
products._warned = True
seen, multiplied = [], dense._multiplied
dense._multiplied = lambda *args: seen.append(1) or multiplied(*args)
layer = mp.LoRALinear(nn.Linear(160, 96).bfloat16(), rank=2)
nn.init.normal_(layer.lora_b, std=0.1)
x = torch.randn(40, 160).bfloat16().requires_grad_()
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
y = compiled(x)
y.sum().backward()
assert not seen
off = (y - layer(x)).abs().max()
assert seen and off <= 2 ** -7 * y.abs().max(), off  # two roundings of two bfloat16 sums
print("same")
"""
    assert plain_python(script).strip() == "same"
