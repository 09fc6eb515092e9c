"""DoRA over linear layers, embeddings and convolutions: the detached-norm graph, and PEFT."""

import copy
import pickle

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import LoRALinear, NF4Linear
from minipeft.layers import (
    DoRAConv,
    DoRAEmbedding,
    DoRALinear,
    LoRAEmbedding,
    LoRATiedLinear,
    NF4Embedding,
)
from minipeft.layers.conv import full_from_grouped
from minipeft.layers.dora import row_norms

# float32, sums of up to 64 products in another order, values up to 21: measured, over three
# seeds, at most a tenth of it
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def randomise(layer):
    with torch.no_grad():
        for name, parameter in layer.adapter_parameters().items():
            if name == "magnitude":
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            else:
                parameter.normal_(std=0.2)
    return layer


def linear_bases():
    bases = {
        "linear": nn.Linear(64, 33), "no bias": nn.Linear(64, 33, bias=False),
        "NF4": NF4Linear.from_linear(nn.Linear(64, 33)),
        "LoRA": LoRALinear(nn.Linear(64, 33), 2, init=lambda x: nn.init.normal_(x.lora_b)),
    }  # fmt: skip
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    bases["Conv1D"] = Conv1D(33, 64)
    bases["NF4 Conv1D"] = mp.layers.NF4Conv1D.from_linear(Conv1D(33, 64))
    return bases


KINDS = ["linear", "no bias", "NF4", "LoRA", "Conv1D", "NF4 Conv1D"]


def dense64(base):
    """The base's weight (out, in) and bias, as it computes with them, in float64."""
    weight = base.weight.detach().double()
    if weight.shape[0] == 64:  # (in, out)
        weight = weight.T
    return weight, None if base.bias is None else base.bias.detach().double()


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_equal_the_detached_norm_graph_in_float64(kind):
    base, x = linear_bases()[kind], torch.randn(7, 64, requires_grad=True)
    layer = randomise(DoRALinear(base, 4, 6))
    weight, bias = dense64(base)
    a, b, m = (p.detach().double().requires_grad_()
               for p in (layer.lora_a, layer.lora_b, layer.magnitude))  # fmt: skip
    x64 = x.detach().double().requires_grad_()
    direction = weight + 1.5 * b @ a
    ratio = m / direction.detach().norm(dim=1)
    expected = x64 @ (ratio[:, None] * direction).T + (0 if bias is None else bias)
    out, grad = layer(x), torch.randn(7, 33)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, **ROUNDING)
    for ours, exact in ((x, x64), (layer.lora_a, a), (layer.lora_b, b), (layer.magnitude, m)):
        torch.testing.assert_close(ours.grad.double(), exact.grad, **ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_the_base_merges_and_switches_off(kind):
    base, x = linear_bases()[kind], torch.randn(5, 64)
    layer = DoRALinear(base, 4)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=1e-6)  # m / |W| = 1 to an ulp
    randomise(layer).eval()
    out = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), out, **ROUNDING)
    torch.testing.assert_close(layer.merged()(x), out, **ROUNDING)
    layer.unmerge()
    assert torch.equal(layer(x), out)
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


def test_it_starts_exactly_at_what_lora_computes():
    for dtype in (torch.float32, torch.bfloat16):
        base, x = nn.Linear(64, 33).to(dtype), torch.randn(50, 64, dtype=dtype)
        for layer in (DoRALinear(base, 4), DoRALinear(base, 4, dropout=0.3)):
            assert torch.equal(layer(x), base(x))  # m / |W| is 1 to the bit
    dense = nn.Linear(64, 33)
    started = mp.starts.loftq(1).for_weight(dense)  # B A is not 0
    dora, lora = (
        kind(NF4Linear.from_linear(dense), 4, init=started) for kind in (DoRALinear, LoRALinear)
    )
    torch.testing.assert_close(dora(x.float()), lora(x.float()), **ROUNDING)


def test_in_float64_norms_are_float64():
    layer = randomise(DoRALinear(nn.Linear(7, 5).double(), 2, dtype=torch.float64))
    assert layer.magnitude.dtype == torch.float64
    x = torch.randn(3, 7, dtype=torch.float64)
    exact = nn.functional.linear(x, layer.exact_parameters()["weight"], layer.bias)
    # float64, sums of 7 products: measured 4e-16
    torch.testing.assert_close(layer(x), exact, rtol=5e-15, atol=5e-15)


def test_functional_transforms():
    for training in (True, False):
        layer = randomise(DoRALinear(nn.Linear(7, 5), 2)).train(training)
        parameters, x = dict(layer.named_parameters()), torch.randn(4, 7)

        def loss(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        grads = torch.func.grad(loss)(parameters, x)
        layer(x).square().sum().backward()
        for name, parameter in layer.adapter_parameters().items():
            torch.testing.assert_close(grads[name], parameter.grad, **ROUNDING)


def test_over_an_adapter_the_weight_below_is_made_once(monkeypatch):
    layer, calls = DoRALinear(LoRALinear(nn.Linear(7, 5), 2), 2), []
    made = LoRALinear.exact_parameters
    monkeypatch.setattr(LoRALinear, "exact_parameters", lambda s: calls.append(1) or made(s))
    layer(torch.randn(2, 7))
    assert len(calls) == 1


def test_norms_by_the_identity_equal_those_of_the_sum():
    w, a, b = torch.randn(33, 65), torch.randn(4, 65), torch.randn(33, 4)
    found = row_norms(w.square().sum(1), w @ a.T, a, b, 0.7)
    exact = (w.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(found.double(), exact, **ROUNDING)
    assert torch.isfinite(row_norms(w.square().sum(1), -w @ w.T, -w, torch.eye(33), 1.0)).all()


def test_what_eval_keeps_is_renewed_when_anything_changes():
    base, x = nn.Linear(64, 33), torch.randn(3, 64)
    layer = randomise(DoRALinear(base, 4)).eval()

    def right():
        torch.testing.assert_close(layer(x), layer.merged()(x), **ROUNDING)

    right()
    kept = layer._kept_norms.get(lambda: None, *layer._factor_parameters(), *base.parameters())
    assert kept is not None
    with torch.no_grad():
        layer.lora_b.add_(0.1)
        right()
        base.weight.mul_(1.5)
        right()
    layer.scale = 0.5
    right()
    optimizer = torch.optim.SGD(mp.adapter_parameters(layer), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    right()
    state = {n: torch.randn_like(t) for n, t in layer.state_dict().items()}
    layer.load_state_dict(state)
    right()
    base.weight.data = torch.randn(33, 64)
    right()
    base.weight.data.mul_(2.0)  # nobody counts this
    layer.eval()
    right()
    layer.double()
    x = x.double()
    right()
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))
        assert "magnitude" in again.state_dict() and len(again.state_dict()) == 5


def test_norms_are_kept_in_eval_only(monkeypatch):
    layer, x = randomise(DoRALinear(nn.Linear(64, 33), 4)), torch.randn(3, 64)
    calls = []
    product = DoRALinear._product
    monkeypatch.setattr(DoRALinear, "_product", lambda s, *a: calls.append(1) or product(s, *a))
    for _ in range(3):
        layer(x)
    assert len(calls) == 3
    layer.eval()
    for _ in range(3):
        layer(x)
    assert len(calls) == 4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [
    lambda: DoRALinear(nn.Linear(64, 33), 4), lambda: DoRAEmbedding(nn.Embedding(11, 64), 3),
])  # fmt: skip
def test_norms_follow_every_optimizer(make, fused):
    """In eval mode, with a call without gradients between backward and the step."""
    first = randomise(make()).eval()
    x = torch.arange(11) if isinstance(first, DoRAEmbedding) else torch.randn(3, 64)
    for layer in (first, pickle.loads(pickle.dumps(first))):
        trained = [p for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.3, fused=fused)
        layer(x).square().mean().backward()
        with torch.no_grad():
            layer(x)
            optimizer.step()
            found = layer(x)
            assert torch.equal(found, layer.train()(x))


def test_dropout_acts_on_the_dense_part_too_as_in_peft():
    layers = pytest.importorskip("peft.tuners.lora.layer")
    from peft import LoraConfig

    base, x = nn.Linear(64, 33), torch.randn(7, 64)
    ours = randomise(DoRALinear(copy.deepcopy(base), 4, 6, dropout=0.3))
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.3, use_dora=True)
    theirs = layers.Linear(base, "default", config=config, r=4, lora_alpha=6)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_a)
        theirs.lora_B["default"].weight.copy_(ours.lora_b)
        theirs.lora_magnitude_vector["default"].weight.copy_(ours.magnitude)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(0)
        results.append(layer(x))
    torch.testing.assert_close(*results, **ROUNDING)


def test_a_bf16_base_has_float32_norms():
    base, x = nn.Linear(64, 33).bfloat16(), torch.randn(3, 64).bfloat16()
    layer = DoRALinear(base, 4)
    assert layer.magnitude.dtype == torch.float32
    exact = base.weight.double().norm(dim=1)
    # float32, a root of 64 squares, values up to 0.7: measured 7e-8
    torch.testing.assert_close(layer.magnitude.double(), exact, rtol=1e-6, atol=1e-6)
    assert layer(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16


OTHERS = {
    "embedding": (lambda: DoRAEmbedding(nn.Embedding(11, 64), 3), lambda: torch.arange(11), 0),
    "NF4 embedding": (
        lambda: DoRAEmbedding(NF4Embedding.from_embedding(nn.Embedding(11, 64)), 3),
        lambda: torch.arange(11), 0,
    ),
    "convolution": (
        lambda: DoRAConv(nn.Conv2d(4, 6, 3, padding=1), 2),
        lambda: torch.randn(2, 4, 5, 5), (1, 2, 3),
    ),
    "grouped convolution": (
        lambda: DoRAConv(nn.Conv1d(4, 6, 3, groups=2, bias=False), 2),
        lambda: torch.randn(2, 4, 9), (1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_embeddings_and_convolutions(kind):
    make, inputs, axes = OTHERS[kind]
    layer, x = make(), inputs()
    torch.testing.assert_close(layer(x), layer.base(x), **ROUNDING)
    randomise(layer)
    with torch.no_grad():
        plain = layer.base
        weight = (plain.dequantize() if kind == "NF4 embedding" else plain.weight).double()
        direction = weight + layer.delta_as_stored().double()
        norm = direction.square().sum(axes, keepdim=True).sqrt()
        shape = [-1 if size == layer.magnitude.numel() and i == (1 if axes == 0 else 0) else 1
                 for i, size in enumerate(weight.shape)]  # fmt: skip
        exact = direction * layer.magnitude.double().view(shape) / norm
    # float32, values up to 5, few roundings: measured 6e-7
    torch.testing.assert_close(layer.weight.double(), exact, rtol=2e-6, atol=1e-6)
    out = layer(x)
    torch.testing.assert_close(layer.eval().merged()(x), out, **ROUNDING)
    # what eval() keeps is summed as in training: measured equal, an ulp of 5 is 5e-7
    torch.testing.assert_close(layer(x), out, rtol=2e-6, atol=1e-6)
    layer.train()(x).sum().backward()
    assert all(p.grad is not None for p in layer.adapter_parameters().values())
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.slow
def test_compiled_it_equals_eager_in_both_modes_and_compiles_once(plain_python):
    plain_python("""
import torch, minipeft as mp
from torch import nn
for make, x in (
    (lambda: mp.layers.DoRALinear(nn.Linear(16, 8), 2), torch.randn(3, 16)),
    (lambda: mp.layers.DoRALinear(mp.NF4Linear.from_linear(nn.Linear(64, 8)), 2),
     torch.randn(3, 64)),
    (lambda: mp.layers.DoRALinear(mp.NF4Linear.from_linear(nn.Linear(64, 8).bfloat16()), 2),
     torch.randn(3, 64)),
    (lambda: mp.layers.DoRAEmbedding(nn.Embedding(9, 8), 2), torch.arange(9)),
    (lambda: mp.layers.DoRAConv(nn.Conv1d(4, 8, 3), 2), torch.randn(2, 4, 7)),
):
    for training in (True, False):
        layer, frames = make().train(training), []
        for name, parameter in layer.adapter_parameters().items():
            if name != "magnitude":
                nn.init.normal_(parameter, std=0.2)
        def count(graph, inputs):
            frames.append(1)
            return graph.forward
        layer(x)  # einops notes what it was called with, which is a guard of its own
        torch._dynamo.reset()  # all kinds share one forward, which is compiled 8 times at most
        compiled = torch.compile(layer, backend=count, fullgraph=True)
        for enabled, scale in ((True, 1.0), (False, 1.0), (True, 0.5)):
            layer.enabled, layer.scale = enabled, scale
            # float32: compiled code may sum in another order
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
        assert len(frames) == 1, frames
""")


def test_a_whole_model_by_one_argument():
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    mp.inject_lora(model, ["0", "1", "3"], 2, dora=True)
    assert [type(layer).__name__ for layer in model] == [
        "DoRAEmbedding", "DoRALinear", "ReLU", "DoRALinear"
    ]  # fmt: skip
    model(torch.arange(9)).sum().backward()
    assert mp.check_gradients(model) == 9
    with pytest.raises(ValueError, match="DoRA wraps linear layers"):
        mp.inject_lora(nn.TransformerEncoderLayer(8, 2, 8), ["self_attn"], 2, dora=True)


IDS = torch.tensor([[0, 5, 10], [5, 1, 1]])


LAYERS = {
    "linear": (lambda: DoRALinear(nn.Linear(7, 6), 2), lambda: torch.randn(3, 7)),
    "embedding": (lambda: DoRAEmbedding(nn.Embedding(11, 7), 2), lambda: IDS),
    "conv": (lambda: DoRAConv(nn.Conv2d(4, 6, 3, padding=1), 2), lambda: torch.randn(2, 4, 5, 5)),
}


def peft_pair(base, rank, peft_class, **settings):
    """Our layer and PEFT's with the same random factors and magnitude, alpha = 2 rank."""
    layers = pytest.importorskip("peft.tuners.lora.layer")
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=True, **settings)
    theirs = getattr(layers, peft_class)(
        copy.deepcopy(base), "default", config=config, r=rank, lora_alpha=2 * rank
    )
    dropout = settings.get("lora_dropout", 0.0)
    kind = DoRAEmbedding if peft_class == "Embedding" else DoRAConv
    ours = randomise(kind(copy.deepcopy(base), rank, 2 * rank, dropout=dropout))
    if peft_class == "Embedding":
        a, b = theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]
    else:
        a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    magnitude = theirs.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        full, _ = full_from_grouped(ours.lora_a, ours.lora_b, getattr(base, "groups", 1))
        a.copy_(full)
        b.copy_(ours.lora_b)
        magnitude.copy_(ours.magnitude.view_as(magnitude))
    return ours, theirs, (a, b, magnitude)


@pytest.mark.parametrize(
    ("base", "peft_class", "shape"),
    [
        (nn.Embedding(11, 7), "Embedding", None),
        (nn.Conv1d(4, 6, 3, stride=2), "Conv1d", (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 1), padding=1, bias=False), "Conv2d", (2, 4, 5, 5)),
        (nn.Conv3d(4, 6, 2), "Conv3d", (1, 4, 4, 3, 3)),
    ],
    ids=["embedding", "1d", "2d", "3d"],
)
def test_output_and_gradients_equal_peft(base, peft_class, shape, capsys):
    ours, theirs, parameters = peft_pair(base, 2, peft_class)
    x = IDS if shape is None else torch.randn(shape)
    results = []
    for layer in (ours, theirs):
        y = layer(x)
        y.square().sum().backward()
        results.append(y.detach())
    own = ours.lora_a.grad, ours.lora_b.grad, ours.magnitude.grad
    pairs = [
        tuple(results),
        *((a, p.grad.view_as(a)) for a, p in zip(own, parameters, strict=True)),
    ]
    differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    with capsys.disabled():
        print(f"\nDoRA {peft_class} against PEFT, y da db dm: {[f'{d:.1e}' for d in differences]}")
    assert max(differences) <= 1e-5  # float32: sums in another order, norms by another formula


def test_dropout_of_a_convolution_acts_on_the_dense_part_too_as_in_peft():
    ours, theirs, _ = peft_pair(nn.Conv2d(4, 6, 3), 2, "Conv2d", lora_dropout=0.5)
    x, results = torch.randn(2, 4, 5, 5), []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        results.append(layer.train()(x))
    torch.testing.assert_close(*results, **ROUNDING)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd:UserWarning")  # PEFT's
def test_norms_of_a_grouped_convolution_are_right_and_pefts_are_not():
    ours, theirs, _ = peft_pair(nn.Conv1d(4, 6, 3, groups=2), 2, "Conv1d")
    x, scaling = torch.randn(2, 4, 9), 2.0
    a, b, w = ours.lora_a.double(), ours.lora_b.double(), ours.base.weight.double()
    direction = w.clone()
    for out in range(6):
        for r in range(1):  # rank 2 over 2 groups: one row of A to each
            direction[out] += scaling * b[out, r, 0] * a[out // 3 + r]
    norm = direction.square().sum((1, 2), keepdim=True).sqrt()
    kernel = ours.magnitude.double().view(-1, 1, 1) / norm * direction
    expected = nn.functional.conv1d(x.double(), kernel, ours.base.bias.double(), groups=2).float()
    torch.testing.assert_close(ours(x), expected, **ROUNDING)
    assert (theirs(x) - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", LAYERS)
def test_a_zero_direction_stays_zero(kind):
    """What starts at zero (the zero convolutions of ControlNet) has |V| = 0; 0 / 0 is NaN."""
    make, inputs = LAYERS[kind]
    plain = make().base
    with torch.no_grad():
        plain.weight.zero_()
    layer, x = type(make())(plain, 2), inputs()
    assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.adapter_parameters().values())
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_scale_of_zero_is_the_base(kind):
    make, inputs = LAYERS[kind]
    layer, x = randomise(make()).eval(), inputs()
    layer.scale = 0.0
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer.weight, layer.base.weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_changes_neither_norms_nor_weights(kind):
    make, inputs = LAYERS[kind]
    layer = randomise(make())
    weight = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, weight)
        y = layer(inputs())
    assert y.dtype == (torch.float32 if kind == "embedding" else torch.bfloat16)
    if kind != "conv":
        norms = layer.norms(1.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.norms(1.0), norms)


@pytest.mark.parametrize("kind", ["embedding", "conv"])
def test_over_another_adapter_the_base_weight_is_the_effective_one(kind):
    make, inputs = LAYERS[kind]
    below, x = randomise(make()).eval(), inputs()
    layer = type(below)(below, 2).eval()
    torch.testing.assert_close(layer(x), below(x), **ROUNDING)
    randomise(layer)
    y = layer(x)
    torch.testing.assert_close(layer.merged()(x), y, **ROUNDING)
    with mp.disable_adapters(layer):
        assert torch.equal(layer(x), below.base(x))


def test_merged_it_runs_merged():
    layer = randomise(DoRAEmbedding(nn.Embedding(11, 7), 2)).eval()
    y, other = layer(IDS), randomise(DoRAEmbedding(nn.Embedding(11, 7), 2)).eval()
    layer.merge()
    torch.testing.assert_close(layer(IDS), y, **ROUNDING)
    other.merge()
    other.enabled = False
    assert torch.equal(other(IDS), other.base(IDS))


def test_what_is_refused():
    with pytest.raises(ValueError, match="across groups"):
        DoRAConv(nn.Conv1d(4, 6, 3, groups=2), 2, across_groups=True)
    table, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = table.weight
    with pytest.raises(ValueError, match="no sum"):
        LoRATiedLinear(head, DoRAEmbedding(table, 2))
    assert LoRATiedLinear(head, LoRAEmbedding(table, 2)).adapter_parameters() == {}


@pytest.mark.slow
def test_merged_and_compiled_the_length_is_set_once(plain_python):
    plain_python("""
import torch, minipeft as mp
from torch import nn
layer, ids = mp.layers.DoRAEmbedding(nn.Embedding(9, 8), 2).eval(), torch.arange(9)
nn.init.normal_(layer.lora_a)
nn.init.constant_(layer.magnitude, 2.0)
y = layer(ids)
layer.merge()
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
# float32: compiled code may round in another order
torch.testing.assert_close(compiled(ids), y, rtol=1e-5, atol=1e-5)
""")
