"""LoRAEmbedding and the head that is tied to it: against float64, over dense and 4-bit tables."""

import copy
import pickle

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.layers import LoRAEmbedding, LoRATiedLinear, NF4Embedding

IDS = torch.tensor([[0, 3, 3], [12, 7, 0]])


def table(kind):
    dense = nn.Embedding(13, 64)
    if kind == "NF4":
        return NF4Embedding.from_embedding(dense)
    if kind == "bf16":
        return dense.bfloat16()
    if kind == "stacked":
        return trained(dense)
    return dense


def trained(base, rank=3, alpha=6, **arguments):
    layer = LoRAEmbedding(base, rank, alpha, **arguments)
    nn.init.normal_(layer.lora_a, std=0.3)
    return layer


# float32, sums of up to 64 products in another order, values up to 37: measured 6e-6
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
# through tanh and the head: logits up to 101, measured 2.3e-5; gradients up to 642, 6.1e-5
HEAD = {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.parametrize("kind", ["dense", "NF4", "stacked"])
def test_output_and_gradients_equal_a_float64_loop(kind):
    base = table(kind)
    layer = trained(base)
    grad = torch.randn(2, 3, 64)
    out = layer(IDS)
    out.backward(grad)
    a, b = layer.lora_a.detach().double(), layer.lora_b.detach().double()
    below = base(IDS).detach().double()
    expected = below.clone()
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(2):
        for j in range(3):
            token = int(IDS[i, j])
            expected[i, j] += 2 * b @ a[:, token]
            da[:, token] += 2 * b.T @ grad[i, j].double()
            db += 2 * torch.outer(grad[i, j].double(), a[:, token])
    torch.testing.assert_close(out.double(), expected, **ROUNDING)
    torch.testing.assert_close(layer.lora_a.grad.double(), da, **ROUNDING)
    torch.testing.assert_close(layer.lora_b.grad.double(), db, **ROUNDING)


@pytest.mark.parametrize("kind", ["dense", "NF4", "bf16", "stacked"])
def test_it_starts_at_the_base_and_switches_off_to_its_bits(kind):
    base = table(kind)
    layer = LoRAEmbedding(base, 3)
    assert torch.equal(layer(IDS), base(IDS))
    nn.init.normal_(layer.lora_a)
    assert not torch.equal(layer(IDS), base(IDS))
    layer.enabled = False
    assert torch.equal(layer(IDS), base(IDS))
    assert layer(IDS).dtype == base(IDS).dtype


@pytest.mark.parametrize("kind", ["dense", "NF4", "stacked"])
def test_merged_equals_unmerged_and_unmerging_leaves_every_bit(kind):
    layer = trained(table(kind)).eval()
    state = {n: t.clone() for n, t in layer.state_dict().items()}
    out = layer(IDS)
    layer.merge()
    torch.testing.assert_close(layer(IDS), out, **ROUNDING)
    plain = layer.merged()
    assert type(plain) is nn.Embedding
    torch.testing.assert_close(plain(IDS), out, **ROUNDING)
    layer.unmerge()
    assert torch.equal(layer(IDS), out)
    assert all(torch.equal(t, state[n]) for n, t in layer.state_dict().items())


def test_the_bf16_merged_table_is_the_rounded_float32_sum():
    layer = trained(table("bf16"))
    exact = layer.base.weight.float() + 2 * (layer.lora_b @ layer.lora_a).T
    assert torch.equal(layer.weight, exact.bfloat16())


def test_rows_of_padding_get_no_gradient():
    layer = trained(nn.Embedding(13, 64, padding_idx=3))
    layer(IDS).sum().backward()
    assert (layer.lora_a.grad[:, 3] == 0).all()
    assert layer.lora_a.grad[:, 12].abs().sum() > 0


def test_dropout_acts_while_training():
    layer = trained(nn.Embedding(13, 64), dropout=0.5)
    assert not torch.equal(layer(IDS), layer(IDS))
    layer.eval()
    assert torch.equal(layer(IDS), layer(IDS))


class Scaled(nn.Embedding):
    embed_scale = 4.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def test_a_table_that_scales_its_output_scales_the_branch():
    layer = trained(Scaled(13, 64)).eval()
    out = layer(IDS)
    torch.testing.assert_close(layer.merged()(IDS), out, **ROUNDING)
    torch.testing.assert_close(out, 4 * layer.weight[IDS], **ROUNDING)


def test_tables_that_cannot_be_wrapped():
    class Own(nn.Embedding):
        def forward(self, ids, offset):
            return super().forward(ids + offset)

    for base, message in (
        (Own(5, 4), "forward of its own"), (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (nn.Linear(4, 4), "no embedding"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            LoRAEmbedding(base, 2)
        assert next(base.parameters()).requires_grad
    with pytest.raises(ValueError, match="rank"):
        LoRAEmbedding(nn.Embedding(5, 4), 0)


def test_copies_and_compiling(plain_python):
    layer = trained(nn.Embedding(13, 64)).eval()
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(IDS), layer(IDS))
    plain_python("""
import torch, minipeft as mp
from torch import nn
layer = mp.layers.LoRAEmbedding(nn.Embedding(13, 8), 2)
nn.init.normal_(layer.lora_a)
ids, frames = torch.tensor([1, 4]), []
def count(graph, inputs):
    frames.append(1)
    return graph.forward
compiled = torch.compile(layer, backend=count, fullgraph=True)
for enabled, scale in ((True, 1.0), (False, 1.0), (True, 0.5)):
    layer.enabled, layer.scale = enabled, scale
    torch.testing.assert_close(compiled(ids), layer(ids))
assert len(frames) == 1
""")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(13, 64), nn.Linear(64, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def test_a_tied_head_follows_the_embedding():
    model = Tied()
    plain = model(IDS)
    mp.inject_lora(model, ["embed"], 3, 6)
    assert mp.tie_heads(model) == ["head"]
    assert torch.equal(model(IDS), plain)
    nn.init.normal_(model.embed.lora_a, std=0.3)
    table = model.embed.weight
    torch.testing.assert_close(model.head.weight, table, rtol=0, atol=0)
    expected = torch.tanh(table[IDS]) @ table.T
    torch.testing.assert_close(model(IDS), expected, **HEAD)
    model(IDS).sum().backward()
    both = model.embed.lora_a.grad.clone()
    expected.sum().backward()
    torch.testing.assert_close(both * 2, model.embed.lora_a.grad, **HEAD)
    assert set(mp.adapter_state_dict(model)) == {"embed.lora_a", "embed.lora_b"}
    again = copy.deepcopy(model)
    assert again.head.embedding is again.embed
    model.eval()
    mp.merge(model)
    torch.testing.assert_close(model(IDS), expected, **HEAD)
    mp.unmerge(model)
    with mp.disable_adapters(model):
        assert torch.equal(model(IDS), plain)
    with pytest.raises(ValueError, match="tied weights"):
        mp.remove(model, merge=True)
    mp.remove(model)
    assert model.head.weight is model.embed.weight and torch.equal(model(IDS), plain)


def test_only_tied_heads_are_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(13, 64), "head": nn.Linear(64, 13)})
    mp.inject_lora(model, ["embed"], 2)
    with pytest.raises(ValueError, match="no linear layer shares"):
        mp.tie_heads(model)
    with pytest.raises(ValueError, match="is not the embedding's"):
        LoRATiedLinear(model["head"], model["embed"])


def test_equal_to_peft():
    layers = pytest.importorskip("peft.tuners.lora.layer")
    from peft import LoraConfig

    base = nn.Embedding(13, 64)
    theirs = layers.Embedding(
        copy.deepcopy(base), "default", config=LoraConfig(r=3, lora_alpha=6), r=3, lora_alpha=6
    )
    ours = trained(base)
    with torch.no_grad():
        theirs.lora_embedding_A["default"].copy_(ours.lora_a)
        theirs.lora_embedding_B["default"].copy_(ours.lora_b)
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-6, atol=1e-6)  # the same products
