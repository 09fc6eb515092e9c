"""PrefixEncoder and prefix_attention: against loops in float64, and the flat layout."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minipeft as mp
from minipeft import PrefixEncoder, prefix_attention
from minipeft.fast.prefix import merged_prefix_attention
from minipeft.prefix import joined_attention

UNEQUAL = [(2, 8, 4), (1, 16, 16), (3, 4, 8)]  # heads and sizes differ from layer to layer


def slow_attention(q, k, v, pk, pv, *, mask, is_causal, scale):
    """One query, one head, one key at a time, in float64."""
    batch, heads, t = q.shape[:3]
    groups, s = k.shape[1:3]
    out = torch.zeros(batch, heads, t, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            own_k, own_v = (x[b] if x.dim() == 4 else x for x in (pk, pv))
            for i in range(t):
                scores, values = [], []
                for j in range(own_k.shape[1]):
                    scores.append(scale * float(q[b, h, i].double() @ own_k[g, j].double()))
                    values.append(own_v[g, j].double())
                for j in range(s):
                    if is_causal and j > s - t + i:
                        continue
                    bias = 0.0
                    if mask is not None:
                        entry = mask.expand(batch, heads, t, s)[b, h, i, j]
                        if mask.dtype != torch.bool:
                            bias = float(entry)
                        elif not entry:
                            continue
                    scores.append(scale * float(q[b, h, i].double() @ k[b, g, j].double()) + bias)
                    values.append(v[b, g, j].double())
                weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
                out[b, h, i] = sum(w * x for w, x in zip(weights, values, strict=True))
    return out


@given(
    t=st.integers(1, 5), cached=st.integers(0, 3), p=st.integers(0, 4),
    groups=st.sampled_from([1, 2]), repeats=st.sampled_from([1, 3]), is_causal=st.booleans(),
    mask=st.sampled_from(["none", "padding", "additive"]), per_row=st.booleans(),
    scale=st.sampled_from([None, 0.7]),
)  # fmt: skip
def test_prefix_attention_equals_a_float64_loop(
    t, cached, p, groups, repeats, is_causal, mask, per_row, scale
):
    b, s, dk, dv = 2, t + cached, 6, 5
    q = torch.randn(b, groups * repeats, t, dk)
    k, v = torch.randn(b, groups, s, dk), torch.randn(b, groups, s, dv)
    lead = (b,) if per_row else ()
    pk, pv = torch.randn(*lead, groups, p, dk), torch.randn(*lead, groups, p, dv)
    if mask == "padding":  # the second row begins with one padding token, unless it is all it has
        given_mask = torch.ones(b, 1, 1, s, dtype=torch.bool)
        given_mask[1, ..., 0] = p == 0 and is_causal
    else:
        given_mask = torch.randn(b, 1, t, s) if mask == "additive" else None
    if p == 0 and mask == "padding" and s == 1:
        given_mask = None  # nothing to attend to
    y = prefix_attention(q, k, v, pk, pv, mask=given_mask, is_causal=is_causal, scale=scale)
    expected = slow_attention(
        q, k, v, pk, pv, mask=given_mask, is_causal=is_causal, scale=scale or 1 / math.sqrt(dk)
    )
    # float32 scores of sums of 6 products of numbers up to 5
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_prefix_through_every_argument():
    shapes = [(1, 4, 3, 6), (1, 2, 5, 6), (1, 2, 5, 4), (2, 3, 6), (2, 3, 4)]
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *a: prefix_attention(*a), tensors)


def test_a_prefix_of_length_0_is_plain_causal_attention():
    q, k, v = (torch.randn(2, 4, 7, 8) for _ in range(3))
    none = torch.zeros(4, 0, 8)
    plain = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(7, 7, dtype=torch.bool).tril()
    )
    assert torch.equal(prefix_attention(q, k, v, none, none), plain)


def test_the_prefix_is_cast_to_the_dtype_of_the_keys():
    q, k, v = (torch.randn(1, 2, 3, 4).bfloat16() for _ in range(3))
    prefix = torch.randn(2, 5, 4)
    assert prefix_attention(q, k, v, prefix, prefix).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(1, 1, 3, 4, dtype=torch.bool)}, "mask covers 4 keys, there are 5"),
        ({"prefix_k": torch.randn(3, 6, 8)}, "prefix of other shapes"),
        ({"prefix_v": torch.randn(2, 7, 8)}, "prefix of other shapes"),
        ({"prefix_k": torch.randn(3, 2, 6, 8)}, "prefix of other shapes"),
        ({"q": torch.randn(1, 3, 3, 8)}, "multiple"),
        ({"q": torch.randn(1, 4, 6, 8)}, "cannot be causal"),
    ],
)
def test_shapes_that_do_not_belong_together(change, message):
    arguments = {
        "q": torch.randn(1, 4, 3, 8), "k": torch.randn(1, 2, 5, 8), "v": torch.randn(1, 2, 5, 8),
        "prefix_k": torch.randn(2, 6, 8), "prefix_v": torch.randn(2, 6, 8), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        prefix_attention(**arguments)


@pytest.mark.parametrize("hidden", [None, 12])
def test_shapes_per_layer_and_the_flat_layout(hidden):
    encoder = PrefixEncoder(UNEQUAL, 5, hidden=hidden)
    flat = encoder.flat()
    assert flat.shape == (5, sum(h * (dk + dv) for h, dk, dv in UNEQUAL))
    column = 0
    for (heads, *sizes), pair in zip(UNEQUAL, encoder(), strict=True):
        for size, tensor in zip(sizes, pair, strict=True):  # keys of all heads, then values
            assert tensor.shape == (heads, 5, size)
            for head in range(heads):
                for d in range(size):
                    assert torch.equal(tensor[head, :, d], flat[:, column])
                    column += 1
    assert column == flat.shape[1]


def test_table_starts_as_normal_numbers_in_float32():
    encoder = PrefixEncoder([(4, 64, 64)] * 4, 128)
    flat = encoder.flat().detach()
    assert flat.dtype == torch.float32
    assert sum(p.numel() for p in encoder.parameters()) == flat.numel()
    # 262,144 draws: the standard error of the mean is 4e-5, of the deviation 3e-5
    assert abs(float(flat.mean())) < 2e-4 and abs(float(flat.std()) - 0.02) < 2e-4
    mlp = PrefixEncoder([(4, 64, 64)] * 4, 128, hidden=256).flat().detach()
    # of the size of a table's 0.02, within a factor of two: measured 0.016
    assert 0.01 < float(mlp.std()) < 0.04


def test_bake_keeps_the_prefix_and_drops_the_mlp():
    encoder = PrefixEncoder(UNEQUAL, 5, hidden=12, embedding_dim=7)
    baked = encoder.bake()
    assert torch.equal(baked.flat(), encoder.flat())
    assert baked.hidden is None and {n.split(".")[0] for n in baked.state_dict()} == {"tables"}


def test_dropout_acts_while_training_only():
    encoder = PrefixEncoder([(2, 8, 8)], 64, dropout=0.5)
    dropped = float((encoder()[0][0] == 0).float().mean())
    assert 0.35 < dropped < 0.65  # 1,024 draws: a standard error of 0.016
    assert not (encoder.eval()()[0][0] == 0).any()


def test_load_kv_and_load_flat_are_inverses_of_reading():
    source, copy_ = PrefixEncoder(UNEQUAL, 5), PrefixEncoder(UNEQUAL, 5)
    copy_.load_kv([(k[None], v[None]) for k, v in source()])
    assert torch.equal(copy_.flat(), source.flat())
    other = PrefixEncoder(UNEQUAL, 5)
    other.load_flat(source.flat())
    assert torch.equal(other.flat(), source.flat())


def test_bad_loads_change_nothing():
    encoder = PrefixEncoder(UNEQUAL, 5)
    before = encoder.flat().clone()
    pairs = [(k.detach().clone(), v.detach().clone()) for k, v in PrefixEncoder(UNEQUAL, 5)()]
    with pytest.raises(ValueError, match="2 layers; the prefix has 3"):
        encoder.load_kv(pairs[:2])
    with pytest.raises(ValueError, match="layer 1 has shapes"):
        encoder.load_kv([pairs[0], pairs[2], pairs[1]])
    with pytest.raises(ValueError, match="expected \\(5, 92\\)"):
        encoder.load_flat(torch.zeros(4, 92))
    pairs[2][1][0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        encoder.load_kv(pairs)
    assert torch.equal(encoder.flat(), before)
    with pytest.raises(ValueError, match="MLP"):
        PrefixEncoder(UNEQUAL, 5, hidden=4).load_flat(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4), r"kv_shapes=\[\]; expected one shape"), (([(1, 2, 3)], 0), "prefix_length=0"),
        (([(1, 2, 3)], True), "prefix_length=True"),
        (([(0, 2, 3)], 4), r"kv_shapes\[0\]=0"),
    ],
)  # fmt: skip
def test_impossible_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrefixEncoder(*arguments)


@pytest.mark.parametrize(
    "keywords", [{"dropout": 1.0}, {"init_std": 0}, {"hidden": 0}, {"embedding_dim": 4}]
)
def test_impossible_settings(keywords):
    with pytest.raises(ValueError, match=next(iter(keywords))):
        PrefixEncoder([(1, 2, 3)], 4, **keywords)


class Attention(nn.Module):
    """An attention of the test's own with a prefix of its own."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.prefix = PrefixEncoder([(2, 8, 8)], 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return prefix_attention(q, k, v, *self.prefix.layer(0))


def test_whole_model_functions_see_the_encoder():
    model, x = Attention(), torch.randn(2, 5, 16)
    mp.freeze(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prefix.tables.0"]
    assert list(mp.adapter_state_dict(model)) == ["prefix.tables.0"]
    with_prefix = model(x)
    with mp.disable_adapters(model):
        off = model(x)
    # any difference that allclose's own tolerances see
    assert not torch.allclose(off, with_prefix)
    q, k, v = model.qkv(x).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    none = torch.zeros(2, 0, 8)
    assert torch.equal(off, prefix_attention(q, k, v, none, none))
    assert torch.equal(copy.deepcopy(model)(x), with_prefix)


def test_a_prefix_cannot_be_scaled_and_nothing_else_is_then():
    model = nn.Sequential(nn.Linear(16, 16), Attention())
    mp.inject_lora(model, ["0"], rank=2)
    with pytest.raises(ValueError, match=r"cannot be scaled by 0\.5"):
        mp.scale_adapters(model, 0.5)
    assert model[0].scale == 1.0


def test_two_encoders_with_one_seed_are_equal():
    torch.manual_seed(3)
    first = PrefixEncoder(UNEQUAL, 4).flat()
    torch.manual_seed(3)
    assert torch.equal(PrefixEncoder(UNEQUAL, 4).flat(), first)


@pytest.mark.parametrize("hidden", [None, 12])
def test_frozen_positions_stay_and_the_others_train(hidden):
    encoder = PrefixEncoder(UNEQUAL, 5, hidden=hidden, frozen=2)
    before = encoder.flat().detach().clone()
    assert before.shape == PrefixEncoder(UNEQUAL, 5).flat().shape
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    sum(k.sum() + v.square().sum() for k, v in encoder()).backward()
    optimizer.step()
    after = encoder.flat().detach()
    assert torch.equal(after[:2], before[:2])
    assert (after[2:] != before[2:]).any(1).all()
    if hidden is None:
        other = PrefixEncoder(UNEQUAL, 5, frozen=1)
        other.load_flat(after)
        assert torch.equal(other.flat(), after)
    assert torch.equal(encoder.bake().flat(), encoder.flat()) and encoder.bake().frozen == 2
    module = nn.Sequential(encoder)
    mp.freeze(module)
    assert not any(p.requires_grad for p in encoder.sinks)
    assert {n for n, _ in encoder.named_parameters()} == set(encoder.adapter_parameters())


@given(
    t=st.integers(1, 4), p=st.integers(0, 4), groups=st.sampled_from([1, 2]),
    repeats=st.sampled_from([1, 3]), gate=st.floats(-1, 1),
)  # fmt: skip
def test_a_gate_is_that_share_of_the_prefixs_part(t, p, groups, repeats, gate):
    heads = groups * repeats
    q, k, v = (
        torch.randn(2, heads, t, 6),
        torch.randn(2, groups, t, 6),
        torch.randn(2, groups, t, 5),
    )
    pk, pv = torch.randn(groups, p, 6), torch.randn(groups, p, 5)
    gates = torch.tensor([gate, -gate / 2])[:groups]
    y = prefix_attention(q, k, v, pk, pv, gate=gates)
    scale = 1 / math.sqrt(6)
    whole, alone = (
        slow_attention(q, k, v, pk[:, :n], pv[:, :n], mask=None, is_causal=True, scale=scale)
        for n in (p, 0)
    )
    share = gates.double().repeat_interleave(repeats)[:, None, None]
    # float32 scores of sums of 6 products of numbers up to 5
    torch.testing.assert_close(y.double(), alone + share * (whole - alone), rtol=1e-4, atol=1e-5)


def test_a_gated_prefix_starts_as_none_and_its_gates_have_gradients():
    encoder = PrefixEncoder([(2, 8, 8)], 3, gated=True)
    q, k, v = (torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    none = torch.zeros(2, 0, 8)
    y = prefix_attention(q, k, v, *encoder.layer(0), gate=encoder.gate(0))
    assert torch.equal(y, prefix_attention(q, k, v, none, none))
    y.square().sum().backward()
    assert encoder.gates[0].grad.abs().min() > 0
    assert encoder.tables[0].grad.abs().max() == 0
    with torch.no_grad():
        encoder.gates[0].fill_(20.0)  # tanh is 1 in float32
    opened = prefix_attention(q, k, v, *encoder.layer(0), gate=encoder.gate(0))
    # float32, assert_close's own tolerance; another order of sums: measured 1e-7
    torch.testing.assert_close(opened, prefix_attention(q, k, v, *encoder.layer(0)))
    assert encoder.bake().gate(0) is not None and PrefixEncoder([(1, 2, 2)], 3).gate(0) is None


def test_dropout_of_the_weights_keeps_their_mean():
    q, k = torch.zeros(1, 1, 2000, 4), torch.zeros(1, 1, 2, 4)
    v, pv = torch.ones(1, 1, 2, 1), torch.ones(1, 6, 1)
    y = prefix_attention(q, k, v, torch.zeros(1, 6, 4), pv, is_causal=False, dropout=0.5)
    # 8 weights of 1/8, each kept with 1/2 and doubled: variance 1/8; 2,000 rows
    assert abs(float(y.mean()) - 1) < 5 * math.sqrt(1 / 8 / 2000) and float(y.std()) > 0.2


@pytest.mark.parametrize("frozen", [-1, 4, True, 1.5])
def test_impossible_numbers_of_frozen_positions(frozen):
    with pytest.raises((ValueError, TypeError), match="frozen"):
        PrefixEncoder([(1, 2, 3)], 4, frozen=frozen)


@pytest.mark.parametrize("t", [7, 600])
def test_merged_and_joined_attention_agree_and_auto_is_one_of_them(t):
    q, k, v = (torch.randn(1, 2, t, 8, requires_grad=True) for _ in range(3))
    prefix = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(2)]
    with mp.use_kernels(True):
        outs = [f(q, k, v, *prefix, is_causal=True)
                for f in (joined_attention, merged_prefix_attention, prefix_attention)]  # fmt: skip
    # float32, sums of up to 605 weights in another order
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(outs[2], outs[1] if t == 600 else outs[0])
    gradients = [torch.autograd.grad(y.square().sum(), (q, k, v, *prefix)) for y in outs[:2]]
    for joined, merged in zip(*gradients, strict=True):
        # gradients up to 10, sums of up to 605 products: measured 4e-6
        torch.testing.assert_close(joined, merged, rtol=1e-4, atol=1e-4)


def test_plain_mode_joins_and_backend_says_so():
    q, k, v = (torch.randn(1, 2, 600, 8) for _ in range(3))
    prefix, gate = torch.randn(2, 5, 8), torch.tensor([0.3])
    with mp.use_kernels(True):
        merged = prefix_attention(q, k, v, prefix, prefix)
        gated = prefix_attention(q, k, v, prefix, prefix, gate=gate)
        assert mp.backend()["prefix_attention"] == "pytorch"
        assert mp.backend("cuda")["prefix_attention"].startswith("plain (not pytorch: not for")
    with mp.use_kernels("plain"):
        joined = prefix_attention(q, k, v, prefix, prefix)
        # float32, sums of up to 605 weights in another order
        torch.testing.assert_close(
            prefix_attention(q, k, v, prefix, prefix, gate=gate), gated, rtol=1e-5, atol=1e-5
        )
        assert mp.backend()["prefix_attention"] == "plain (not pytorch: only plain rows are on)"
    assert torch.equal(joined, joined_attention(q, k, v, prefix, prefix))
    assert not torch.equal(joined, merged)


def test_merged_and_joined_attention_refuse_the_same_prefixes():
    q, k, v = (torch.randn(1, 2, 600, 8) for _ in range(3))
    prefix = torch.randn(2, 5, 8)
    for wrong in (torch.randn(3, 5, 8), torch.randn(2, 5, 6), torch.randn(3, 2, 5, 8)):
        with pytest.raises(ValueError, match="prefix"):
            prefix_attention(q, k, v, wrong, prefix)
        with pytest.raises(ValueError, match="prefix"):
            prefix_attention(q, k, v, prefix, wrong)


@pytest.mark.slow
def test_compiled_and_transformed_attention_is_joined(plain_python):
    plain_python(
        """
import torch
from minipeft.prefix import joined_attention, prefix_attention
q, k, v = (torch.randn(1, 2, 600, 8, requires_grad=True) for _ in range(3))
p = torch.randn(2, 5, 8, requires_grad=True)
compiled = torch.compile(prefix_attention, backend="aot_eager", fullgraph=True)
a, b = compiled(q, k, v, p, p), joined_attention(q, k, v, p, p)
# float32, sums of up to 605 weights in another order
assert torch.allclose(a, b, atol=1e-5)
a.sum().backward()
torch.func.grad(lambda p: prefix_attention(q, k, v, p, p).sum())(p)
"""
    )
