"""The options that all LoRA layers share mean the same in each kind of layer."""

import copy
import typing

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import LoRALinear
from minipeft.layers import (
    DoRAConv,
    DoRAEmbedding,
    DoRALinear,
    LoRAConv,
    LoRAEmbedding,
    LoRAExperts,
    LoRAFusedLinear,
    LoRAMultiheadAttention,
)
from minipeft.lora import LowRank, Options


def fused(base, rank, alpha=None, **options):
    return LoRAFusedLinear(base, rank, alpha, slices={"q": 5, "v": 3}, **options)


KINDS = {
    LoRALinear: nn.Linear(4, 8), DoRALinear: nn.Linear(4, 8), LoRAConv: nn.Conv1d(4, 8, 3),
    DoRAConv: nn.Conv1d(4, 8, 3), LoRAEmbedding: nn.Embedding(9, 8),
    DoRAEmbedding: nn.Embedding(9, 8), LoRAExperts: nn.Parameter(torch.randn(2, 8, 4)),
    LoRAMultiheadAttention: nn.MultiheadAttention(8, 2), fused: nn.Linear(4, 8),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def made(kind, **options):
    return kind(copy.deepcopy(KINDS[kind]), 4, 6.0, **options)


def strength(layer):
    """alpha / rank, or alpha / sqrt(rank); slices of a fused layer have it one by one."""
    return set(layer.scalings.values()) if isinstance(layer, LoRAFusedLinear) else {layer.scaling}


@kinds
def test_defaults(kind):
    layer = made(kind)
    assert layer.dropout == 0
    assert strength(layer) == {6.0 / 4}
    assert {p.dtype for p in layer.adapter_parameters().values()} == {torch.float32}


@kinds
def test_every_option_reaches_the_layer(kind):
    seen = []
    layer = made(kind, dropout=0.5, rank_stabilized=True, dtype=torch.float64, init=seen.append)
    assert layer.dropout == 0.5
    assert strength(layer) == {6.0 / 2}
    assert {layer.lora_a.dtype} == {torch.float64}
    assert seen == [layer]


@kinds
@pytest.mark.parametrize(
    ("option", "words"),
    [({"dropout": 1.0}, "expected 0 <= dropout < 1"), ({"dtype": torch.int8}, "floating-point")],
)
def test_refusals_name_the_layer(kind, option, words):
    name = "LoRAFusedLinear" if kind is fused else kind.__name__
    with pytest.raises(ValueError, match=f"{name}: .*{words}"):
        made(kind, **option)


@kinds
def test_an_unknown_option_is_refused(kind):
    with pytest.raises(TypeError, match="drpout"):
        made(kind, drpout=0.1)


def test_the_options_are_the_keywords_of_low_rank_and_known_to_inject():
    own = typing.get_type_hints(LowRank.__init__).keys()
    assert Options.__annotations__.keys() <= own
    for word in Options.__annotations__:
        with pytest.raises(TypeError, match=word):
            mp.inject_lora(nn.Sequential(nn.Linear(2, 2)), ["0"], 1, unknown=1)
