"""Rows of a batch over every kind of layer: each row as if it were alone."""

import copy
import json

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.adapters.names import named
from minipeft.adapters.protocol import innermost
from minipeft.adapters.wrapper import Wrapper
from minipeft.layers.conv import LoRAConv
from minipeft.layers.dora import DoRAConv
from minipeft.layers.trained import TrainedModule
from minipeft.lora import LowRank
from minipeft.model.rows import RowStack
from minipeft.model.rows.stack import why_not
from tests.row_kinds import (
    IDS,
    KINDS,
    by_hand,
    embedding,
    linear,
    on_a_convolution,
    randomize,
    three,
)

ROWS = ["fr", None, "default", ["fr", "de"], "de", None]
OTHERS = [None, "de", ["default", "fr"], "fr", None, "default"]


@pytest.fixture(autouse=True)
def _inference():
    """With gradients the layers themselves compute (test_training.py)."""
    with torch.no_grad():
        yield


def alone(model, x, row):
    """What one row computes while nothing differs by row."""
    if row is None:
        with mp.disable_adapters(model):
            return model(x)
    mp.use_adapters(model, row)
    return model(x)


def one_by_one(model, x, rows):
    model, each = copy.deepcopy(model), len(x) // len(rows)
    mp.use_adapters(model, "default")
    return torch.cat([alone(model, x[i * each :][:each], row) for i, row in enumerate(rows)])


def relative(y, expected):
    return ((y - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_computes_as_if_alone(kind, capsys):
    model, x = KINDS[kind]()
    with mp.disable_adapters(model):
        base = model(x)
    expected = one_by_one(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    y = model(x)
    with capsys.disabled():
        print(f"\n{kind}: a mixed batch against each row alone {relative(y, expected):.1e}")
    assert relative(y, expected) <= 1e-6  # float32; the same products, matrices of another size
    for row in (1, 5):
        assert torch.equal(y[row], base[row])  # no adapter: the base, bit for bit
    assert min(relative(y[row], base[row]) for row in (0, 2, 3)) > 1e-3  # the others do something
    beams = x.repeat_interleave(2, dim=0)
    # float32; the same products, matrices of another size
    assert relative(model(beams), expected.repeat_interleave(2, dim=0)) <= 1e-6
    expected = one_by_one(model, x, OTHERS)
    before = [*model.modules()]
    mp.use_adapters(model, rows=OTHERS)
    # the same
    assert relative(model(x), expected) <= 1e-6
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    with mp.disable_adapters(model):
        assert torch.equal(model(x), base)
    mp.use_adapters(model, rows=["fr"])  # one entry: for batches of any size
    for size in (1, 4):
        # the same
        assert relative(model(x[:size]), alone(copy.deepcopy(model), x[:size], "fr")) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_puts_the_very_stacks_back(kind):
    model, x = KINDS[kind]()
    mp.use_adapters(model, "fr")
    expected, modules, keys = model(x), [*model.modules()], list(model.state_dict())
    adapter = list(mp.adapter_state_dict(model, name="fr"))
    flags = [module.enabled for module in modules if isinstance(module, Wrapper)]
    mp.use_adapters(model, rows=ROWS)
    assert list(mp.adapter_state_dict(model, name="fr")) == adapter
    layers = [m for m in model.modules() if isinstance(m, Wrapper) and not m.nameless]
    assert [layer.enabled for layer in layers] == flags  # none was switched by looking
    mp.use_adapters(model, "fr")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["embedding", "convolution, 1", "linear, DoRA", "biases"])
def test_nan_in_one_adapter_stays_in_its_rows(kind):
    """Of the gradient too."""
    model, x = KINDS[kind]()
    expected = one_by_one(model, x, ROWS)
    with torch.no_grad():
        for parameter in mp.adapter_parameters(model, name="de"):
            parameter.fill_(torch.nan)
    mp.use_adapters(model, rows=ROWS)
    x = x.requires_grad_() if x.is_floating_point() else x
    y = model(x)
    assert relative(y[:3], expected[:3]) <= 1e-6  # float32; matrices of another size
    assert not y[3:5].isfinite().all()
    if x.requires_grad:
        with torch.enable_grad():
            model(x).sum().backward()
        assert x.grad[:3].isfinite().all()


@pytest.mark.parametrize("rows", [[["fr", "de"], "de"], ["de", ["fr", "de"]], ["de"]], ids=str)
@pytest.mark.parametrize("dora", [True, False], ids=["stacks", "banks"])
def test_a_call_that_fails_half_way_leaves_the_rows_that_were_served(dora, rows, monkeypatch):
    """As memory runs out at the second layer, when values of the first are there."""
    model = three(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ("0", "1"), dora=dora).eval()
    x = torch.randn(2, 8)
    mp.use_adapters(model, rows=["fr", ["fr", "de"]])
    expected, kind = model(x), type(model[0])
    original, calls = kind.copies, []

    def full(*given):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("full")
        return original(*given)

    monkeypatch.setattr(kind, "copies", full)
    mp.scale_adapters(model, 0.5, name="de")
    with pytest.raises(torch.OutOfMemoryError):
        mp.use_adapters(model, rows=rows)
    assert len(calls) == 2
    assert torch.equal(model(x), expected)


def test_magnitudes_and_scales_are_those_at_the_call():
    model, x = linear(dora=True)
    mp.use_adapters(model, rows=ROWS)
    randomize(model)
    mp.scale_adapters(model, 0.3, name="fr")
    expected = one_by_one(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    assert relative(model(x), expected) <= 1e-6  # float32; matrices of another size
    mp.scale_adapters(model, 0.0, name="fr")  # DoRA at scale 0 is off
    expected = one_by_one(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    # the same
    assert relative(model(x), expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["embedding", "convolution, 1", "linear, DoRA"])
def test_other_dtypes(kind, dtype):
    model, x = KINDS[kind]()
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    with mp.disable_adapters(model):
        base = model(x)
    expected = one_by_one(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    y = model(x)
    assert y.dtype == expected.dtype == dtype
    assert torch.equal(y[1], base[1])
    # some roundings to 8 bits of products and sums; float64: magnitudes are float32 at the start
    bound = 2.0**-5 if dtype == torch.bfloat16 else 1e-6
    assert relative(y, expected) <= bound


def test_what_all_rows_share_is_refused_by_its_shape():
    model, _ = embedding()
    mp.use_adapters(model, rows=["fr", None, "de"])
    for wrong in (IDS[0], IDS[:4], IDS[0][:3]):  # (tokens,): positions, say
        with pytest.raises(ValueError, match="for 3 rows"):
            model(wrong)
    conv, x = on_a_convolution(1)()
    mp.use_adapters(conv, rows=["fr", None, "de"])
    with pytest.raises(ValueError, match=r"shape \(6, 9\) for 3 rows"):
        conv(x[0])  # six channels, no batch
    mp.use_adapters(conv, rows=["fr"])
    # the same
    assert relative(conv(x[0]), alone(copy.deepcopy(conv), x[0], "fr")) <= 1e-6
    mp.use_adapters(model, rows=["fr"])
    # the same
    assert relative(model(IDS[0]), alone(copy.deepcopy(model), IDS[0], "fr")) <= 1e-6


def test_tables_of_positions_are_refused_by_name():
    """transformers gives them ids of (1, tokens), or of (queries, keys)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    mp.inject_lora(model, ["wte", "wpe", "c_fc"], 2)
    mp.inject_lora(model, ["wte", "c_fc"], 2, name="fr")
    with pytest.raises(
        ValueError, match=r"'default' has LoRAEmbedding over 'transformer.wpe'.*pos"
    ):
        mp.use_adapters(model, rows=["default", None])
    mp.use_adapters(randomize(model), "fr")
    expected = one_by_one_hf(model, ["fr", None])
    mp.use_adapters(model, rows=["fr", None])
    assert relative(model(IDS[:2]).logits, expected) <= 1e-6  # float32; matrices of another size


def one_by_one_hf(model, rows):
    model = copy.deepcopy(model)
    return torch.cat([alone(model, IDS[i : i + 1], row).logits for i, row in enumerate(rows)])


def test_where_rows_are_lost_the_reason_is_named():
    model = nn.TransformerEncoderLayer(8, 2, 8).eval()
    mp.inject_lora(model, ["self_attn", "linear1"], 2)
    modules = [*model.modules()]
    with pytest.raises(ValueError, match=r"LoRAMultiheadAttention over 'self_attn': .*one call"):
        mp.use_adapters(model, rows=["default"])

    mixture = nn.ModuleDict({"up": mp.layers.LoRAExperts(nn.Parameter(torch.randn(2, 3, 4)), 2)})
    with pytest.raises(ValueError, match=r"LoRAExperts over 'up': .*sorted by expert"):
        mp.use_adapters(mixture, rows=["default"])
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


class Shift(Wrapper):
    """A layer of one's own that says nothing of rows."""

    def __init__(self, base):
        super().__init__(base)
        self.shift = nn.Parameter(torch.randn(base.out_features))
        self.take_over()

    def forward(self, x):
        return self.base(x) + (self.shift * self.full_strength if self.enabled else 0.0)


class ByRows(Shift):
    def on_top(self, out, x, strength):
        return out + self.shift * strength


class Twice(mp.LoRALinear):
    """Inherits `on_top`, which does not agree with its forward."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_of_ones_own_joins_with_one_method():
    def make(kind):
        return by_hand(nn.Sequential(nn.Linear(8, 5)), lambda base, rank: kind(base))

    with pytest.raises(ValueError, match="Shift has no method on_top"):
        mp.use_adapters(make(Shift), rows=ROWS)
    model, x = make(ByRows), torch.randn(6, 8)
    expected = one_by_one(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    assert relative(model(x), expected) <= 1e-6  # float32; matrices of another size
    twice = nn.Sequential(Twice(nn.Linear(8, 5), 2))
    with pytest.raises(ValueError, match="a forward of its own"):
        mp.use_adapters(twice, rows=["default"])
    twice[0].enabled = False
    mp.inject_lora(twice, ["0"], 2, name="fr")  # while it is off, others are served
    mp.use_adapters(randomize(twice), rows=["fr", None])
    assert torch.equal(twice(x[:2])[1], innermost(twice[0])(x[:2])[1])


def test_every_layer_of_the_library_is_served_or_says_why():
    def below(kind):
        return [kind, *(k for sub in kind.__subclasses__() for k in below(sub))]

    kinds = {kind for kind in below(Wrapper) if kind.__module__.startswith("minipeft.")}
    abstract = {"Wrapper", "LowRank", "ByRow", "LoRABank", "RowStack", "_Longer"}
    refused = {k.__name__ for k in kinds if why_not(k.__new__(k)) is not None} - abstract
    assert refused == {"LoRAExperts", "LoRAMultiheadAttention", "LongerTable", "LongerHead"}
    assert issubclass(LoRAConv, LowRank)


def test_modules_with_several_results_are_refused_in_forward():
    model = nn.ModuleDict({"rnn": nn.GRU(4, 4), "up": nn.Linear(4, 4)}).eval()
    mp.train_modules(model, ["rnn"])
    assert isinstance(model["rnn"], TrainedModule)
    mp.use_adapters(model, rows=["default", None])
    with pytest.raises(TypeError, match="GRU takes or returns more than one tensor"):
        model["rnn"](torch.randn(2, 3, 4))


def test_merging_and_more_adapters_are_refused_while_rows_differ():
    model, x = KINDS["convolution, DoRA"]()
    mp.use_adapters(model, rows=ROWS)
    served = model(x)
    for call in (
        lambda: mp.merge(model), lambda: mp.remove(model), lambda: mp.train_biases(model),
        lambda: mp.inject_lora(model, ["0"], 2, name="it"),
        lambda: mp.combine_adapters(model, ["fr"], [1.0], new_name="it"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="rows of a batch use different adapters"):
            call()
    assert torch.equal(model(x), served)
    assert model[0].weight.is_meta
    assert model[0].weight.shape == innermost(model[0]).weight.shape


def test_the_base_runs_once_and_with_its_hooks():
    model, x = KINDS["embedding, DoRA"]()
    calls = []
    innermost(model[0]).register_forward_hook(lambda *_: calls.append(1))
    mp.use_adapters(model, rows=ROWS)
    model(x)
    assert calls == [1]


def test_a_copy_has_rows_of_its_own():
    model, x = KINDS["LoRA and DoRA"]()
    mp.use_adapters(model, rows=ROWS)
    expected, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    mp.use_adapters(twin, rows=[None] * 6)
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)


def test_rows_set_in_inference_mode_can_be_changed_outside():
    model, x = KINDS["LoRA and DoRA"]()
    with torch.inference_mode():
        mp.use_adapters(model, rows=OTHERS)
    expected = one_by_one(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    assert relative(model(x), expected) <= 1e-6  # float32; matrices of another size


def test_a_shared_module_has_one_stack():
    model = nn.ModuleDict({"a": nn.Embedding(8, 8)}).eval()
    model["b"] = model["a"]
    mp.inject_lora(model, ["a", "b"], 2)
    mp.use_adapters(model, rows=["default", None])
    assert isinstance(model["a"], RowStack)
    assert model["a"] is model["b"]
    mp.use_adapters(model, rows=[None])  # another number of rows: new ones
    assert model["a"] is model["b"]
    mp.use_adapters(model, "default")
    assert model["a"] is model["b"]
    assert isinstance(model["a"], mp.layers.LoRAEmbedding)


@pytest.mark.parametrize(
    "kind", ["embedding", "embedding, NF4", "convolution, 1", "convolution, 3, strided"]
)
def test_rows_agree_with_peft(kind, capsys):
    """Of convolutions that PEFT computes right: it drops dilation and padding modes."""
    peft = pytest.importorskip("peft")
    model, x = KINDS[kind]()
    plain = nn.Sequential(*(innermost(copy.deepcopy(module)) for module in model))
    if kind == "embedding, NF4":  # PEFT has no such table: over the decoded one
        plain[0] = innermost(model[0]).dense()
    theirs = None
    with torch.no_grad():
        for name, rank, alpha in (("default", 4, 4), ("fr", 8, 24), ("de", 2, 5)):
            config = peft.LoraConfig(target_modules=["0"], r=rank, lora_alpha=alpha)
            if theirs is None:
                theirs = peft.get_peft_model(plain, config)
            else:
                theirs.add_adapter(name, config)
            (ours,), layer = named(model)[name]["0"], theirs.base_model.model[0]
            if x.is_floating_point():
                layer.lora_A[name].weight.copy_(ours.lora_a)
                layer.lora_B[name].weight.copy_(ours.lora_b)
            else:
                layer.lora_embedding_A[name].copy_(ours.lora_a)
                layer.lora_embedding_B[name].copy_(ours.lora_b)
    rows = ["fr", None, "default", "de", "de", None]
    mp.use_adapters(model, rows=rows)
    expected = theirs.eval()(x, adapter_names=[row or "__base__" for row in rows])
    difference = relative(model(x), expected)
    with capsys.disabled():
        print(f"\n{kind}: a mixed batch against PEFT's {difference:.1e}")
    assert difference <= 1e-6  # the same products in another order


COMPILED = """
import json
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
import minipeft as mp

graphs, worst, aot = 0, 0.0, lookup_backend("aot_eager")

def counting(graph, inputs):
    global graphs
    graphs += 1
    return aot(graph, inputs)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up = nn.Embedding(40, 16), nn.Linear(16, 7)
        self.conv, self.head = nn.Conv1d(5, 4, 3, padding=1), nn.Linear(7, 3)

    def forward(self, ids):
        return self.head(self.conv(self.up(self.table(ids))).relu())

torch.manual_seed(0)
model, ids = Model(), torch.arange(30).view(6, 5)
mp.inject_lora(model, ["table", "conv", "up"], 4)
mp.inject_lora(model, ["table", "conv", "up"], 2, 7, name="fr", dora=True)
mp.inject_lora(model, ["up"], 3, name="de")
mp.train_modules(model, ["head"], name="de")
for parameter in mp.adapter_parameters(model):
    with torch.no_grad():
        parameter += 0.2 * torch.randn_like(parameter)
compiled, counts = torch.compile(model.eval(), backend=counting, fullgraph=True), {}

def step(what):
    global worst
    before = graphs
    with torch.no_grad():
        y, expected = compiled(ids), model(ids)
    worst = max(worst, ((y - expected).abs().max() / expected.abs().max()).item())
    counts[what] = graphs - before

mp.use_adapters(model, rows=["fr", None, "default"]); step("first")
mp.use_adapters(model, rows=["default", "fr", ["fr", "default"]]); step("other rows")
mp.use_adapters(model, rows=["de", ["de", "fr"], None]); step("rows of a third")
with mp.disable_adapters(model): step("disabled")
mp.scale_adapters(model, 0.3, name="default")
mp.use_adapters(model, rows=[None, "default", None]); step("scale one")
mp.use_adapters(model, rows=[None, None, None]); step("none")
print(json.dumps([counts, worst]))
"""


@pytest.mark.slow
def test_other_rows_compile_nothing_again(plain_python, capsys):
    counts, worst = json.loads(plain_python(COMPILED))
    with capsys.disabled():
        print(f"\ngraphs, rows over every kind: {counts}, compiled against eager {worst:.1e}")
    assert counts.pop("first") == 1
    assert set(counts.values()) == {0}
    assert worst <= 1e-6  # float32; matrices of another size


def test_dora_over_adapters_has_the_lengths_of_each_row():
    """The norms depend on what lies below, which differs by row: against the formula."""
    base, x = nn.Linear(8, 5), torch.randn(3, 8)
    model = nn.Sequential(base)
    mp.inject_lora(model, ["0"], 2)
    mp.inject_lora(model, ["0"], 2, dora=True, name="dora")
    randomize(model)
    dora, lora = model[0], model[0].base
    rows = ["dora", ["default", "dora"], "default"]
    mp.use_adapters(model, rows=rows)
    for i, (y, row) in enumerate(zip(model(x), rows, strict=True)):
        weight = base.weight.double()
        if "default" in row:
            weight = weight + lora.delta().double()
        if "dora" in row:
            weight = weight + dora.lora_b.double() @ dora.lora_a.double()
            weight = weight * (dora.magnitude.double() / weight.norm(dim=1))[:, None]
        expected = weight @ x[i].double() + base.bias.double()
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)  # float32 sums


def test_kinds_are_what_they_say():
    for kind, make in KINDS.items():
        model, _ = make()
        mp.use_adapters(model, rows=ROWS)
        stacks = [m for m in model.modules() if isinstance(m, RowStack)]
        assert bool(stacks) == (kind != "fused"), kind
        if "DoRA, groups" in kind:
            assert isinstance(stacks[0].layers[0], DoRAConv)


def test_one_name_as_rows_says_what_rows_are():
    model = three(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match=r"rows='fr'; expected a list.* such as \['fr', None\]"):
        mp.use_adapters(model, rows="fr")
