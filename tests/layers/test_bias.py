"""A bias of LoRA's second factor: scaled, switched, merged and saved with the LoRA layer."""

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.layers.bias import LoRABias
from minipeft.layers.conv import LoRAConv

# float32, the bias added sooner or later, values up to 20, of which an ulp is 2e-6: measured equal
ADDED = {"rtol": 0, "atol": 1e-5}
# float32, sums of at most 64 products in another order, values up to 20: measured 4e-6
MERGED = {"rtol": 2e-6, "atol": 2e-5}

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda base: mp.LoRALinear(base, 2, 6), (3, 7, 6)),
    "one row": (lambda: nn.Linear(6, 5), lambda base: mp.LoRALinear(base, 2, 6), (6,)),
    "four bits": (
        lambda: mp.NF4Linear.from_linear(nn.Linear(64, 5)),
        lambda base: mp.LoRALinear(base, 2, 6), (3, 64),
    ),
    "convolution": (
        lambda: nn.Conv2d(4, 6, 3, groups=2), lambda base: LoRAConv(base, 2, 6), (2, 4, 5, 7),
    ),
    "one image": (lambda: nn.Conv2d(4, 6, 3), lambda base: LoRAConv(base, 2, 6), (4, 5, 7)),
}  # fmt: skip


def made(kind):
    base, lora, shape = LAYERS[kind]
    layer = LoRABias(lora(base().eval()))
    for parameter in (*layer.adapter_parameters().values(), layer.base.lora_b):
        nn.init.normal_(parameter)
    return layer, torch.randn(shape)


def expected(layer, x, strength):
    axes = layer.base.lora_b.dim() - 2
    return layer.base(x) + strength * layer.lora_bias.view(-1, *(1,) * axes)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_bias_is_added_with_the_scaling_of_lora(kind):
    layer, x = made(kind)
    assert layer.scaling == 3.0
    torch.testing.assert_close(layer(x), expected(layer, x, 3.0), **ADDED)
    layer.scale = 0.5
    torch.testing.assert_close(layer(x), expected(layer, x, 1.5), **ADDED)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_computes_the_same(kind):
    layer, x = made(kind)
    before = layer(x)
    torch.testing.assert_close(layer.merged()(x), before, **MERGED)
    layer.merge()
    torch.testing.assert_close(layer(x), before, **MERGED)
    layer.unmerge()
    assert torch.equal(layer(x), before)


def test_gradients_are_those_of_the_formula():
    layer, x = made("linear")
    layer(x).square().sum().backward()
    bias = layer.lora_bias.detach().clone().requires_grad_()
    (layer.base(x).detach() + 3.0 * bias).square().sum().backward()
    # float32, both sum the same 21 gradients, here equal: eight ulps for another order
    torch.testing.assert_close(layer.lora_bias.grad, bias.grad, rtol=1e-6, atol=1e-5)
    assert layer.base.base.weight.grad is None


def test_a_base_without_a_bias_computes_and_says_what_merging_needs():
    layer = LoRABias(mp.LoRALinear(nn.Linear(6, 5, bias=False), 2).eval())
    nn.init.ones_(layer.lora_bias)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), layer.base(x) + 1, rtol=0, atol=1e-6)  # ulps of 2
    assert torch.equal(layer.bias, torch.ones(5))
    with pytest.raises(ValueError, match="has no bias to merge into"):
        layer.merge()


@pytest.mark.parametrize("merge", [mp.merge, lambda model: mp.remove(model, merge=True)])
def test_a_model_that_cannot_be_merged_stays_as_it_was(merge):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, bias=False)).eval()
    mp.inject_lora(model, ["0", "1"], 2)
    mp.inject(model, ["0"], lambda module: LoRABias(module))
    mp.inject(model, ["1"], lambda module: LoRABias(module))
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter)
    x = torch.randn(2, 6)
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="has no bias to merge into"):
        merge(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "base",
    [nn.Linear(4, 4), mp.layers.LoRAEmbedding(nn.Embedding(4, 4), 2),
     mp.layers.DoRALinear(nn.Linear(4, 4), 2)],
    ids=["no LoRA", "embedding", "DoRA"],
)  # fmt: skip
def test_what_takes_no_bias_is_refused(base):
    with pytest.raises(ValueError, match="expected a LoRALinear or LoRAConv"):
        LoRABias(base)


def test_scaling_and_switching_an_adapter_takes_its_bias_along():
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    mp.inject_lora(model, ["0"], 2)
    mp.inject(model, ["0"], lambda module: LoRABias(module))
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter)
    x, plain = torch.randn(3, 6), model[0].base.base
    added = model(x) - plain(x)
    mp.scale_adapters(model, 0.25)
    # float32, differences of numbers around 10: measured 5e-7
    torch.testing.assert_close(model(x) - plain(x), added / 4, rtol=0, atol=5e-6)
    mp.scale_adapters(model, 1.0)
    with mp.disable_adapters(model):
        assert torch.equal(model(x), plain(x))


def test_adapters_of_which_some_layers_have_a_bias_are_written_with_zeros(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    mp.inject_lora(model, ["0", "1"], 2)
    mp.inject(model, ["0"], lambda module: LoRABias(module))
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter)
    mp.save_peft(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    fresh.load_state_dict(mp.base_state_dict(model))
    mp.load_peft(fresh, tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(fresh[1].lora_bias, torch.zeros(6))


def test_what_pefts_format_has_no_bias_for_is_not_written(tmp_path):
    model = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6))
    mp.inject_lora(model, ["0", "1"], 2)
    mp.inject(model, ["1"], lambda module: LoRABias(module))
    with pytest.raises(ValueError, match="0 takes no lora_bias in PEFT's format"):
        mp.save_peft(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_compiled_layer_computes_the_same_on_and_off(plain_python):
    out = plain_python(
        "import torch\n"
        "from torch import nn\n"
        "import minipeft as mp\n"
        "from minipeft.layers.bias import LoRABias\n"
        "layer = LoRABias(mp.LoRALinear(nn.Linear(6, 5), 2, 6)).eval()\n"
        "nn.init.normal_(layer.lora_bias)\n"
        "x = torch.randn(3, 6)\n"
        "compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)\n"
        "for enabled in (True, False):\n"
        "    layer.enabled = enabled\n"
        # float32, numbers around 1: a few ulps for another order of sums
        "    print((compiled(x) - layer(x)).abs().max().item() <= 1e-6)\n"
        "    print(torch.equal(layer(x), layer.base(x)) != enabled)\n"
    )
    assert out.split() == ["True"] * 4
