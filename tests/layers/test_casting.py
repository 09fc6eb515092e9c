"""Trained copies over 16-bit modules: float32 inside, and unnoticed by the model around them."""

import copy
import dataclasses
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minipeft as mp
from minipeft.layers.trained import TrainedModule
from minipeft.model.train import train_biases, train_modules, train_tokens

HALF = [torch.bfloat16, torch.float16]
# a base of bf16 rounds its products and results (2**-9), the copy its result alone: measured
# 8e-3, which is an ulp of 1 to 2
BF16 = {"rtol": 2**-6, "atol": 2**-6}


class RMSNorm(nn.Module):
    """As most language models have it: float32 inside, the weight in the model's dtype."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Wide(nn.Linear):
    """A head that gives float32 whatever it takes."""

    def forward(self, x):
        return super().forward(x).float()


@dataclasses.dataclass
class Output:
    logits: Tensor
    rest: dict[str, Tensor]
    note: str = "kept"


class Pair(NamedTuple):
    first: Tensor
    second: list[Tensor]


class Nested(nn.Linear):
    """Takes and gives tensors inside other things."""

    def forward(self, x, *, more):
        x = x + more["shift"][0]
        wide = super().forward(x)
        return Output(wide, {"pair": Pair(wide.float(), [wide, torch.tensor([1])])})


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(x.add_(1))


class LM(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.emb, self.norm, self.up = nn.Embedding(50, 32), RMSNorm(32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=not tied)
        if tied:
            self.head.weight = self.emb.weight

    def get_input_embeddings(self):
        return self.emb

    def forward(self, ids):
        x = self.emb(ids)
        return self.head(self.norm(x + F.gelu(self.up(x))))


def fall_in_loss(train, dtype, learning_rate, tied):
    """How far 40 steps of AdamW get, from the same weights in each dtype."""
    torch.manual_seed(0)
    model = LM(tied).bfloat16().to(dtype)
    ids, target = torch.randint(50, (2, 16, 8))
    train(model)
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=learning_rate)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(ids).float().flatten(0, 1), target.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0] - losses[-1]


# where little trains the forward's rounding would be most of so short a way: longer steps
WAYS = {
    "a head": (lambda m: train_modules(m, ["head"]), 1e-4, False),
    "a table and the head tied to it": (lambda m: train_modules(m, ["emb", "head"]), 1e-4, True),
    "a table": (lambda m: train_modules(m, ["emb"]), 1e-3, False),
    "a norm": (lambda m: train_modules(m, ["norm"]), 1e-3, False),
    "biases": (lambda m: train_biases(m, "all"), 1e-3, False),
    "tokens": (lambda m: train_tokens(m, range(25)), 1e-3, False),
    "LoRA": (lambda m: mp.inject_lora(m, ["up", "head"], 4), 1e-3, False),
    "DoRA": (lambda m: mp.inject_lora(m, ["up", "head"], 4, dora=True), 1e-3, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_training_over_16_bits_gets_as_far_as_over_32(way, capsys):
    train, learning_rate, tied = WAYS[way]
    falls = {d: fall_in_loss(train, d, learning_rate, tied) for d in (torch.float32, *HALF)}
    with capsys.disabled():
        print(f"\n{way}: loss falls by", {str(d)[6:]: round(f, 4) for d, f in falls.items()})
    for dtype in HALF:
        # roundings of the forward to 16 bits, over 40 steps: measured 1.2 % at most
        assert falls[dtype] == pytest.approx(falls[torch.float32], rel=0.05)


@pytest.mark.parametrize("dtype", HALF)
def test_every_adapter_trains_in_float32(dtype):
    model = LM().to(dtype)
    mp.inject_lora(model, ["up"], 2, dora=True)
    mp.inject_lora(model, ["emb", "head"], 2, name="more")
    train_biases(model)
    train_modules(model, ["norm"])
    assert {p.dtype for p in mp.adapter_parameters(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    prefix = mp.PrefixEncoder([(1, 4, 4)], 2)
    assert {p.dtype for p in prefix.parameters()} == {torch.float32}


BASES = {
    "linear": (lambda: nn.Linear(8, 4), lambda: torch.randn(2, 8)),
    "embedding": (lambda: nn.Embedding(9, 4), lambda: torch.tensor([[1, 8], [0, 1]])),
    "RMSNorm": (lambda: RMSNorm(8), lambda: torch.randn(2, 8)),
    "LayerNorm": (lambda: nn.LayerNorm(8), lambda: torch.randn(2, 8)),
    "convolution": (lambda: nn.Conv1d(8, 4, 1), lambda: torch.randn(2, 8, 3)),
    "LSTM": (lambda: nn.LSTM(8, 4), lambda: torch.randn(2, 3, 8)),
    "float32 head": (lambda: Wide(8, 4), lambda: torch.randn(2, 8)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True),
                  lambda: torch.randn(2, 3, 8)),
}  # fmt: skip


def tensors(out):
    return [out] if isinstance(out, Tensor) else [t for part in out for t in tensors(part)]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("narrow", [True, False], ids=["16-bit input", "float32 input"])
@pytest.mark.parametrize("kind", BASES)
def test_outputs_have_the_bases_dtypes_and_its_values(kind, narrow, autocast):
    make, make_input = BASES[kind]
    base, x = make().bfloat16(), make_input()
    x = x.bfloat16() if x.is_floating_point() and narrow else x
    layer = TrainedModule(base)
    assert {p.dtype for p in layer.copy.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        try:
            expected = base(x)
            wide = make()(
                x.float() if x.is_floating_point() else x
            )  # no LSTM in all CPUs' bfloat16
        except (RuntimeError, ValueError) as error:
            pytest.skip(f"torch takes no such input: {error}")
        assert tensors(wide)
        for _ in range(2):
            found = layer(x)
            for mine, its in zip(tensors(found), tensors(expected), strict=True):
                assert mine.dtype == its.dtype
                torch.testing.assert_close(mine, its, **BF16)


def test_tensors_inside_other_things_are_cast_in_and_back():
    base = Nested(8, 4).bfloat16()
    x, more = torch.randn(2, 8).bfloat16(), {"shift": [torch.ones(8).bfloat16()], "n": 3}
    layer = TrainedModule(base)
    expected, found = base(x, more=more), layer(x, more=more)
    assert isinstance(found, Output) and found.note == "kept"
    pair = found.rest["pair"]
    assert isinstance(pair, Pair) and pair.second[1].dtype == torch.int64
    assert (found.logits.dtype, pair.first.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.logits, expected.logits, **BF16)


def test_outputs_of_transformers_models_are_cast():
    from minipeft.layers.casting import mapped

    outputs = pytest.importorskip("transformers.modeling_outputs")
    out = outputs.BaseModelOutputWithPooling(
        last_hidden_state=torch.ones(2), hidden_states=(torch.ones(1), torch.ones(1))
    )
    made = mapped(lambda t: t.bfloat16(), out)
    assert type(made) is type(out) and made["last_hidden_state"].dtype == torch.bfloat16
    assert [t.dtype for t in made.hidden_states] == [torch.bfloat16] * 2
    assert made.pooler_output is None and len(made) == 2
    ordered = mapped(lambda t: t.half(), OrderedDict(a=torch.ones(1), b=1))
    assert type(ordered) is OrderedDict and ordered["a"].dtype == torch.float16


def test_asking_the_base_changes_no_buffer_no_random_number_and_no_argument():
    base = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), InPlace()).bfloat16()
    layer = TrainedModule(base)
    before = copy.deepcopy(base.state_dict())
    x = torch.randn(16, 8).bfloat16()
    torch.manual_seed(3)
    with torch.random.fork_rng():
        wide = copy.deepcopy(layer.copy)(x.float()).bfloat16()
    kept = x.clone()
    assert torch.equal(layer(x), wide)  # the same numbers are dropped
    assert torch.equal(x, kept)
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_another_dtype_can_be_asked_for(dtype):
    for base in (nn.Linear(8, 4), nn.Linear(8, 4).bfloat16(), nn.Linear(8, 4).double()):
        layer = TrainedModule(base, dtype=dtype)
        x = torch.randn(2, 8, dtype=base.weight.dtype)
        assert layer.copy.weight.dtype == dtype
        assert layer(x).dtype == base.weight.dtype == layer.weight.dtype == layer.bias.dtype
        torch.testing.assert_close(layer(x), base(x), **BF16)
    model = LM().bfloat16()
    train_modules(model, ["head"], dtype=torch.bfloat16)
    assert model.head.copy.weight.dtype == torch.bfloat16


def test_a_wide_base_is_copied_as_it_is():
    for dtype in (torch.float32, torch.float64):
        base = nn.Linear(8, 4, dtype=dtype)
        layer = TrainedModule(base)
        x = torch.randn(2, 8, dtype=dtype)
        assert layer.copy.weight.dtype == dtype
        assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tied", [False, True])
def test_merged_and_folded_modules_are_rounded_once_to_the_bases_dtype(tied, dtype):
    model = LM(tied).to(dtype)
    train_modules(model, ["emb", "head"])
    with torch.no_grad():
        for p in mp.adapter_parameters(model):
            p.add_(torch.randn_like(p))
    expected = model.head.copy.weight.detach().to(dtype)
    assert torch.equal(model.head.weight, expected)
    ids = torch.randint(50, (2, 3))
    wide = model.eval()(ids)
    mp.merge(model)
    assert torch.equal(model.head.merged_module.weight, expected)
    merged = model(ids)
    mp.unmerge(model)
    mp.remove(model, merge=True)
    assert type(model.head) is nn.Linear
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.head.weight, expected)
    assert not tied or model.head.weight is model.emb.weight
    assert torch.equal(model(ids), merged)
    # |logits| of about 30, of which an ulp of bf16 is 2**-3, from rounded weights: measured 0.25
    torch.testing.assert_close(merged, wide, rtol=2**-5, atol=2**-3)


def train(model, optimizer, steps):
    ids, target = torch.randint(50, (2, 4, 8), generator=torch.Generator().manual_seed(5))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(ids).float().flatten(0, 1), target.flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", HALF)
def test_training_goes_on_exactly_after_saving_and_loading(dtype, tmp_path):
    def make():
        torch.manual_seed(0)
        return LM().to(dtype)

    model = make()
    train_modules(model, ["head", "norm"])
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=1e-3)
    train(model, optimizer, 3)
    mp.save_peft(model, tmp_path)
    again = make()
    mp.load_peft(again, tmp_path)
    optimizer_again = torch.optim.AdamW(mp.adapter_parameters(again), lr=1e-3)
    optimizer_again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3)
    train(again, optimizer_again, 3)
    state = mp.adapter_state_dict(again)
    for name, value in mp.adapter_state_dict(model).items():
        assert value.dtype == torch.float32
        assert torch.equal(state[name], value)


def test_peft_loads_the_file_over_a_16_bit_base(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = LM().bfloat16()
    plain = copy.deepcopy(model)
    mp.inject_lora(model, ["up"], 2)
    train_modules(model, ["head"])
    train(model, torch.optim.AdamW(mp.adapter_parameters(model), lr=1e-2), 3)
    mp.save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    ids = torch.randint(50, (2, 3))
    with torch.no_grad():  # casts to bf16 in other places, |logits| to 2: measured 8e-3
        torch.testing.assert_close(theirs(ids).float(), model(ids).float(), rtol=2**-5, atol=2**-5)


def test_casts_of_the_model_and_copies_of_it_keep_working():
    model = LM()
    train_modules(model, ["head"])
    ids = torch.randint(50, (2, 3))
    assert model(ids).dtype == torch.float32
    half = copy.deepcopy(model).bfloat16()  # the copy too: the caller casts what trains
    assert half(ids).dtype == half.head.copy.weight.dtype == torch.bfloat16
    assert half.float()(ids).dtype == torch.float32


COMPILED = """
import torch
from torch import nn
import minipeft as mp
from torch._dynamo.testing import CompileCounterWithBackend
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).bfloat16()
mp.train_modules(model, ["1", "2"])
base = {n: b.clone() for n, b in model[1].base.named_buffers()}
counter = CompileCounterWithBackend("aot_eager")
compiled = torch.compile(model, backend=counter, fullgraph=True)
for _ in range(3):
    x = torch.randn(5, 8).bfloat16()
    state = {n: b.clone() for n, b in model.named_buffers()}
    y = compiled(x)
    y.float().sum().backward()
    for n, b in model.named_buffers():
        b.copy_(state[n])
    # an ulp or two of bf16: compiled code may round in another order
    torch.testing.assert_close(y, model(x), rtol=2**-6, atol=2**-6)
    assert y.dtype == torch.bfloat16
assert all(torch.equal(base[n], b) for n, b in model[1].base.named_buffers())
print(counter.frame_count)
"""


@pytest.mark.slow
def test_a_copy_compiles_whole_and_once(plain_python):
    assert plain_python(COMPILED).strip() == "1"


class Remembering(nn.Module):
    """A module that appends to what it is given, as attention does to a cache."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x, kept, cache=None):
        y = self.proj(x)
        kept.append(y)
        if cache is not None:
            cache.keys = torch.cat([cache.keys, y]) if cache.keys is not None else y
        return y + sum(kept)


class Cache:
    keys = None


@pytest.mark.parametrize("first", [[], [torch.ones(2, 4).bfloat16()]], ids=["empty", "filled"])
def test_what_a_call_appends_to_its_arguments_is_there_once(first):
    plain = Remembering().bfloat16()
    layer, kept, cache = TrainedModule(plain), list(first), Cache()
    x = torch.randn(2, 4).bfloat16()
    for count in (1, 2, 3):
        out = layer(x, kept, cache)
        assert len(kept) == len(first) + count
        assert len(cache.keys) == 2 * count
        assert out.dtype == torch.bfloat16
    assert all(kept[i] is first[i] for i in range(len(first)))


def test_a_decoder_whose_attention_trains_fills_its_cache_once():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().bfloat16()
    mp.train_modules(model, ["model.layers.0.self_attn"])
    ids = torch.randint(3, 60, (1, 6))
    cache = transformers.DynamicCache(config=config)
    model(ids, past_key_values=cache)
    assert [cache.get_seq_length(i) for i in (0, 1)] == [6, 6]
    tokens = model.generate(
        ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert tokens.shape == (1, 10)
