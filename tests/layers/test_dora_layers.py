"""DoRA on embeddings and convolutions: PEFT, dropout, stacks, columns and kernels that are zero."""

import copy

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.layers import DoRAConv, DoRAEmbedding, DoRALinear, LoRAEmbedding, LoRATiedLinear
from minipeft.layers.conv import full_from_grouped

IDS = torch.tensor([[0, 5, 10], [5, 1, 1]])
LAYERS = {
    "linear": (lambda: DoRALinear(nn.Linear(7, 6), 2), lambda: torch.randn(3, 7)),
    "embedding": (lambda: DoRAEmbedding(nn.Embedding(11, 7), 2), lambda: IDS),
    "conv": (lambda: DoRAConv(nn.Conv2d(4, 6, 3, padding=1), 2), lambda: torch.randn(2, 4, 5, 5)),
}


def randomise(layer):
    with torch.no_grad():
        layer.lora_a.normal_(std=0.3)
        layer.lora_b.normal_(std=0.3)
        layer.magnitude.mul_(1 + 0.3 * torch.rand_like(layer.magnitude))
    return layer


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
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)  # float32


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
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)  # float32
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
    torch.testing.assert_close(layer(x), below(x), rtol=1e-5, atol=1e-5)  # float32
    randomise(layer)
    y = layer(x)
    torch.testing.assert_close(layer.merged()(x), y, rtol=1e-4, atol=1e-5)  # float32
    with mp.disable_adapters(layer):
        assert torch.equal(layer(x), below.base(x))


def test_merged_it_runs_merged():
    layer = randomise(DoRAEmbedding(nn.Embedding(11, 7), 2)).eval()
    y, other = layer(IDS), randomise(DoRAEmbedding(nn.Embedding(11, 7), 2)).eval()
    layer.merge()
    torch.testing.assert_close(layer(IDS), y, rtol=1e-5, atol=1e-5)  # float32
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
torch.testing.assert_close(compiled(ids), y, rtol=1e-5, atol=1e-5)
""")
