"""4-bit layers under every derivative equal the dense layer with the decoded weight.

Both compute the same products, so the results differ by the order of sums alone: 1e-6 of the
largest element in float32, 1e-13 in float64.
"""

import copy
from unittest import mock

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import func, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import minipeft as mp
from minipeft import ops, qlora
from minipeft.fast import linear as fast

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def lora(base, kind=mp.LoRALinear):
    layer = kind(base, 4)
    nn.init.normal_(layer.lora_b, std=0.1)
    return layer


def conv1d(in_features, out_features):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(out_features, in_features)


class PlainExperts(nn.Module):
    """What NF4Experts stands for, as a module."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x, expert):
        return torch.einsum("ti,toi->to", x, self.weight[expert])


class Routed(nn.Module):
    """Experts as a module of x alone: row t goes to expert t modulo 3."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        return self.experts(rows, torch.arange(len(rows)) % 3).view(*x.shape[:-1], -1)


def small_model():
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 10))
    mp.inject_qlora(model, ["0", "3"], 2, block_size=32, head=())
    nn.init.normal_(model[0].lora_b, std=0.1)
    return model


LAYERS = {
    "NF4Linear": lambda: mp.NF4Linear.from_linear(nn.Linear(64, 10)),
    "float32 scales": lambda: mp.NF4Linear.from_linear(nn.Linear(64, 10), double_quant=False),
    "flat codes": lambda: mp.NF4Linear.from_linear(nn.Linear(65, 7, bias=False)),
    "NF4Conv1D": lambda: mp.layers.NF4Conv1D.from_linear(conv1d(64, 10)),
    "NF4Experts": lambda: Routed(mp.layers.NF4Experts.from_weight(torch.randn(3, 10, 64) / 8)),
    "LoRALinear": lambda: lora(mp.NF4Linear.from_linear(nn.Linear(64, 10))),
    "DoRALinear": lambda: lora(mp.NF4Linear.from_linear(nn.Linear(64, 10)), mp.layers.DoRALinear),
    "LoRAExperts": lambda: Routed(
        lora(mp.layers.NF4Experts.from_weight(torch.randn(3, 10, 64) / 8), mp.layers.LoRAExperts)
    ),
    "a model": small_model,
}


def in_features(layer):
    return 65 if getattr(layer, "in_features", 64) == 65 else 64


def decoded(layer):
    """A copy in which every 4-bit layer is the dense one of the same weight and dtype."""
    model = nn.Sequential(copy.deepcopy(layer))
    for name, module in list(model.named_modules()):
        if isinstance(module, mp.layers.NF4Experts):
            dense = PlainExperts(module.dequantize())
        elif isinstance(module, mp.NF4Linear):
            dense = module.dense()
        else:
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, dense)
    return model[0]


def number(f):
    return lambda x: f(x).sin().sum()


def forward_of(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v)).sin()).tangent


def reverse_of_forward(f, x, v):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(forward_of(f, x, v).square().sum(), x)[0]


def forward_of_reverse(f, x, v):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x.clone().requires_grad_(), v)
        (g,) = torch.autograd.grad(number(f)(x), x, create_graph=True)
        return forward_ad.unpack_dual(g).tangent


def twice_backward(f, x, v):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(number(f)(x), x, create_graph=True)
    return torch.autograd.grad((g * v).sum(), x)[0]


DERIVATIVES = {
    "dual numbers": forward_of,
    "reverse over dual numbers": reverse_of_forward,
    "dual numbers over reverse": forward_of_reverse,
    "backward twice": twice_backward,
    "jvp": lambda f, x, v: func.jvp(lambda x: f(x).sin(), (x,), (v,))[1],
    "vjp": lambda f, x, v: func.vjp(f, x)[1](f(v).detach())[0],
    "grad": lambda f, x, v: func.grad(number(f))(x),
    "vmap": lambda f, x, v: func.vmap(f)(torch.stack([x, v])),
    "vmap over the last axis": lambda f, x, v: func.vmap(f, in_dims=-1)(torch.stack([x, v], -1)),
    "vmap(grad)": lambda f, x, v: func.vmap(func.grad(number(f)))(torch.stack([x, v])),
    "grad(vmap)": lambda f, x, v: func.grad(number(func.vmap(f)))(torch.stack([x, v])),
    "jacrev": lambda f, x, v: func.jacrev(lambda x: f(x).sin())(x),
    "jacfwd": lambda f, x, v: func.jacfwd(lambda x: f(x).sin())(x),
    "hessian": lambda f, x, v: func.hessian(number(f))(x),
    "jacrev(jacrev)": lambda f, x, v: func.jacrev(func.jacrev(number(f)))(x),
    "jacfwd(jacfwd)": lambda f, x, v: func.jacfwd(func.jacfwd(number(f)))(x),
    "jvp(grad)": lambda f, x, v: func.jvp(func.grad(number(f)), (x,), (v,))[1],
    "linearize": lambda f, x, v: func.linearize(lambda x: f(x).sin(), x)[1](v),
}


def largest_error(found, expected):
    """The largest difference, relative to the largest element, over trees of tensors."""
    found, expected = ([*tree.values()] if isinstance(tree, dict) else [tree]
                       for tree in (found, expected))  # fmt: skip
    assert len(found) == len(expected)
    return max(
        float(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).detach())
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # linearize's own
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_derivatives_by_the_input_equal_the_decoded_layers(kind, dtype, capsys):
    layer = LAYERS[kind]().to(dtype)
    dense = decoded(layer)
    x, v = torch.randn(2, 3, in_features(layer), dtype=dtype)
    errors = {
        name: largest_error(derivative(layer, x, v), derivative(dense, x, v))
        for name, derivative in DERIVATIVES.items()
    }
    with capsys.disabled():
        print(f"\n{kind}, {dtype}:", {name: f"{error:.0e}" for name, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("kind", [*LAYERS])
def test_derivatives_by_the_trained_parameters_equal_the_decoded_layers(kind):
    layer = LAYERS[kind]().double()
    for name, p in layer.named_parameters():
        p.requires_grad_(p.is_floating_point() and not name.endswith("base.weight"))
    dense = decoded(layer)
    x = torch.randn(4, in_features(layer), dtype=torch.float64)
    results = []
    for model in (layer, dense):
        own = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
        if not own:
            pytest.skip("nothing that could train")
        moved = {n: torch.ones_like(p) for n, p in own.items()}

        def loss(own, x, model=model):
            return func.functional_call(model, own, (x,)).sin().sum()

        each = func.vmap(func.grad(loss), in_dims=(None, 0))(own, x[:, None])
        second = func.jvp(func.grad(loss), (own, x), (moved, x.cos()))[1]
        members = {n: torch.stack([p, 2 * p, -p]) for n, p in own.items()}
        ensemble = func.vmap(loss, in_dims=(0, None))(members, x)
        results.append((each, second, {"ensemble": ensemble}))
    for found, expected in zip(*results, strict=True):
        assert largest_error(found, expected) <= TOLERANCE[torch.float64]


def test_gradcheck_agrees_with_finite_differences_in_every_mode():
    layer = mp.NF4Linear.from_linear(nn.Linear(64, 3)).double()
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)

    def f(x, bias):
        return func.functional_call(layer, {"bias": bias}, (x,))

    bias = layer.bias.detach().clone().requires_grad_()
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(f, (x, bias), check_batched_forward_grad=True, **modes)
    assert torch.autograd.gradgradcheck(f, (x, bias), check_fwd_over_rev=True)


def test_the_operators_themselves_keep_tangents():
    layer = mp.NF4Linear.from_linear(nn.Linear(64, 8, bias=False))
    x, v = torch.randn(2, 3, 64)
    with forward_ad.dual_level():
        out = torch.ops.minipeft.nf4_linear(forward_ad.make_dual(x, v), *layer.state(), None, 8)
        tangent = forward_ad.unpack_dual(out).tangent
    assert torch.equal(tangent, layer(v))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("in_features", [64, 65])
def test_vmap_over_codes_computes_each_member_of_an_ensemble(in_features, double_quant):
    layers = [
        mp.NF4Linear.from_linear(nn.Linear(in_features, 5), double_quant=double_quant)
        for _ in range(3)
    ]
    members, _ = func.stack_module_state(layers)
    x = torch.randn(4, in_features)

    def f(state, x):
        return func.functional_call(layers[0], state, (x,)).sin().sum()

    found = func.vmap(func.grad(f, argnums=1), in_dims=(0, None))(members, x)
    expected = torch.stack([func.grad(lambda x, d=d: d(x).sin().sum())(x)
                            for d in map(decoded, layers)])  # fmt: skip
    assert largest_error(found, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dim", [64, 33])  # rows of whole blocks, and others
def test_an_embedding_is_batched_and_lora_over_it_has_per_sample_gradients(dim):
    table = mp.layers.NF4Embedding.from_embedding(nn.Embedding(20, dim))
    ids = torch.randint(20, (4, 5))
    assert torch.equal(func.vmap(table)(ids), table(ids))
    assert torch.equal(func.vmap(table, in_dims=1, out_dims=1)(ids), table(ids))
    layer = lora(table, mp.layers.LoRAEmbedding)
    nn.init.normal_(layer.lora_a)
    own = {name: p.detach() for name, p in layer.named_parameters() if "lora" in name}

    def f(own, ids):
        return func.functional_call(layer, own, (ids,)).sin().sum()

    each = func.vmap(func.grad(f), in_dims=(None, 0))(own, ids)
    for row in range(len(ids)):
        for name, value in func.grad(f)(own, ids[row]).items():
            torch.testing.assert_close(each[name][row], value)


def test_rows_of_several_adapters_have_derivatives():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    mp.inject_qlora(model, ["0"], 2, head=())
    mp.inject_lora(model, ["0"], 2, name="b")
    for layer in (model[0], model[0].base):
        nn.init.normal_(layer.lora_b)
    mp.use_adapters(model.eval(), rows=["default", "b", None])
    x, v = torch.randn(2, 3, 64)
    dense = nn.Sequential(copy.deepcopy(model))
    for name, module in list(dense.named_modules()):
        if isinstance(module, mp.NF4Linear):
            parent, _, own = name.rpartition(".")
            setattr(dense.get_submodule(parent), own, module.dense())
    for name in ("jvp", "grad", "dual numbers", "jacfwd"):
        found, expected = (DERIVATIVES[name](m, x, v) for m in (model, dense))
        assert largest_error(found, expected) <= TOLERANCE[torch.float32], name


def test_checkpointing_keeps_first_and_second_derivatives():
    layer = lora(mp.NF4Linear.from_linear(nn.Linear(64, 10)))
    x, v = torch.randn(2, 3, 64)
    found = twice_backward(lambda x: checkpoint(layer, x, use_reentrant=False), x, v)
    # float32, as above: the order of sums
    assert largest_error(found, twice_backward(decoded(layer), x, v)) <= 1e-6


@pytest.mark.parametrize("layer", [
    mp.NF4Linear.from_linear(nn.Linear(64, 8)), lora(mp.NF4Linear.from_linear(nn.Linear(64, 8))),
    Routed(mp.layers.NF4Experts.from_weight(torch.randn(3, 8, 64))),
], ids=["NF4Linear", "LoRALinear", "NF4Experts"])  # fmt: skip
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_is_refused_in_a_sentence(layer):
    with pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.trace(layer, (torch.randn(3, 64),))
    table = mp.layers.NF4Embedding.from_embedding(nn.Embedding(4, 64))
    with pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.trace(table, (torch.tensor([1, 2]),))


def test_an_exported_layer_computes_the_same(plain_python):
    printed = plain_python("""
import torch, minipeft as mp
from torch import nn
layer = mp.LoRALinear(mp.NF4Linear.from_linear(nn.Linear(64, 8)), 2)
rows = torch.export.Dim("rows", min=2)
program = torch.export.export(layer, (torch.randn(3, 64),), dynamic_shapes=({0: rows},))
x = torch.randn(5, 64)
assert "minipeft.nf4_linear" in str(program.graph)
print(torch.equal(program.module()(x), layer(x)))
""")
    assert printed.strip() == "True"


class Seen(TorchDispatchMode):
    """Remembers the operators that torch's dispatcher is asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [False, True])
def test_whoever_listens_to_the_dispatcher_sees_the_operators(trained):
    layer = mp.NF4Linear.from_linear(nn.Linear(64, 10))
    x = torch.randn(3, 64, requires_grad=trained)
    alone = layer(x)
    with Seen() as seen:
        listened = layer(x)
    assert torch.equal(alone, listened)
    assert alone.requires_grad == listened.requires_grad == trained
    assert "minipeft.nf4_linear.default" in seen.names
    if trained:
        assert type(alone.grad_fn).__name__ == "nf4_linearBackward"  # as profilers show it
        with Seen() as seen:
            listened.sum().backward()
        assert "minipeft.nf4_linear_input_gradient.default" in seen.names


@pytest.mark.filterwarnings("ignore")  # of tracing: sizes that are checked become constants
def test_operators_are_seen_by_profilers_function_modes_and_traces():
    layer = mp.NF4Linear.from_linear(nn.Linear(64, 10))
    x = torch.randn(3, 64)
    with torch.profiler.profile() as found:
        layer(x)
    assert "minipeft::nf4_linear" in {event.name for event in found.events()}
    names = []

    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        layer(x)
    assert any("nf4_linear" in name for name in names)
    packed, absmax = mp.quantize_nf4(torch.randn(8, 64))
    traced = torch.jit.trace(
        lambda packed, absmax: mp.dequantize_nf4(packed, absmax, (8, 64)), (packed, absmax),
        check_trace=False,
    )  # fmt: skip
    assert "minipeft::dequantize_nf4" in str(traced.graph)


def test_a_row_gets_no_negative_view():
    seen = []

    def row(x, *rest):
        seen.append(x.is_neg())
        return fast.linear(x, *rest)

    layer = mp.NF4Linear.from_linear(nn.Linear(64, 10))
    negative = torch.complex(*torch.randn(2, 3, 64)).conj().imag
    assert negative.is_neg()
    with mock.patch.dict(ops.OPERATORS["nf4_linear"].__dict__, rows=[], plain=row):
        found = layer(negative)
    assert seen == [False]
    torch.testing.assert_close(found, layer(negative.resolve_neg()), rtol=0, atol=0)


def test_no_graph_goes_through_the_decoding_of_a_weight():
    packed, absmax = mp.quantize_nf4(torch.randn(32, 64))
    weight = ops.Packed(packed, absmax.requires_grad_(), 64)
    for x in (torch.randn(2, 64), torch.randn(2, 64, requires_grad=True)):
        y = qlora.multiply(x, weight, None, 32)
        assert y.requires_grad == x.requires_grad
        if y.requires_grad:
            y.sum().backward()
    assert absmax.grad is None


@pytest.mark.parametrize("way", ["pruned", "parametrised", "a plain tensor"])
def test_a_bias_may_be_no_parameter(way):
    layer, x = mp.NF4Linear.from_linear(nn.Linear(64, 10)), torch.randn(3, 64)
    bias = layer.bias.detach().clone()
    if way == "pruned":
        prune.random_unstructured(layer, "bias", 0.5)
        bias = bias * layer.bias_mask
    elif way == "parametrised":
        parametrize.register_parametrization(layer, "bias", nn.Identity())
    else:
        del layer.bias
        layer.bias = bias
    assert torch.equal(layer(x), qlora.multiply(x, layer.state(), bias, 10))


def test_meta_and_fake_tensors_compute_shapes_alone():
    layer = mp.NF4Linear.from_linear(nn.Linear(64, 10))
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.randn(3, 64, device="meta")).shape == (3, 10)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.randn(3, 64))
        assert type(layer(fake)) is type(fake) and layer(fake).shape == (3, 10)
    outside = layer(torch.randn(3, 64))  # nothing of it stays
    assert type(outside) is torch.Tensor and outside.isfinite().all()
