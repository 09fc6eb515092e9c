"""LoRAConv: against float64, with every setting that a convolution has."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minipeft as mp
from minipeft.layers import LoRAConv
from minipeft.layers.conv import full_from_grouped, grouped_from_full

SETTINGS = {
    "plain": (nn.Conv1d, {"kernel_size": 3}, (9,)),
    "stride, padding, dilation": (
        nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 4, "dilation": 3}, (11,)
    ),
    "circular": (nn.Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (7,)),
    "reflect, groups": (
        nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "groups": 2}, (6, 5)
    ),
    "same": (nn.Conv2d, {"kernel_size": (3, 2), "padding": "same", "dilation": 2}, (6, 7)),
    "pointwise": (nn.Conv2d, {"kernel_size": 1, "bias": False}, (3, 3)),
    "depthwise": (nn.Conv1d, {"kernel_size": 3, "groups": 4}, (7,)),
    "three axes": (nn.Conv3d, {"kernel_size": (1, 2, 3), "stride": (1, 2, 1)}, (3, 5, 4)),
    "replicate": (
        nn.Conv3d, {"kernel_size": 2, "padding": 1, "padding_mode": "replicate"}, (3, 3, 3)
    ),
}  # fmt: skip


def make(kind, rank=4, **lora):
    convolution, settings, size = SETTINGS[kind]
    layer = LoRAConv(convolution(4, 8, **settings), rank, 6, **lora)
    nn.init.normal_(layer.lora_b, std=0.3)
    return layer, torch.randn(2, 4, *size)


# float32, the same products in another order, values up to 3: measured 7e-7
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
# float32, sums of a hundred products, values up to 54: measured 1.1e-5
WIDE = {"rtol": 2e-5, "atol": 2e-5}


def kernel(a, b, groups):
    """The composed kernel, channel by channel, in float64."""
    a, b = a.double(), b.double().flatten(1)
    out, ranks = len(b), len(a) // groups
    made = torch.zeros(out, *a.shape[1:], dtype=torch.float64)
    for o in range(out):
        group = o // (out // groups)
        for r in range(ranks):
            made[o] += b[o, r] * a[group * ranks + r]
    return made


@pytest.mark.parametrize("kind", SETTINGS)
def test_output_and_gradients_equal_a_convolution_with_the_summed_kernel(kind):
    layer, x = make(kind)
    x.requires_grad_()
    plain = copy.deepcopy(layer.base).double()
    a = layer.lora_a.detach().double().requires_grad_()
    b = layer.lora_b.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    weight = plain.weight.detach() + 1.5 * kernel(a, b, plain.groups)
    expected = torch.func.functional_call(plain, {"weight": weight}, (x64,))
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, **WIDE)
    torch.testing.assert_close(x.grad.double(), x64.grad, **WIDE)
    torch.testing.assert_close(layer.lora_a.grad.double(), a.grad, **WIDE)
    torch.testing.assert_close(layer.lora_b.grad.double(), b.grad, **WIDE)
    exact = 1.5 * kernel(layer.lora_a.detach(), layer.lora_b.detach(), plain.groups)
    # float32, sums of the rank's products, values up to 0.7: measured 5e-8
    torch.testing.assert_close(layer.delta().double(), exact, rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("kind", SETTINGS)
def test_merged_equals_unmerged_and_off_is_the_base(kind):
    layer, x = make(kind)
    layer.eval()
    out = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), out, **ROUNDING)
    layer.unmerge()
    assert torch.equal(layer(x), out)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))
    layer.enabled = True
    stacked = LoRAConv(layer, 4)
    assert torch.equal(stacked(x), out)
    nn.init.normal_(stacked.lora_b, std=0.3)
    torch.testing.assert_close(stacked.merged()(x), stacked(x), **ROUNDING)


def test_the_bf16_merged_kernel_is_the_rounded_float32_sum():
    layer, x = make("plain")
    layer.base.bfloat16()
    exact = layer.base.weight.float() + layer.delta()
    assert torch.equal(layer.weight, exact.bfloat16())
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_unbatched_input_copies_and_dropout():
    layer, x = make("plain", dropout=0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x[0]), layer(x)[0], **ROUNDING)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))


def test_under_autocast_the_output_has_its_dtype():
    layer, x = make("plain")
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    # products of inputs and factors rounded to bf16 (2**-9), values up to 3: measured 0.011
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.1)


@given(groups=st.sampled_from([1, 2, 3]), rank=st.integers(1, 2), size=st.integers(1, 3))
def test_grouped_and_full_factors_are_inverses(groups, rank, size):
    a, b = torch.randn(groups * rank, 2, size), torch.randn(groups * 2, rank, 1)
    full, same = full_from_grouped(a, b, groups)
    assert full.shape == (groups * rank, groups * 2, size)
    back, _ = grouped_from_full(full, same, groups)
    assert torch.equal(back, a)
    if groups > 1:
        with pytest.raises(ValueError, match="reaches across"):
            grouped_from_full(full + 1, same, groups)


def test_a_start_is_subtracted_within_groups():
    layer, x = make("reflect, groups")
    nn.init.normal_(layer.lora_a)
    layer.subtract_start()
    torch.testing.assert_close(layer(x), layer.base(x), **ROUNDING)
    nn.init.normal_(layer.lora_b)
    torch.testing.assert_close(layer.eval().merged()(x), layer(x), **WIDE)


def test_factors_across_groups_compute_what_pefts_do_and_cannot_be_merged():
    layers = pytest.importorskip("peft.tuners.lora.layer")
    from peft import LoraConfig

    base, x = nn.Conv1d(4, 8, 3, groups=2), torch.randn(2, 4, 9)
    with pytest.warns(UserWarning, match="groups"):
        theirs = layers.Conv1d(
            copy.deepcopy(base), "default", config=LoraConfig(r=4, lora_alpha=6), r=4, lora_alpha=6
        )
    ours = LoRAConv(base, 4, 6, across_groups=True)
    with torch.no_grad():
        ours.lora_b.normal_()
        theirs.lora_A["default"].weight.copy_(ours.lora_a)
        theirs.lora_B["default"].weight.copy_(ours.lora_b)
    torch.testing.assert_close(ours(x), theirs(x), **ROUNDING)
    with pytest.raises(ValueError, match="cannot be merged"):
        ours.merge()


def test_what_cannot_be_wrapped():
    for base, rank, message in (
        (nn.ConvTranspose1d(4, 4, 3), 2, "none of"), (nn.Linear(4, 4), 2, "none of"),
        (nn.Conv1d(4, 4, 3, groups=2), 3, "multiple of 2"), (nn.Conv1d(4, 4, 3), 0, "rank"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            LoRAConv(base, rank)
        assert next(base.parameters()).requires_grad


def test_a_forward_of_its_own_is_refused():
    """Merged, what is standardised would be the sum; padded, the branch would not fit."""

    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    base = Standardised(3, 4, 3)
    with pytest.raises(ValueError, match="a forward of its own"):
        LoRAConv(base, 2)
    assert base.weight.requires_grad


@pytest.mark.slow
def test_compiling_once_for_every_strength(plain_python):
    plain_python("""
import torch, minipeft as mp
from torch import nn
for groups in (1, 2):
    base = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=groups)
    layer = mp.layers.LoRAConv(base, 2, across_groups=groups > 1)
    nn.init.normal_(layer.lora_b)
    x, frames = torch.randn(1, 4, 5, 5), []
    def count(graph, inputs):
        frames.append(1)
        return graph.forward
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for enabled, scale in ((True, 1.0), (False, 1.0), (True, 0.5)):
        layer.enabled, layer.scale = enabled, scale
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(frames) == 1
""")


def test_convolutions_of_a_whole_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(1, 3, 6, 6)
    before = model(x)
    assert mp.inject_lora(model, ["0", "2"], 2) == ["0", "2"]
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert mp.check_gradients(model) == 4
    mp.remove(model, merge=True)
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(x), before, **ROUNDING)  # B = 0
