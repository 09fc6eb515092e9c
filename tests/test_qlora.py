"""NF4Linear: what it computes, what it saves, and that its bytes stay what they are."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minipeft import LoRALinear, NF4Linear, use_kernels
from minipeft.fast import panels as fast_panels

SHAPES = [(128, 64), (192, 33), (100, 7), (65, 3), (64, 1)]  # (in, out): aligned and ragged


def make(in_features=128, out_features=48, bias=True, dtype=torch.float32, **nf4):
    linear = nn.Linear(in_features, out_features, bias=bias).to(dtype)
    return NF4Linear.from_linear(linear, **nf4)


def state_bytes(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same_state(layer, before, *, skip=()):
    after = layer.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        if name not in skip:
            assert torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_forward_is_a_linear_layer_with_the_decoded_weight(in_features, out_features, double_quant):
    layer = make(in_features, out_features, double_quant=double_quant)
    x = torch.randn(2, 5, in_features)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_gradients_equal_a_float64_reference(in_features, out_features):
    layer = make(in_features, out_features)
    layer.bias.requires_grad_(True)
    x = torch.randn(3, 2, in_features, requires_grad=True)
    grad = torch.randn(3, 2, out_features)
    layer(x).backward(grad)
    w = layer.dequantize(torch.float64)
    # float32 sums of up to 192 products: 192 * 2**-24 relative to the largest term
    torch.testing.assert_close(x.grad.double(), grad.double() @ w, rtol=1e-5, atol=1e-5)
    # a sum of six float32 numbers: measured 0
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)), rtol=1e-6, atol=1e-6)
    assert all(p.grad is None for n, p in layer.named_parameters() if n != "bias")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_the_plain_product_equals_the_fast_one_in_every_bit(
    in_features, out_features, double_quant
):
    layer = make(in_features, out_features, double_quant=double_quant)
    x = torch.randn(5, in_features, requires_grad=True)
    grad, found = torch.randn(5, out_features), []
    for rows in (True, "plain"):
        with use_kernels(rows):
            y = layer(x)
            found.append((y, *torch.autograd.grad(y, x, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_second_derivatives():
    layer = make(64, 4, bias=False)
    x = torch.randn(2, 64, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), x)
    w = layer.dequantize(torch.float64)
    expected = 8 * x.double() @ w.T @ w @ w.T @ w
    # four float32 products in a row, of up to 64 terms: measured 3e-7
    torch.testing.assert_close(gg.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_compute_the_same(dtype, monkeypatch):
    layer = make(192, 70, dtype=dtype)
    x = torch.randn(5, 192, dtype=dtype, requires_grad=True)
    grad = torch.randn(5, 70, dtype=dtype)
    whole = layer(x)
    (whole_grad,) = torch.autograd.grad(whole, x, grad)
    monkeypatch.setattr(
        fast_panels, "PANEL_BYTES", 70 * 64 * dtype.itemsize
    )  # 23 rows; one block wide
    panels = layer(x)
    (panels_grad,) = torch.autograd.grad(panels, x, grad)
    # each element is the same sum, by a product of another size: float32 order, one bf16 rounding
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 1e-2}
    )
    torch.testing.assert_close(panels, whole, **tolerance)
    torch.testing.assert_close(panels_grad, whole_grad, **tolerance)


def test_state_dict_keys_and_shapes():
    assert {k: (v.dtype, tuple(v.shape)) for k, v in make().state_dict().items()} == {
        "packed": (torch.uint8, (48, 64)),
        "absmax_code": (torch.uint8, (48, 2)),
        "absmax_scale": (torch.uint8, (4,)),
        "absmax_offset": (torch.uint8, (4,)),
        "bias": (torch.float32, (48,)),
    }
    plain = make(100, 7, bias=False, double_quant=False).state_dict()
    assert {k: tuple(v.shape) for k, v in plain.items()} == {
        "packed": (350,),
        "absmax_bytes": (44,),
    }


def cast(layer, how):
    getattr(layer, how)()


@pytest.mark.parametrize("how", ["half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_casts_touch_no_code_and_the_weight_follows(how, double_quant):
    layer = make(double_quant=double_quant)
    before = state_bytes(layer)
    getattr(layer, how)()
    assert_same_state(layer, before, skip=("bias",))
    assert layer.weight.dtype == layer.bias.dtype
    assert layer(torch.randn(1, 128, dtype=layer.bias.dtype)).dtype == layer.bias.dtype


def test_train_eval_train_changes_no_byte_and_no_gradient():
    layer = LoRALinear(make(), 4)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 128)
    layer(x).sum().backward()
    first = layer.lora_a.grad.clone()
    before = state_bytes(layer.base)
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(layer.lora_a.grad, first)
    assert_same_state(layer.base, before)


def round_trips():
    from safetensors.torch import load, save

    def reload(layer, state):
        fresh = NF4Linear(128, 48, dtype=torch.float32)
        fresh.load_state_dict(state, strict=True)
        return fresh

    def torch_save(layer):
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        return reload(layer, torch.load(file, weights_only=True))

    def assign(layer):
        fresh = NF4Linear(128, 48, dtype=torch.float32, device="meta")
        fresh.load_state_dict(layer.state_dict(), assign=True)
        return fresh

    def to_empty(layer):
        fresh = NF4Linear(128, 48, dtype=torch.float32, device="meta").to_empty(device="cpu")
        fresh.load_state_dict(layer.state_dict())
        return fresh

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
        "strict reload": lambda layer: reload(layer, layer.state_dict()),
        "safetensors": lambda layer: reload(layer, load(save(layer.state_dict()))),
        "torch.save": torch_save,
        "assign": assign,
        "meta, to_empty": to_empty,
    }


@pytest.mark.parametrize("how", round_trips())
def test_round_trip(how):
    layer = make()
    again = round_trips()[how](layer)
    assert_same_state(again, state_bytes(layer))
    x = torch.randn(2, 128)
    assert torch.equal(again(x), layer(x))


def test_loading_another_layout_raises():
    with pytest.raises(RuntimeError, match="absmax"):
        make(double_quant=False).load_state_dict(make().state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(block_size=32).load_state_dict(make().state_dict())


@pytest.mark.parametrize("wrap", [False, True])
def test_nothing_of_the_dense_size_is_saved_for_backward(wrap):
    base = make(256, 256, bias=False)
    layer = LoRALinear(base, 2) if wrap else base
    saved = []
    x = torch.randn(4, 256, requires_grad=True)

    def record(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        layer(x).sum().backward()
    assert saved
    assert max(saved) <= 256 * 256 // 2  # the packed codes themselves


def test_autocast_and_compute_dtype():
    layer, x = make(), torch.randn(2, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = layer(x)
    assert under.dtype == torch.bfloat16
    expected = F.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16())
    assert torch.equal(under, expected)
    narrow = NF4Linear.from_linear(nn.Linear(128, 4), compute_dtype=torch.bfloat16)
    assert narrow(x).dtype == torch.float32
    assert torch.equal(narrow(x), narrow(x.bfloat16()).float())


def test_bad_input_raises():
    layer = make()
    with pytest.raises(ValueError, match=r"expected \(\*, 128\)"):
        layer(torch.randn(2, 64))
    with pytest.raises(AttributeError, match="computed from codes"):
        layer.weight = nn.Parameter(torch.randn(48, 128))
    with pytest.raises(AttributeError, match="computed from codes"):
        layer.absmax = torch.zeros(3)

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="forward of its own"):
        NF4Linear.from_linear(Scaled(4, 4))
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        NF4Linear.from_linear(nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="block_size"):
        NF4Linear.from_linear(nn.Linear(4, 4), block_size=48)
    broken = nn.Linear(4, 4)
    broken.weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"index \(1, 2\)"):
        NF4Linear.from_linear(broken)


def test_bits_and_bytes_of_the_same_weight_decode_alike():
    peer = pytest.importorskip("bitsandbytes.functional")
    linear = nn.Linear(256, 128).bfloat16()
    layer = NF4Linear.from_linear(linear, double_quant=False)
    packed, state = peer.quantize_4bit(linear.weight.data, quant_type="nf4", blocksize=64)
    assert torch.equal(layer.weight, peer.dequantize_4bit(packed, state))


def test_a_float32_island_stays_float32_under_autocast():
    class Island(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    layer, x = LoRALinear(Island(8, 8), 2), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == torch.float32
        packed = NF4Linear.from_linear(nn.Linear(64, 8))
        assert packed(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("double_quant", [False, True])
def test_assigning_a_state_dict_to_a_layer_on_the_meta_device(double_quant):
    layer = NF4Linear.from_linear(nn.Linear(64, 8), double_quant=double_quant)
    other = NF4Linear(64, 8, double_quant=double_quant, device="meta")
    assert other(torch.empty(2, 64, device="meta")).shape == (2, 8)
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 64)
    assert torch.equal(other(x), layer(x))


def test_type_casts_no_codes():
    layer, x = NF4Linear.from_linear(nn.Linear(64, 8)), torch.randn(2, 64)
    before = layer.dequantize(torch.float32)
    layer.type(torch.float16)
    assert layer.weight.dtype == torch.float16
    assert torch.equal(layer.dequantize(torch.float32), before)
    layer(x)
