"""Prompts at the input: against loops in float64, and PEFT's modules."""

import math
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minipeft as mp
from minipeft.layers.prompt import (
    PromptEmbedding,
    PromptEncoder,
    rows_from_tokens,
    rows_from_vocabulary,
)

MAKERS = {
    "embedding": lambda: PromptEmbedding(5, 12),
    "mlp": lambda: PromptEncoder(5, 12, hidden=7),
    "lstm": lambda: PromptEncoder(5, 12, hidden=7, kind="lstm"),
}
ENCODERS = [
    {"hidden": 7}, {"hidden": None}, {"kind": "lstm", "hidden": 7},
    {"kind": "lstm", "hidden": 5, "lstm_layers": 1},
    {"kind": "lstm", "hidden": 3, "lstm_layers": 3},
]  # fmt: skip


def slow_linear(rows, linear):
    """One output at a time, in float64."""
    weight, bias = linear.weight.double(), linear.bias.double()
    return [torch.stack([w @ row + b for w, b in zip(weight, bias, strict=True)]) for row in rows]


def slow_encoder(encoder):
    """The definition of the LSTM (input, forget, cell and output gate) and of the MLP."""
    rows = list(encoder.embedding.detach().double())
    if encoder.kind == "lstm":
        state = {n: p.detach().double() for n, p in encoder.lstm.named_parameters()}
        for layer in range(encoder.lstm.num_layers):
            ways = []
            for way in ("", "_reverse"):
                w_in, w_hidden, b_in, b_hidden = (
                    state[f"{n}_l{layer}{way}"]
                    for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                h = c = torch.zeros(encoder.hidden, dtype=torch.float64)
                out = []
                for row in reversed(rows) if way else rows:
                    i, f, g, o = (w_in @ row + b_in + w_hidden @ h + b_hidden).chunk(4)
                    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                    h = torch.sigmoid(o) * torch.tanh(c)
                    out.append(h)
                ways.append(out[::-1] if way else out)
            rows = [torch.cat(pair) for pair in zip(*ways, strict=True)]
    linears = [module for module in encoder.mlp if isinstance(module, nn.Linear)]
    for index, linear in enumerate(linears):
        rows = slow_linear(rows, linear)
        if index < len(linears) - 1:
            rows = [row.clamp(min=0) for row in rows]
    return torch.stack(rows).detach()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_prompt_that_is_off_has_length_0(make):
    prompt = make()
    on = prompt()
    prompt.enabled = False
    assert prompt().shape == (0, on.shape[1]) and "disabled" in repr(prompt)
    prompt.enabled = True
    assert torch.equal(prompt(), on)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_parameters_are_float32_whatever_the_default_dtype(make):
    torch.set_default_dtype(torch.float64)
    try:
        prompt = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in prompt.parameters()} == {torch.float32}
    assert prompt().dtype == torch.float32


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_whole_model_functions_see_a_prompt(make):
    model = nn.Sequential(nn.Linear(12, 12), make())
    mp.freeze(model)
    own = {f"1.{name}" for name, _ in model[1].named_parameters()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == own
    assert set(mp.adapter_state_dict(model)) == own
    with mp.disable_adapters(model):
        assert len(model[1]()) == 0
    assert len(model[1]()) > 0
    with pytest.raises(ValueError, match=r"cannot be scaled by 0\.5"):
        mp.scale_adapters(model, 0.5)
    other = nn.Sequential(nn.Linear(12, 12), make())
    mp.load_adapter_state_dict(other, mp.adapter_state_dict(model))
    assert torch.equal(other[1](), model[1]())


@pytest.mark.parametrize("make", [MAKERS[name] for name in ("embedding", "mlp", "lstm")])
def test_gradients_reach_every_parameter(make):
    prompt = make()
    prompt().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in prompt.parameters())


def test_the_table_starts_as_normal_numbers():
    table = PromptEmbedding(256, 512, init_std=0.5)().detach()
    # 131,072 draws: the standard error of the mean is 0.0014, of the deviation 0.001
    assert abs(float(table.mean())) < 0.007 and abs(float(table.std()) - 0.5) < 0.005


def test_load_table_copies():
    prompt, rows = PromptEmbedding(3, 4), torch.randn(3, 4, dtype=torch.float64)
    prompt.load_table(rows)
    assert torch.equal(prompt(), rows.float())
    rows.zero_()
    assert prompt().all() and prompt.table.requires_grad


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(4, 3), r"\(4, 3\); expected \(3, 4\)"),
        (torch.zeros(1, 4), r"expected \(3, 4\)"),
        (torch.full((3, 4), math.nan), "NaN or Inf"),
        (torch.full((3, 4), 1e300, dtype=torch.float64), "NaN or Inf"),  # Inf as float32
    ],
)
def test_a_bad_load_changes_nothing(rows, message):
    prompt = PromptEmbedding(3, 4)
    before = prompt().detach().clone()
    with pytest.raises(ValueError, match=message):
        prompt.load_table(rows)
    assert torch.equal(prompt(), before)


@given(vocabulary=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99))
def test_sampled_rows_are_different_rows_of_the_first_ids(vocabulary, data, seed):
    among = data.draw(st.none() | st.integers(1, vocabulary))
    length = data.draw(st.integers(1, among or vocabulary))
    weight = torch.arange(vocabulary, dtype=torch.bfloat16)[:, None].expand(-1, 3)
    rows, again = (
        rows_from_vocabulary(
            weight, length, generator=torch.Generator().manual_seed(seed), among=among
        )
        for _ in range(2)
    )
    assert rows.dtype == torch.float32 and rows.shape == (length, 3)
    ids = {int(row[0]) for row in rows}
    assert len(ids) == length and max(ids) < (among or vocabulary)
    assert torch.equal(rows, again)


def test_every_token_is_sampled_as_often_as_any():
    counts = torch.zeros(10)
    weight = torch.eye(10, requires_grad=True)
    for _ in range(3000):
        rows = rows_from_vocabulary(weight, 3)
        counts += rows.sum(0)
    assert not rows.requires_grad
    # 3,000 trials of 3 in 10: mean 900, deviation 25
    assert (counts - 900).abs().max() < 5 * 25


@given(ids=st.lists(st.integers(0, 8), min_size=1, max_size=12), length=st.integers(1, 30))
def test_rows_of_a_text_are_cut_or_repeated(ids, length):
    weight = torch.randn(9, 4, requires_grad=True)
    rows = rows_from_tokens(weight, ids, length)
    assert not rows.requires_grad and rows.shape == (length, 4)
    for position, row in enumerate(rows):
        assert torch.equal(row, weight[ids[position % len(ids)]])
    assert torch.equal(rows_from_tokens(weight, torch.tensor(ids), length), rows)
    rows.zero_()
    assert weight.all()  # a copy, also where the text is as long as the prompt


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: rows_from_vocabulary(w, 10), "prompt_length=10 of 9 tokens"),
        (lambda w: rows_from_vocabulary(w, 4, among=3), "prompt_length=4 of 3 tokens"),
        (lambda w: rows_from_vocabulary(w, 4, among=10), "among=10; the weight has 9 rows"),
        (lambda w: rows_from_vocabulary(w, 4, among=0), "among=0"),
        (lambda w: rows_from_vocabulary(w, 0), "prompt_length=0"),
        (lambda w: rows_from_vocabulary(w[0], 1), "floating-point weight"),
        (lambda w: rows_from_vocabulary(w.to(torch.uint8), 1), "floating-point weight"),
        (lambda w: rows_from_tokens(w.to(torch.uint8), [1], 1), "floating-point weight"),
        (lambda w: rows_from_tokens(w, [], 3), "at least one"),
        (lambda w: rows_from_tokens(w, torch.tensor([[1, 2]]), 3), "ids of one text"),
        (lambda w: rows_from_tokens(w, torch.tensor([1.0]), 3), "whole numbers"),
        (lambda w: rows_from_tokens(w, [3, 9], 3), "ids from 3 to 9; the weight has rows 0 to 8"),
        (lambda w: rows_from_tokens(w, [-1, 2], 3), "ids from -1"),
        (lambda w: rows_from_tokens(w, [1], 0), "prompt_length=0"),
    ],
)
def test_rows_that_cannot_be_taken(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(9, 4))


@pytest.mark.parametrize("keywords", ENCODERS, ids=str)
def test_the_encoder_equals_a_float64_loop(keywords):
    encoder = PromptEncoder(5, 9, **keywords)
    # float32 sums of at most 18 products of numbers near 1, four linear maps deep
    torch.testing.assert_close(encoder().double(), slow_encoder(encoder), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keywords", ENCODERS, ids=str)
def test_bake_keeps_the_rows_and_drops_the_network(keywords):
    encoder = PromptEncoder(5, 9, **keywords).eval()
    encoder.enabled = False
    baked = encoder.bake()
    assert not baked.training and not baked.enabled and list(baked.state_dict()) == ["table"]
    encoder.enabled = baked.enabled = True
    assert torch.equal(baked(), encoder()) and baked.table.requires_grad


def test_dropout_acts_while_training_only_and_not_on_what_is_baked():
    encoder = PromptEncoder(5, 9, kind="lstm", hidden=6, dropout=0.5)
    plain = PromptEncoder(5, 9, kind="lstm", hidden=6)
    plain.load_state_dict(encoder.state_dict())
    assert not torch.equal(encoder(), encoder())
    baked = encoder.bake()
    assert encoder.training and encoder.lstm.training and baked.training
    assert torch.equal(baked(), plain()) and torch.equal(encoder.eval()(), plain())


@pytest.mark.parametrize("make", [PromptEmbedding, PromptEncoder], ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 4), "prompt_length=0"), ((True, 4), "prompt_length=True"), ((3, -1), "embedding_dim=-1")],
)
def test_impossible_sizes(make, sizes, message):
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        make(*sizes)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"hidden": 0}, "hidden=0"),
        ({"kind": "gru"}, "kind='gru'; expected 'mlp' or 'lstm'"),
        ({"kind": "lstm", "dropout": 1.0}, "dropout=1.0"),
        ({"dropout": 0.1}, "expected kind='lstm'"),
        ({"kind": "lstm", "lstm_layers": 1, "dropout": 0.1}, "2 or more lstm_layers"),
        ({"kind": "lstm", "lstm_layers": 0}, "lstm_layers=0"),
        ({"lstm_layers": 3}, "lstm_layers=3 needs kind='lstm'"),
    ],
)
def test_impossible_settings_of_the_encoder(keywords, message):
    with pytest.raises(ValueError, match=message):
        PromptEncoder(3, 4, **keywords)


@pytest.mark.parametrize("init_std", [0, -1.0, math.inf, math.nan])
def test_an_impossible_deviation(init_std):
    with pytest.raises(ValueError, match="init_std"):
        PromptEmbedding(3, 4, init_std=init_std)


@pytest.mark.parametrize(("kind", "layers"), [("mlp", 2), ("lstm", 1), ("lstm", 2), ("lstm", 3)])
def test_weights_of_pefts_prompt_encoder_compute_the_same(kind, layers):
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=12, num_transformer_submodules=1,
        encoder_reparameterization_type=kind.upper(), encoder_hidden_size=7,
        encoder_num_layers=layers,
    )  # fmt: skip
    theirs = peft.PromptEncoder(config)
    ours = PromptEncoder(5, 12, hidden=7, kind=kind, lstm_layers=layers)
    names = {"embedding.weight": "embedding"}
    state = {
        names.get(n, n.replace("_head", "")): tensor for n, tensor in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    # the same float32 sums; a batch of one row of positions may be summed in another order
    torch.testing.assert_close(ours(), theirs(torch.arange(5)[None])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 3, 7, 8, 20])
def test_rows_of_a_text_are_pefts(n_tokens, monkeypatch):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ids = [(5 * i) % 30 for i in range(n_tokens)]
    monkeypatch.setattr(  # a tokenizer that needs no download
        transformers,
        "AutoTokenizer",
        types.SimpleNamespace(
            from_pretrained=lambda *a, **k: lambda text: {"input_ids": list(ids)}
        ),
    )
    words = nn.Embedding(30, 12)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=7, token_dim=12, num_transformer_submodules=1,
        prompt_tuning_init="TEXT", prompt_tuning_init_text="any", tokenizer_name_or_path="any",
    )  # fmt: skip
    theirs = peft.PromptEmbedding(config, words).embedding.weight
    assert torch.equal(rows_from_tokens(words.weight, ids, 7), theirs)
