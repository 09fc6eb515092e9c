"""LoRA on nn.MultiheadAttention: a float64 loop, every option of it, torch's encoder, PEFT."""

import copy
import itertools
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minipeft as mp
from minipeft.layers import LoRAMultiheadAttention

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, the same products in another order


def trained(base, rank=3, alpha=5, **arguments):
    """A layer whose B are not zero."""
    layer = LoRAMultiheadAttention(base, rank, alpha, **arguments)
    for name, parameter in layer.adapter_parameters().items():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.2)
    return layer


def attention(embed_dim=12, n_heads=3, **arguments):
    """A plain module whose biases are not zero."""
    plain = nn.MultiheadAttention(embed_dim, n_heads, **arguments)
    for name, parameter in plain.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return plain


def effective(layer):
    """The plain module with the factors' products added to its weights, by hand, in float64."""
    plain = copy.deepcopy(layer.base).double()
    first = "in_proj_weight" if plain._qkv_same_embed_dim else "q_proj_weight"
    factors = {first: "lora", "out_proj.weight": "out_lora"}
    if not plain._qkv_same_embed_dim:
        factors |= {"k_proj_weight": "k_lora", "v_proj_weight": "v_lora"}
    for name, own in factors.items():
        a, b = (getattr(layer, f"{own}_{x}").detach().double() for x in "ab")
        plain.get_parameter(name).data += layer.scaling * b @ a
    return plain


def loop(weights, biases, x, n_heads):
    """Self-attention of one sequence (tokens, embed_dim), number by number."""
    (in_weight, out_weight), (in_bias, out_bias) = weights, biases
    tokens, size = x.shape
    q, k, v = (in_weight[i * size : (i + 1) * size] @ x.T + in_bias[i * size : (i + 1) * size, None]
               for i in range(3))  # fmt: skip
    heads = []
    for rows in torch.arange(size).split(size // n_heads):
        for token in range(tokens):
            scores = [q[rows, token] @ k[rows, s] / (size // n_heads) ** 0.5 for s in range(tokens)]
            p = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            heads.append(sum(p[s] * v[rows, s] for s in range(tokens)))
    joined = torch.stack(heads).view(n_heads, tokens, -1).transpose(0, 1).reshape(tokens, size)
    return joined @ out_weight.T + out_bias


@given(n_heads=st.sampled_from([1, 3]), head_dim=st.sampled_from([1, 7]), tokens=st.sampled_from(
    [1, 5]), rank=st.sampled_from([1, 3]))  # fmt: skip
def test_output_and_gradients_equal_a_float64_loop(n_heads, head_dim, tokens, rank):
    size = n_heads * head_dim
    with warnings.catch_warnings():  # a rank above the size
        warnings.simplefilter("ignore")
        layer = trained(attention(size, n_heads), rank)
    x, grad = torch.randn(tokens, size, requires_grad=True), torch.randn(tokens, size)
    out, _ = layer(x, x, x)
    out.backward(grad)
    own = {n: p.detach().double().requires_grad_() for n, p in layer.adapter_parameters().items()}
    exact_x = x.detach().double().requires_grad_()
    plain = layer.base.double()
    weights = (
        plain.in_proj_weight + layer.scaling * own["lora_b"] @ own["lora_a"],
        plain.out_proj.weight + layer.scaling * own["out_lora_b"] @ own["out_lora_a"],
    )
    expected = loop(weights, (plain.in_proj_bias, plain.out_proj.bias), exact_x, n_heads)
    expected.backward(grad.double())
    # float32 sums of at most 21 products, through a softmax
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, **tolerance)
    for name, parameter in layer.adapter_parameters().items():
        torch.testing.assert_close(parameter.grad.double(), own[name].grad, **tolerance)


SIZES = [{}, {"kdim": 7, "vdim": 5}, {"kdim": 7}]
OPTIONS = [
    {"batch_first": first, "bias": bias, "add_bias_kv": kv, "add_zero_attn": zero, **sizes}
    for first, bias, kv, zero, sizes in itertools.product(*[[False, True]] * 4, SIZES)
]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_every_option_gives_what_nn_multihead_attention_gives(need_weights, batched, capsys):
    batch, tokens, sources, heads = 2 if batched else 1, 4, 6, 3
    causal = torch.ones(tokens, sources, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, sources, dtype=torch.bool)
    padding[0, 4:] = True
    biases = torch.randn(batch * heads, tokens, sources, dtype=torch.float64)
    worst, count = 0.0, 0
    for options in OPTIONS:
        layer = trained(attention(**options).double(), dtype=torch.float64)
        plain = effective(layer)
        shapes = [(tokens, 12), (sources, plain.kdim), (sources, plain.vdim)]
        inputs = [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]
        inputs[2] = inputs[1] if inputs[2].shape == inputs[1].shape else inputs[2]
        if not batched:
            inputs = [x[0] for x in inputs]
        elif not options["batch_first"]:
            inputs = [x.transpose(0, 1) for x in inputs]
        pad = padding if batched else padding[0]
        float_pad = torch.zeros_like(pad, dtype=torch.float64).masked_fill(pad, -3.0)
        for masks in (
            {}, {"attn_mask": causal}, {"attn_mask": biases}, {"key_padding_mask": pad},
            {"attn_mask": causal, "key_padding_mask": pad},
            {"attn_mask": biases, "key_padding_mask": float_pad},
            {"attn_mask": causal, "is_causal": True, "average_attn_weights": False},
            {"attn_mask": causal, "key_padding_mask": pad, "is_causal": True},
        ):  # fmt: skip
            ours = layer(*inputs, need_weights=need_weights, **masks)
            theirs = plain(*inputs, need_weights=need_weights, **masks)
            for a, b in zip(ours, theirs, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # float64
                    worst = max(worst, float((a - b).detach().abs().max()))
            count += 1
    with capsys.disabled():
        print(f"\nattention, {count} combinations against torch's, float64: {worst:.1e}")


def test_zero_b_leaves_the_output_unchanged():
    for options in ({}, {"kdim": 7, "vdim": 5}, {"batch_first": True}):
        base = attention(**options)
        layer = LoRAMultiheadAttention(base, 2)
        q, k, v = torch.randn(5, 2, 12), torch.randn(5, 2, base.kdim), torch.randn(5, 2, base.vdim)
        for ours, theirs in zip(layer(q, k, v), base(q, k, v), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


def test_switched_off_it_is_the_base():
    for training in (True, False):
        layer, x = trained(attention(batch_first=True)).train(training), torch.randn(2, 5, 12)
        assert not torch.equal(layer(x, x, x)[0], layer.base(x, x, x)[0])
        with mp.disable_adapters(layer):
            for ours, theirs in zip(layer(x, x, x), layer.base(x, x, x), strict=True):
                assert torch.equal(ours, theirs)
            assert layer.in_proj_weight is layer.base.in_proj_weight
            assert layer.out_proj.weight is layer.base.out_proj.weight


def test_the_attentions_own_dropout_is_kept():
    layer, x = trained(attention(dropout=0.5)), torch.randn(5, 2, 12)
    for need_weights in (True, False):
        torch.manual_seed(1)
        ours = layer(x, x, x, need_weights=need_weights)
        torch.manual_seed(1)
        theirs = layer.merged()(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    assert (layer(x, x, x)[1] == 0).any()
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def test_dropout_acts_on_the_inputs_of_the_branches_only():
    base, x = attention(), torch.randn(5, 2, 12)
    layer = trained(base, dropout=0.5)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    torch.manual_seed(1)
    out, _ = layer(x, x, x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    projected = F.linear(x, base.in_proj_weight, base.in_proj_bias)
    projected = projected + layer.scaling * dropped @ layer.lora_a.T @ layer.lora_b.T
    q, k, v = (t.unflatten(-1, (3, 4)).permute(1, 2, 0, 3) for t in projected.chunk(3, -1))
    heads = F.softmax(q @ k.mT / 2, -1) @ v
    heads = heads.permute(2, 0, 1, 3).flatten(2)
    expected = base.out_proj(heads)
    expected = expected + layer.scaling * F.dropout(heads, 0.5) @ layer.out_lora_a.T @ (
        layer.out_lora_b.T
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    silent = LoRAMultiheadAttention(base, 2, dropout=0.9)  # B = 0: the base path sees no dropout
    torch.testing.assert_close(silent(x, x, x)[0], base(x, x, x)[0], **CLOSE)


@pytest.mark.parametrize("sizes", SIZES)
def test_layers_stack(sizes):
    lower = trained(attention(**sizes))
    upper = LoRAMultiheadAttention(lower, 2, dropout=0.3)
    upper.load_state_dict({k: torch.randn_like(v) for k, v in upper.state_dict().items()})
    plain = upper.base.base
    q, k, v = (torch.randn(5, 2, n) for n in (12, plain.kdim, plain.vdim))
    upper.eval()
    both = copy.deepcopy(plain)
    for name, parameter in both.named_parameters():
        for layer in (lower, upper):
            if name in layer.deltas():
                parameter.data += layer.deltas()[name]
    # standard normal weights: numbers up to 600, and a sharp softmax: measured 2e-3 there
    torch.testing.assert_close(upper(q, k, v)[0], both(q, k, v)[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(upper.merged()(q, k, v)[0], both(q, k, v)[0], rtol=1e-3, atol=1e-3)
    upper.enabled = False
    assert torch.equal(upper(q, k, v)[0], lower(q, k, v)[0])
    upper.enabled, lower.enabled = True, False
    only = copy.deepcopy(plain)
    for name, delta in upper.deltas().items():
        only.get_parameter(name).data += delta
    torch.testing.assert_close(upper(q, k, v)[0], only(q, k, v)[0], rtol=1e-3, atol=1e-3)
    upper.train()
    assert not torch.equal(upper(q, k, v)[0], upper(q, k, v)[0])


@pytest.mark.parametrize("sizes", SIZES)
def test_merge_unmerge_merged_and_fold(sizes):
    layer = trained(attention(**sizes)).eval()
    before = copy.deepcopy(layer.state_dict())
    q, k, v = (torch.randn(5, 2, n) for n in (12, layer.kdim, layer.vdim))
    expected, _ = layer(q, k, v)
    layer.merge()
    assert torch.equal(layer(q, k, v)[0], layer.merged()(q, k, v)[0])
    torch.testing.assert_close(layer(q, k, v)[0], expected, **CLOSE)
    assert layer.out_proj.weight is layer.merged_module.out_proj.weight
    layer.train()
    with pytest.raises(RuntimeError, match="training while merged"):
        layer(q, k, v)
    layer.eval().unmerge()
    assert torch.equal(layer(q, k, v)[0], expected)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    folded = copy.deepcopy(layer).fold()
    assert type(folded) is nn.MultiheadAttention
    torch.testing.assert_close(folded(q, k, v)[0], expected, **CLOSE)


def test_merged_bf16_weights_are_the_float32_sums_rounded_once():
    layer = trained(attention().bfloat16())
    merged = layer.merged()
    for name, delta in layer.deltas().items():
        exact = layer.base.get_parameter(name).float() + delta
        assert torch.equal(merged.get_parameter(name), exact.bfloat16())
    x = torch.randn(5, 2, 12).bfloat16()
    assert layer(x, x, x)[0].dtype == torch.bfloat16


def test_autocast_computes_in_its_dtype():
    layer, x = trained(attention()), torch.randn(5, 2, 12)
    for need_weights in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = layer(x, x, x, need_weights=need_weights, attn_mask=torch.zeros(5, 5))
        assert y.dtype == torch.bfloat16
        # three products of bf16 inputs: each rounds by at most 2**-9
        torch.testing.assert_close(y.float(), layer(x, x, x)[0], rtol=0.05, atol=0.05)
    y.sum().backward()
    assert layer.lora_b.grad.dtype == torch.float32


def test_copies_and_state():
    layer, x = trained(attention(kdim=7, vdim=5)).eval(), torch.randn(5, 2, 12)
    inputs = x, torch.randn(6, 2, 7), torch.randn(6, 2, 5)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(*inputs)[0], layer(*inputs)[0])
        assert again.out_lora_b.data_ptr() != layer.out_lora_b.data_ptr()
    other = LoRAMultiheadAttention(attention(kdim=7, vdim=5), 3, 5).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(*inputs)[0], layer(*inputs)[0])
    assert set(layer.adapter_parameters()) == {
        f"{part}lora_{x}" for part in ("", "k_", "v_", "out_") for x in "ab"
    }


def test_threads_do_not_see_each_others_weights():
    layer, x = trained(attention(batch_first=True)).eval(), torch.randn(2, 5, 12)
    before, found = copy.deepcopy(layer.state_dict()), []

    def call():
        found.extend(layer(x, x, x)[0] for _ in range(50))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all(torch.equal(y, found[0]) for y in found)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def encoder_layer(**arguments):
    return nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True, **arguments)


NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@NESTED
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_transformer_encoder_computes_the_same_in_train_and_eval(norm_first, masked, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # norm_first has no nested path, it says
        model = nn.TransformerEncoder(encoder_layer(norm_first=norm_first), 2)
    plain = copy.deepcopy(model)
    for layer in model.layers:
        layer.self_attn = trained(layer.self_attn)
    x = torch.randn(3, 6, 12)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:], padding[2, 1:] = True, True
    mask = {"src_key_padding_mask": padding} if masked else {}
    seen = ~padding if masked else torch.ones_like(padding)
    outputs = []
    for training, grad in ((True, True), (True, False), (False, True), (False, False)):
        model.train(training)
        with torch.set_grad_enabled(grad):
            outputs.append(model(x, **mask)[seen])
    differences = [float((y - outputs[0]).detach().abs().max()) for y in outputs]
    with capsys.disabled():
        print(f"\nTransformerEncoder, train and eval, masked={masked}: {max(differences):.1e}")
    assert max(differences) <= CLOSE["atol"]
    # and it is not the base model that both compute
    assert (outputs[-1] - plain.eval()(x, **mask)[seen]).abs().max() > 0.01


def test_the_fast_path_of_an_encoder_layer_is_taken_with_the_effective_weights(monkeypatch):
    layer, x = encoder_layer(), torch.randn(3, 6, 12)
    layer.self_attn = trained(layer.self_attn)
    expected = layer(x)
    layer.eval()

    def fail(*args, **kwargs):
        raise AssertionError("not the fast path")

    monkeypatch.setattr(layer.self_attn, "forward", fail)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **CLOSE)


@NESTED
def test_nested_tensors_of_an_encoder_whose_layer_has_a_hook():
    model = nn.TransformerEncoder(encoder_layer(), 1).eval()
    attn = model.layers[0].self_attn = trained(model.layers[0].self_attn).eval()
    x, padding = torch.randn(2, 6, 12), torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        seen = []
        attn.register_forward_hook(lambda module, args, out: seen.append(args[0].is_nested))
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected, **CLOSE)
    assert seen == [True]
    nested = torch.nested.nested_tensor([x[0], x[1, :4]])
    with pytest.raises(RuntimeError, match="nested tensors give the adapter no gradient"):
        attn(nested, nested, nested)


def test_a_transformer_decoder_layer_takes_it_for_both_attentions():
    layer = nn.TransformerDecoderLayer(12, 2, 20, dropout=0.0)
    layer.self_attn, layer.multihead_attn = (
        trained(part) for part in (layer.self_attn, layer.multihead_attn)
    )
    x, memory = torch.randn(5, 2, 12), torch.randn(7, 2, 12)
    y = layer(x, memory)
    merged = copy.deepcopy(layer)
    merged.self_attn, merged.multihead_attn = (
        layer.self_attn.merged(),
        layer.multihead_attn.merged(),
    )
    torch.testing.assert_close(y, merged(x, memory), **CLOSE)
    y.sum().backward()
    assert layer.multihead_attn.out_lora_b.grad.abs().max() > 0


def test_inject_and_remove():
    model = nn.Sequential(encoder_layer())
    state = copy.deepcopy(model.state_dict())
    assert mp.inject_lora(model, ["self_attn"], rank=2) == ["0.self_attn"]
    nn.init.normal_(model[0].self_attn.lora_b)
    mp.remove(model)
    assert type(model[0].self_attn) is nn.MultiheadAttention
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_compiled_it_switches_and_scales_without_compiling_again(plain_python, capsys):
    printed = plain_python("""
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from minipeft.layers import LoRAMultiheadAttention

torch.manual_seed(0)
for sizes in ({}, {"kdim": 5, "vdim": 7}):
    lower = LoRAMultiheadAttention(nn.MultiheadAttention(12, 3, **sizes), 2)
    layer = LoRAMultiheadAttention(lower, 3)
    for name, p in layer.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(p, std=0.2)
    x = [torch.randn(5, 2, n) for n in (12, sizes.get("kdim", 12), sizes.get("vdim", 12))]
    mask, counter = torch.ones(5, 5).triu(1).bool(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for on, below, scale in ((1, 1, 1.0), (0, 1, 1.0), (1, 0, 1.0), (0, 0, 1.0), (1, 1, 0.3)):
        layer.enabled, lower.enabled, layer.scale = bool(on), bool(below), scale
        layer.zero_grad()
        out, _ = compiled(*x, attn_mask=mask)
        out.sum().backward()
        grad = layer.lora_b.grad.clone()
        layer.zero_grad()
        expected, _ = layer(*x, attn_mask=mask)
        # float32: compiled code may sum in another order, and gradients are sums of 10 outputs'
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        if on:
            expected.sum().backward()
            torch.testing.assert_close(grad, layer.lora_b.grad, rtol=1e-4, atol=1e-5)
    print(counter.frame_count)
""")
    assert printed.split() == ["1", "1"]


def test_bad_input_raises(plain_python):
    plain_python("""
import pytest, torch
from torch import nn
from minipeft import LoRALinear
from minipeft.layers import LoRAMultiheadAttention

class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)

plain = nn.MultiheadAttention(8, 2)
with pytest.raises(TypeError, match="expected a module"):
    LoRAMultiheadAttention(plain.in_proj_weight, 2)
with pytest.raises(ValueError, match="no nn.MultiheadAttention"):
    LoRAMultiheadAttention(nn.Linear(8, 8), 2)
with pytest.raises(ValueError, match="forward of its own"):
    LoRAMultiheadAttention(Own(8, 2), 2)
for arguments in ({"rank": 0}, {"rank": 2, "alpha": -1}, {"rank": 2, "dropout": 1.0}):
    with pytest.raises(ValueError):
        LoRAMultiheadAttention(plain, **arguments)

def broken(layer):
    raise ValueError("init")

with pytest.raises(ValueError, match="init"):
    LoRAMultiheadAttention(plain, 2, init=broken)
assert all(p.requires_grad for p in plain.parameters())

layer, x = LoRAMultiheadAttention(plain, 2), torch.randn(5, 3, 8)
with pytest.raises(ValueError, match="pass the mask too"):
    layer(x, x, x, is_causal=True)
for name, mask in (("attn_mask", torch.zeros(1, 5)), ("attn_mask", torch.zeros(5, 5).long()),
                   ("attn_mask", torch.zeros(3, 5, 5)), ("key_padding_mask", torch.zeros(5, 3))):
    with pytest.raises(ValueError, match=f"{name}: .* expected bool or floats"):
        layer(x, x, x, **{name: mask})
""")


def test_peft_applies_the_output_projections_delta_twice_and_ours_once(capsys):
    peft_layer = pytest.importorskip("peft.tuners.lora.layer")
    from peft import LoraConfig

    plain, x = attention(), torch.randn(5, 2, 12)
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.9)
    theirs = peft_layer.MultiheadAttention(
        copy.deepcopy(plain), "default", config=config, r=3, lora_alpha=5
    )
    ours = trained(plain, 3, 5)
    inner = theirs.base_layer.out_proj
    with torch.no_grad():
        for module, prefix in ((theirs, "lora_"), (inner, "out_lora_")):
            module.lora_A["default"].weight.copy_(getattr(ours, f"{prefix}a"))
            module.lora_B["default"].weight.copy_(getattr(ours, f"{prefix}b"))
    expected = effective(ours).float()
    twice = effective(ours).float()
    twice.out_proj.weight.data += ours.deltas()["out_proj.weight"]
    torch.testing.assert_close(ours(x, x, x)[0], expected(x, x, x)[0], **CLOSE)
    torch.testing.assert_close(theirs(x, x, x)[0], twice(x, x, x)[0], **CLOSE)
    off = float((theirs(x, x, x)[0] - expected(x, x, x)[0]).detach().abs().max())
    mine = float((ours(x, x, x)[0] - expected(x, x, x)[0]).detach().abs().max())
    with capsys.disabled():
        print(f"\nattention against the formula: ours {mine:.1e}, PEFT {off:.2f} (out_proj twice)")
    assert off > 0.1
    assert torch.equal(theirs.train()(x, x, x)[0], theirs(x, x, x)[0])  # its dropout of 0.9: none
