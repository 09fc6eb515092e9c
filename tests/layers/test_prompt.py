"""Prompts at the input: against loops in float64, and PEFT's modules."""

import math

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.layers.prompt import PromptEmbedding, PromptEncoder

MAKERS = {
    "embedding": lambda: PromptEmbedding(5, 12),
    "mlp": lambda: PromptEncoder(5, 12, hidden=7),
}
ENCODERS = [{"hidden": 7}, {"hidden": None}]


def slow_linear(rows, linear):
    """One output at a time, in float64."""
    weight, bias = linear.weight.double(), linear.bias.double()
    return [torch.stack([w @ row + b for w, b in zip(weight, bias, strict=True)]) for row in rows]


def slow_encoder(encoder):
    """The definition of the MLP."""
    rows = list(encoder.embedding.detach().double())
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


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
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


@pytest.mark.parametrize("keywords", ENCODERS, ids=str)
def test_the_encoder_equals_a_float64_loop(keywords):
    encoder = PromptEncoder(5, 9, **keywords)
    # float32 sums of at most 9 products of numbers near 1, three linear maps deep
    torch.testing.assert_close(encoder().double(), slow_encoder(encoder), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keywords", ENCODERS, ids=str)
def test_bake_keeps_the_rows_and_drops_the_network(keywords):
    encoder = PromptEncoder(5, 9, **keywords).eval()
    encoder.enabled = False
    baked = encoder.bake()
    assert not baked.training and not baked.enabled and list(baked.state_dict()) == ["table"]
    encoder.enabled = baked.enabled = True
    assert torch.equal(baked(), encoder()) and baked.table.requires_grad


@pytest.mark.parametrize("make", [PromptEmbedding, PromptEncoder], ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 4), "prompt_length=0"), ((True, 4), "prompt_length=True"), ((3, -1), "embedding_dim=-1")],
)
def test_impossible_sizes(make, sizes, message):
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        make(*sizes)


def test_impossible_settings_of_the_encoder():
    with pytest.raises(ValueError, match="hidden=0"):
        PromptEncoder(3, 4, hidden=0)


@pytest.mark.parametrize("init_std", [0, -1.0, math.inf, math.nan])
def test_an_impossible_deviation(init_std):
    with pytest.raises(ValueError, match="init_std"):
        PromptEmbedding(3, 4, init_std=init_std)


def test_weights_of_pefts_prompt_encoder_compute_the_same():
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=12, num_transformer_submodules=1,
        encoder_reparameterization_type="MLP", encoder_hidden_size=7,
    )  # fmt: skip
    theirs = peft.PromptEncoder(config)
    ours = PromptEncoder(5, 12, hidden=7)
    names = {"embedding.weight": "embedding"}
    state = {
        names.get(n, n.replace("_head", "")): tensor for n, tensor in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    # the same float32 sums; a batch of one row of positions may be summed in another order
    torch.testing.assert_close(ours(), theirs(torch.arange(5)[None])[0], rtol=1e-5, atol=1e-6)
