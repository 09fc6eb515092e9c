"""LoRA on fused projections: a float64 loop; the layouts against transformers' own models."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minipeft as mp
from minipeft import LoRALinear, NF4Linear
from minipeft.layers import LoRAFusedLinear, NF4Conv1D
from minipeft.layers.fused import blocks, model_parallel, per_group, per_head

SLICES = {"q": 7, "k": 1, "v": 5}
# float32, sums of up to 65 products in another order, values up to 31: measured 2.4e-6
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def trained(base, rank=3, alpha=None, **arguments):
    """A layer whose B are not zero."""
    arguments.setdefault("slices", SLICES)
    layer = LoRAFusedLinear(base, rank, alpha, **arguments)
    for name in layer.ranks:
        nn.init.normal_(getattr(layer, f"lora_b_{name}"), std=0.3)
    return layer


def shuffled(sizes):
    """Slices of these sizes whose rows lie anywhere."""
    parts = torch.randperm(sum(sizes.values())).split(list(sizes.values()))
    return dict(zip(sizes, parts, strict=True))


@given(
    ranks=st.fixed_dictionaries({n: st.integers(0, 3) for n in SLICES}).filter(
        lambda r: any(r.values())
    ),
    in_features=st.sampled_from([1, 7, 63, 65]), batch=st.sampled_from([(), (1,), (2, 3)]),
    alpha=st.sampled_from([None, 3, {"q": 2, "k": 0.5, "v": 7}]), anywhere=st.booleans(),
)  # fmt: skip
def test_output_and_gradients_equal_a_float64_loop(ranks, in_features, batch, alpha, anywhere):
    slices = shuffled(SLICES) if anywhere else SLICES
    rows = slices if anywhere else {"q": range(7), "k": range(7, 8), "v": range(8, 13)}
    layer = trained(nn.Linear(in_features, 13), ranks, alpha, slices=slices)
    x = torch.randn(*batch, in_features, requires_grad=True)
    y, grad = layer(x), torch.randn(*batch, 13)
    y.backward(grad)
    base, x64 = copy.deepcopy(layer.base).double(), x.detach().double().requires_grad_()
    own = {n: p.detach().double().requires_grad_() for n, p in layer.adapter_parameters().items()}
    columns, first = list(base(x64).unbind(-1)), 0
    for name in SLICES:
        rank = ranks[name]
        if not rank:
            continue
        number = alpha[name] if isinstance(alpha, dict) else rank if alpha is None else alpha
        hidden = x64 @ own["lora_a"][first : first + rank].T
        for i, row in enumerate(rows[name]):
            b = own[f"lora_b_{name}"][i]
            columns[row] = columns[row] + number / rank * (hidden * b).sum(-1)
        first += rank
    expected = torch.stack(columns, -1)
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, **CLOSE)
    torch.testing.assert_close(x.grad.double(), x64.grad, **CLOSE)
    for name, parameter in layer.adapter_parameters().items():
        torch.testing.assert_close(parameter.grad.double(), own[name].grad, **CLOSE)


def test_zero_b_leaves_the_output_unchanged():
    base, x = nn.Linear(9, 13), torch.randn(4, 9)
    assert torch.equal(LoRAFusedLinear(base, 2, slices=SLICES)(x), base(x))


def test_rows_without_an_adapter_keep_the_bases_bits():
    base, x = nn.Linear(9, 13), torch.randn(4, 9)
    layer = trained(base, {"q": 2, "v": 1})
    assert set(layer.adapter_parameters()) == {"lora_a", "lora_b_q", "lora_b_v"}
    assert torch.equal(layer(x)[:, 7], base(x)[:, 7])
    assert torch.equal(layer.delta()[7], torch.zeros(9))
    assert (layer(x) != base(x))[:, [0, 12]].all()


def test_slice_deltas_make_up_the_delta():
    layer = trained(nn.Linear(9, 13), {"q": 2, "v": 3}, {"q": 1, "v": 5}, slices=shuffled(SLICES))
    layer.scale = 0.5
    a, b = layer.factors()
    assert (layer.rank, layer.scaling, layer.alpha, tuple(a.shape)) == (5, 1.0, 5.0, (5, 9))
    torch.testing.assert_close(layer.delta(), 0.5 * b @ a, **CLOSE)
    for name, scaling in {"q": 1 / 2, "v": 5 / 3}.items():
        found = layer.slice_delta(name)
        part, own = layer.slice_factors()[name]
        torch.testing.assert_close(found, 0.5 * scaling * own @ part, **CLOSE)
        torch.testing.assert_close(layer.delta()[layer.rows[name]], found, **CLOSE)
    with pytest.raises(ValueError, match="'k' has no adapter"):
        layer.slice_delta("k")


def test_it_is_one_plain_lora_of_the_sum_of_ranks():
    base, x = nn.Linear(9, 13), torch.randn(4, 9)
    layer = trained(base, {"q": 2, "v": 3}, 4, rank_stabilized=True)
    plain = LoRALinear(copy.deepcopy(base), layer.rank)
    with torch.no_grad():
        for own, factor in zip((plain.lora_a, plain.lora_b), layer.factors(), strict=True):
            own.copy_(factor)
    assert layer.scalings == {"q": 4 / 2**0.5, "v": 4 / 3**0.5}
    torch.testing.assert_close(plain(x), layer(x), rtol=0, atol=0)  # the same operations
    assert plain.scaling == layer.scaling


def test_with_one_slice_it_is_lora_linear():
    base, x = nn.Linear(9, 13), torch.randn(4, 9)
    layer = trained(base, 2, 6, slices={"all": 13})
    plain = LoRALinear(copy.deepcopy(base), 2, 6)
    plain.load_state_dict({**plain.state_dict(), "lora_a": layer.lora_a,
                           "lora_b": layer.lora_b_all})  # fmt: skip
    torch.testing.assert_close(layer(x), plain(x), **CLOSE)


def bases():
    from transformers.pytorch_utils import Conv1D

    conv1d = Conv1D(13, 64)
    nn.init.normal_(conv1d.bias)
    return {
        "linear": nn.Linear(64, 13), "no bias": nn.Linear(64, 13, bias=False), "Conv1D": conv1d,
        "NF4": NF4Linear.from_linear(nn.Linear(64, 13)),
        "NF4 Conv1D": NF4Conv1D.from_linear(conv1d),
        "stacked": LoRALinear(nn.Linear(64, 13), 2, init=lambda x: nn.init.normal_(x.lora_b)),
        "twice": trained(nn.Linear(64, 13), 1, slices=shuffled(SLICES)),
    }  # fmt: skip


KINDS = ["linear", "no bias", "Conv1D", "NF4", "NF4 Conv1D", "stacked", "twice"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_like_base(kind):
    pytest.importorskip("transformers")
    base, x = bases()[kind], torch.randn(3, 5, 64)
    layer = trained(base, {"q": 2, "v": 3}, slices=shuffled(SLICES)).eval()
    expected = base(x) + x @ layer.delta().T
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    weight = layer.weight.T if layer.transposed else layer.weight
    torch.testing.assert_close(F.linear(x, weight, layer.bias), expected, **CLOSE)
    before = copy.deepcopy(layer.state_dict())
    layer.merge()
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    layer.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    with mp.disable_adapters(layer):
        assert torch.equal(layer(x), base(x))
    folded = layer.fold()
    assert not isinstance(folded, LoRALinear | LoRAFusedLinear | NF4Linear)
    torch.testing.assert_close(folded(x), expected, **CLOSE)


def test_merged_bf16_weights_are_the_float32_sums_rounded_once():
    base = nn.Linear(64, 13).bfloat16()
    layer = trained(base, {"q": 2, "v": 3}, 5)
    exact = base.weight.float() + layer.delta()
    assert torch.equal(layer.merged().weight, exact.bfloat16())
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_factors_of_another_dtype_are_scaled_in_float32():
    layer = trained(nn.Linear(8, 13), 3, 1, dtype=torch.bfloat16)
    assert layer.lora_b_q.dtype == torch.bfloat16
    assert torch.equal(layer.factors()[1][:7, :3], layer.lora_b_q.float() * (1 / 3))
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.lora_b_q.grad.dtype == torch.bfloat16


def test_autocast_computes_in_its_dtype():
    layer = trained(nn.Linear(8, 13))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(2, 8))
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_b_k.grad.dtype == torch.float32


def test_dropout_acts_in_training_only_and_on_the_branch_only():
    layer, x = trained(nn.Linear(64, 13), dropout=0.5), torch.randn(4, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **CLOSE)
    silent = LoRAFusedLinear(nn.Linear(64, 13), 2, slices=SLICES, dropout=0.9)
    assert torch.equal(silent(x), silent.base(x))


def test_copies_state_and_the_meta_device():
    layer, x = trained(nn.Linear(8, 13), slices=shuffled(SLICES)), torch.randn(2, 8)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))
        assert again.lora_b_q.data_ptr() != layer.lora_b_q.data_ptr()
    assert set(layer.state_dict()) == {
        "lora_a", "lora_b_q", "lora_b_k", "lora_b_v", "base.weight", "base.bias",
    }  # fmt: skip
    with torch.device("meta"):
        empty = LoRAFusedLinear(nn.Linear(8, 13), 3, slices=layer.rows)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    with torch.device("meta"):
        assigned = LoRAFusedLinear(nn.Linear(8, 13), 3, slices=layer.rows)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(assigned(x), layer(x))


def test_bad_input_raises(plain_python):
    plain_python("""
import pytest, torch
from torch import nn
from minipeft.layers import LoRAFusedLinear
from minipeft.layers.fused import model_parallel, per_group

linear, slices = nn.Linear(8, 6), {"q": 4, "k": 2}
with pytest.raises(TypeError, match="module"):
    LoRAFusedLinear(linear.weight, 2, slices=slices)
with pytest.raises(ValueError, match="no linear layer"):
    LoRAFusedLinear(nn.LayerNorm(8), 2, slices=slices)
twice, beyond = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([0, 1, 2, 3, 4, 6])
for wrong in ({"q": 4}, {"q": 4, "k": 3}, {}, {"q": twice}, {"q": beyond}, {"q": twice[:0]},
              {"q": torch.arange(6.0)}):
    with pytest.raises(ValueError, match="cover each of the 6 output rows once"):
        LoRAFusedLinear(linear, 2, slices=wrong)
for wrong in ({"q": 6, "k": 0}, {"q": 7, "k": -1}, {"q.x": 6}, {"q": 4, "k": torch.tensor([4, 5])}):
    with pytest.raises(ValueError, match="expected names"):
        LoRAFusedLinear(linear, 2, slices=wrong)
with pytest.raises(ValueError, match="rank for .'v'.*the slices are .'q', 'k'"):
    LoRAFusedLinear(linear, {"v": 2}, slices=slices)
for rank, alpha in ((0, None), ({}, None), ({"q": 0}, None), ({"q": 2, "k": 1}, {"q": 2})):
    with pytest.raises(ValueError, match="expected a rank above 0, and an alpha"):
        LoRAFusedLinear(linear, rank, alpha, slices=slices)
for rank, alpha in ((-1, None), (1.5, None), ({"q": 2, "k": -1}, None), (2, 0),
                    (2, {"q": 1, "k": -1})):
    with pytest.raises(ValueError, match="LoRA: (rank|alpha)="):
        LoRAFusedLinear(linear, rank, alpha, slices=slices)
with pytest.raises(ValueError, match="dropout"):
    LoRAFusedLinear(linear, 2, slices=slices, dropout=1.0)
assert linear.weight.requires_grad
for made in (lambda: per_group(6, 4, 2), lambda: per_group(6, 0, 2), lambda: model_parallel(6, 2)):
    with pytest.raises(ValueError, match="heads in . (groups|blocks)"):
        made()
""")


@pytest.mark.slow
def test_compiled_it_switches_and_scales_without_compiling_again(plain_python):
    printed = plain_python("""
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from minipeft.layers import LoRAFusedLinear
from minipeft.layers.fused import per_head

torch.manual_seed(0)
layer = LoRAFusedLinear(nn.Linear(8, 12), {"q": 2, "v": 1}, slices=per_head(2, 2))
nn.init.normal_(layer.lora_b_q)
x, counter = torch.randn(3, 8), CompileCounterWithBackend("aot_eager")
compiled = torch.compile(layer, backend=counter, fullgraph=True)
for on, scale in ((True, 1.0), (False, 1.0), (True, 0.25)):
    layer.enabled, layer.scale = on, scale
    layer.zero_grad()
    y = compiled(x)
    y.square().sum().backward()
    grad = layer.lora_b_v.grad.clone()
    layer.zero_grad()
    expected = layer(x)
    # float32: compiled code may sum in another order; gradients are of squares
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    if on:
        expected.square().sum().backward()
        torch.testing.assert_close(grad, layer.lora_b_v.grad, rtol=1e-4, atol=1e-4)
print(counter.frame_count)
""")
    assert printed.split() == ["1"]


def test_inject_and_remove():
    model = nn.Sequential(nn.Linear(4, 13), nn.ReLU())
    weight = model[0].weight
    mp.inject(model, ["0"], lambda base: LoRAFusedLinear(base, 2, slices=SLICES))
    assert isinstance(model[0], LoRAFusedLinear)
    mp.remove(model)
    assert model[0].weight is weight


HEADS, DIM = 8, 4
SIZE = HEADS * DIM
TINY = {"vocab_size": 16, "hidden_size": SIZE, "num_hidden_layers": 1, "num_attention_heads": HEADS}


def model_of(kind):
    """A tiny random model, the name of its fused layer, and our rows."""
    import transformers as tf

    heads, tiny = per_head(HEADS, DIM), {**TINY, "attn_implementation": "eager"}
    third = blocks({"q": SIZE, "k": SIZE, "v": SIZE})
    falcon = {**tiny, "bias": False}
    made = {
        "BLOOM": lambda: (
            tf.BloomForCausalLM(tf.BloomConfig(vocab_size=16, hidden_size=SIZE, n_layer=1,
                                               n_head=HEADS)), heads),
        "Falcon-RW": lambda: (
            tf.FalconForCausalLM(tf.FalconConfig(**falcon, alibi=True, multi_query=False,
                                                 new_decoder_architecture=False)), heads),
        "Falcon-7B": lambda: (
            tf.FalconForCausalLM(tf.FalconConfig(**falcon, multi_query=True,
                                                 new_decoder_architecture=False)),
            per_group(HEADS, 1, DIM)),
        "Falcon-40B": lambda: (
            tf.FalconForCausalLM(tf.FalconConfig(**falcon, num_kv_heads=2,
                                                 new_decoder_architecture=True)),
            per_group(HEADS, 2, DIM)),
        "CodeGen": lambda: (
            tf.CodeGenForCausalLM(tf.CodeGenConfig(vocab_size=16, n_embd=SIZE, n_layer=1,
                                                   n_head=HEADS, rotary_dim=2, n_positions=16)),
            model_parallel(HEADS, DIM)),
        "GPT-NeoX": lambda: (
            tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**tiny, intermediate_size=16)), heads),
        "GPT-2": lambda: (
            tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=16, n_embd=SIZE, n_layer=1, n_head=HEADS,
                                             n_positions=16, attn_implementation="eager")), third),
        "MPT": lambda: (
            tf.MptForCausalLM(tf.MptConfig(vocab_size=16, d_model=SIZE, n_layers=1, n_heads=HEADS,
                                           max_seq_len=16)), third),
        "Phi-3": lambda: (
            tf.Phi3ForCausalLM(tf.Phi3Config(**tiny, num_key_value_heads=2, intermediate_size=16,
                                             pad_token_id=0)),
            blocks({"q": SIZE, "k": 2 * DIM, "v": 2 * DIM})),
    }  # fmt: skip
    model, rows = made[kind]()
    ends = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
    name = next(n for n, _ in model.named_modules() if n.endswith(ends))
    return model.eval(), name, rows


MODELS = [
    "BLOOM", "Falcon-RW", "Falcon-7B", "Falcon-40B", "CodeGen", "GPT-NeoX", "GPT-2", "MPT", "Phi-3"
]  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_the_rows_are_those_that_the_model_reads(kind):
    """The cache holds what the model takes for keys and values; of attention weights, the queries.

    With the rows of a slice and its bias at zero, that one must be zero and the others unchanged.
    """
    pytest.importorskip("transformers")
    model, name, rows = model_of(kind)
    layer, tokens = model.get_submodule(name), torch.tensor([[1, 2, 3]])

    def read():
        with torch.no_grad():
            found = model(tokens, use_cache=True)
        entry = found.past_key_values.layers[0]
        return {"k": entry.keys.clone(), "v": entry.values.clone(), "logits": found.logits}

    def rows_at_zero(numbers):
        with torch.no_grad():
            weight = layer.weight.T if hasattr(layer, "nf") else layer.weight
            weight[numbers] = 0
            if getattr(layer, "bias", None) is not None:
                layer.bias[numbers] = 0
        return read()

    before, state = read(), copy.deepcopy(model.state_dict())
    assert all((before[part] != 0).any() for part in "kv")
    for part in rows:
        after = rows_at_zero(rows[part])
        for cached in "kv":
            if cached == part:
                assert (after[cached] == 0).all()
            else:
                assert torch.equal(after[cached], before[cached])
        if part != "v":
            assert not torch.equal(after["logits"], before["logits"])
        model.load_state_dict(state)
    # the order of heads: one head's rows of a slice are what that head of the cache is made of
    for part in "kv":
        n_heads = len(rows[part]) // DIM
        for head in range(n_heads):
            after = rows_at_zero(rows[part][head * DIM : (head + 1) * DIM])
            shared = before[part].shape[1] // n_heads  # Falcon-40B's cache repeats them
            zero = (after[part] == 0).all(-1).all(-1)[0].nonzero().flatten().tolist()
            assert zero == list(range(head * shared, (head + 1) * shared))
            model.load_state_dict(state)


@pytest.mark.parametrize("kind", MODELS)
def test_query_rows_are_the_queries_of_their_heads(kind):
    """A head whose queries are zero attends by position alone, and the others as before."""
    pytest.importorskip("transformers")
    model, name, rows = model_of(kind)
    layer = model.get_submodule(name)

    def attentions(*tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens]), output_attentions=True).attentions[0][0]

    before, state = attentions(1, 2, 3), copy.deepcopy(model.state_dict())
    for head in range(HEADS):
        assert not torch.equal(before[head], attentions(4, 5, 6)[head])
        numbers = rows["q"][head * DIM : (head + 1) * DIM]
        with torch.no_grad():
            weight = layer.weight.T if hasattr(layer, "nf") else layer.weight
            weight[numbers] = 0
            if getattr(layer, "bias", None) is not None:
                layer.bias[numbers] = 0
        after = attentions(1, 2, 3)
        assert torch.equal(after[head], attentions(4, 5, 6)[head])
        others = [h for h in range(HEADS) if h != head]
        assert torch.equal(after[others], before[others])
        model.load_state_dict(state)
