"""Targets, injection, quantising a model: what is touched, what is not, and what is refused."""

import warnings

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import LoRALinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(x + self.v_proj(torch.relu(self.q_proj(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(64, 10)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def snapshot(model):
    """Everything that a failed call must leave as it was."""
    return (
        [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert all(torch.equal(after[2][name], value) for name, value in before[2].items())


TARGETS = {
    "expression": r"layers\.\d\.q_proj",
    "suffix": ["q_proj"],
    "full names": ["layers.0.q_proj", "layers.1.q_proj"],
    "predicate": lambda name, module: name.endswith("q_proj"),
    "tuple": ("q_proj",),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_every_kind_of_target(kind):
    model = Model()
    assert mp.inject_lora(model, TARGETS[kind], 2) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert isinstance(model.layers[1].q_proj, mp.LoRALinear)
    assert not isinstance(model.layers[1].v_proj, mp.LoRALinear)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"layers.{i}.q_proj.lora_{f}" for i in (0, 1) for f in "ab"}


def test_all_linear_and_exclude():
    model = Model()
    names = mp.inject_lora(model, "all-linear", 2, exclude=["head"])
    assert len(names) == 4
    assert names.left_out["head"] == "excluded"


BAD_TARGETS = {
    "no match": (r"nothing", "matches no module"),
    "plain word": ("q_proj", r"must match the whole name: use \['q_proj'\]"),
    "one of a list": (["q_proj", "k_proj"], r"\['k_proj'\] match no module"),
    "broken expression": ("(", "no regular expression"),
    "norm": (["norm"], "LayerNorm"),
    "container": (r"layers\.0", "Block"),
    "everything": (r".*", "holds layers to wrap: name"),
    "predicate": (lambda name, module: False, "matches no module"),
}


@pytest.mark.parametrize("inject", [mp.inject_lora, mp.inject_qlora])
@pytest.mark.parametrize("kind", BAD_TARGETS)
def test_a_bad_target_raises_and_changes_nothing(inject, kind):
    target, message = BAD_TARGETS[kind]
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject(model, target, 2, head="head")
    assert_untouched(model, before)


def test_an_error_in_the_middle_changes_nothing():
    model = Model()
    before = snapshot(model)
    calls = []

    def init(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise ValueError("no more")

    with pytest.raises(ValueError, match=r"layers\.1\.q_proj: no more"):
        mp.inject_lora(model, ["q_proj", "v_proj"], 2, init=init)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="rank"):
        mp.inject_lora(model, ["q_proj", "v_proj"], {"q_proj": 2, "v_proj": 0})
    assert_untouched(model, before)


def test_a_nan_in_the_last_layer_leaves_every_layer_dense():
    model = Model()
    model.head.weight.data[3, 2] = float("nan")
    before = snapshot(model)
    for call in (lambda: mp.quantize_model(model), lambda: mp.inject_qlora(model, ["q_proj"], 2)):
        with pytest.raises(ValueError, match=r"head: .*index \(3, 2\)"):
            call()
        assert snapshot(model)[:2] == before[:2]


def test_wrapping_twice_raises():
    model = Model()
    mp.inject_lora(model, ["q_proj"], 2)
    before = snapshot(model)
    for target in (["q_proj"], "all-linear", r"layers\.0\.[qv]_proj"):
        with pytest.raises(ValueError, match="already has an adapter"):
            mp.inject_lora(model, target, 2)
        assert_untouched(model, before)
    mp.inject_lora(model, ["v_proj"], 2)
    assert model.layers[0].q_proj.lora_a.requires_grad, "an earlier adapter stays trainable"


def test_patterns_for_rank_and_alpha():
    model = Model()
    mp.inject_lora(
        model, ["q_proj", "v_proj"], {"layers.0.q_proj": 8, ".*": 2}, {"q_proj": 4, ".*": 1}
    )
    ranks = {name: module.rank for name, module in model.named_modules() if hasattr(module, "rank")}
    assert ranks == {
        "layers.0.q_proj": 8, "layers.0.v_proj": 2, "layers.1.q_proj": 2, "layers.1.v_proj": 2
    }  # fmt: skip
    assert model.layers[1].q_proj.alpha == 4
    for rank, message in (({"q_proj": 2}, "no pattern"), ({".*": 2, "k_proj": 4}, "k_proj")):
        with pytest.raises(ValueError, match=message):
            mp.inject_lora(Model(), ["q_proj", "v_proj"], rank)


def test_a_shared_module_is_wrapped_once_under_every_name():
    model = Model()
    model.layers[1].q_proj = model.layers[0].q_proj
    names = mp.inject_lora(model, ["q_proj"], 2)
    assert names == ["layers.0.q_proj", "layers.1.q_proj"]
    assert model.layers[0].q_proj is model.layers[1].q_proj
    assert len(list(mp.adapter_parameters(model))) == 2
    mp.remove(model)
    assert type(model.layers[1].q_proj) is nn.Linear


def test_adapters_live_where_the_base_lives():
    with torch.device("meta"):
        model = Model()
    mp.inject_lora(model, ["q_proj"], 2)
    assert {p.device.type for p in mp.adapter_parameters(model)} == {"meta"}


def test_a_lone_layer_is_refused():
    with pytest.raises(ValueError, match="wrap it yourself"):
        mp.inject_lora(nn.Linear(4, 4), "all-linear", 2)
    with pytest.raises(ValueError, match="wrap it yourself"):
        mp.quantize_model(nn.Linear(4, 4))


def test_all_linear_takes_multi_head_attention_as_a_whole():
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ValueError, match="name the attention itself"):
        mp.inject_lora(layer, ["out_proj"], 2)
    names = mp.inject_lora(layer, "all-linear", 2)
    assert names == ["self_attn", "linear1", "linear2"]
    assert names.left_out == {}
    assert isinstance(layer.self_attn, mp.layers.LoRAMultiheadAttention)


def test_the_report_says_what_was_made_and_by_which_pattern():
    model = Model()
    names = mp.inject_lora(
        model, ["q_proj", "embed"], {"embed": 2, r".*1\.q_proj": 3, ".*": 4}, {"q_proj": 6, ".*": 8}
    )
    lines = dict(line.split(maxsplit=1) for line in names.report().splitlines())
    assert lines["embed"].startswith("LoRAEmbedding(rank=2, alpha=8")
    assert lines["embed"].endswith("rank 2 by 'embed', alpha 8 by '.*'")
    assert "rank=3" in lines["layers.1.q_proj"] and "rank=4" in lines["layers.0.q_proj"]
    names = mp.inject_lora(Model(), "all-linear", 2, exclude=["v_proj"])
    assert "layers.0.v_proj  left out: excluded" in names.report()


@pytest.mark.parametrize("quantized", [False, True])
def test_lora_counts_in_the_fast_path_of_transformer_encoder_layer(quantized, capsys):
    """train, eval and no-grad take different code paths in torch; eval reads `.weight`."""
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 64)
    base_out = layer(x)
    inject = mp.inject_qlora if quantized else mp.inject_lora
    inject(layer, ["linear1", "linear2"], 4)
    for name, parameter in mp.adapter_state_dict(layer).items():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    train = layer(x)
    layer.eval()
    evaluated = layer(x)
    with torch.no_grad():
        fast = layer(x)
    differences = [(other - train).abs().max().item() for other in (evaluated, fast)]
    with capsys.disabled():
        print(f"\nencoder layer, NF4={quantized}: eval, no_grad differ from train by {differences}")
    # float32 through one encoder layer, other kernels of torch
    assert max(differences) <= 1e-5
    assert (train - base_out).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_is_bypassed_in_that_fast_path():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True))
    config = peft.LoraConfig(r=4, target_modules=["linear1", "linear2"], init_lora_weights=False)
    wrapped = peft.inject_adapter_in_model(config, model)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, 64)
    train = wrapped(x)
    assert (wrapped.eval()(x) - train).abs().max() > 0.1


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class TiedModel(Model):
    _keep_in_fp32_modules = ("q_proj",)

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(64, 3)
        self.tied = nn.Linear(64, 10, bias=False)
        self.tied.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head


def test_what_quantize_model_leaves_dense():
    model = TiedModel()
    model.layers[0].own = own = OwnForward(64, 4)
    model.layers[1].nested = nn.Linear(64, 4)
    with pytest.warns(UserWarning, match=r"layers\.0\.own.*also="):
        names = mp.quantize_model(model, skip=["nested"])
    assert names == ["layers.0.v_proj", "layers.1.v_proj"]
    reasons = {
        "head": "output head",
        "classifier": "new head",
        "tied": "tied",
        "layers.0.q_proj": "float32",
        "layers.0.own": "forward of its own",
        "layers.1.nested": "skipped",
    }
    for name, reason in reasons.items():
        assert reason in names.left_out[name], name
    mp.quantize_model(model.layers[0], also=(type(own),), head=())
    assert isinstance(model.layers[0].own, mp.NF4Linear)
    assert mp.inject_lora(TiedModel(), ["q_proj"], 2, head="classifier"), (
        "LoRA wraps what NF4 leaves dense"
    )


def test_lora_wraps_a_subclass_with_its_own_forward():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(8, 8))
    x = torch.randn(2, 8)
    before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mp.inject_qlora(nn.Sequential(Doubling(8, 8), nn.Linear(8, 8)), ["0"], 2)
    mp.inject_lora(model, ["0"], 2)
    assert torch.equal(model(x), before)


def test_quantize_model_raises_if_there_is_nothing():
    with pytest.raises(ValueError, match="no layer to quantise"):
        mp.quantize_model(nn.Sequential(nn.ReLU()))
    model = Model()
    mp.quantize_model(model, head=())
    with pytest.raises(
        ValueError, match=r"quantize_model: the layers are 4-bit already .* call inj"
    ):
        mp.quantize_model(model, head=())
    with pytest.raises(ValueError, match=r"inject_qlora: the layers are 4-bit already .* call inj"):
        mp.inject_qlora(model, "all-linear", 2, head=())
    model = Model()
    names = mp.inject_lora(model, "all-linear", 2, head=())
    with pytest.raises(ValueError, match=rf"{names[0]} .* has an adapter.*quantise first"):
        mp.quantize_model(model, head=())
    with pytest.raises(ValueError, match="skip"):
        mp.quantize_model(Model(), skip=["nothing"])
    with pytest.raises(ValueError, match="block_size"):
        mp.quantize_model(Model(), block_size=33, head=())


def test_inject_qlora_quantises_all_it_may_and_wraps_the_targets():
    model = Model()
    names = mp.inject_qlora(model, ["q_proj"], 2, skip=["head"])
    assert names == ["layers.0.q_proj", "layers.1.q_proj"]
    assert isinstance(model.layers[0].q_proj.base, mp.NF4Linear)
    assert isinstance(model.layers[0].v_proj, mp.NF4Linear)
    assert type(model.head) is nn.Linear
    model(torch.tensor([[1, 2]])).sum().backward()
    assert all(p.grad is not None for p in mp.adapter_parameters(model))


class Shift(nn.Module):
    """A layer of the user's own: adds a trainable vector to what its base gives."""

    def __init__(self, base):
        super().__init__()
        self.base, self.shift = (
            base.requires_grad_(False),
            nn.Parameter(torch.zeros(base.out_features)),
        )
        self.enabled, self.scale = True, 1.0

    def adapter_parameters(self):
        return {"shift": self.shift}

    def forward(self, x):
        return self.base(x) + (self.scale * self.shift if self.enabled else 0)


def test_a_layer_of_the_users_own_joins():
    model = Model()
    assert mp.inject(model, ["q_proj"], Shift) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert set(mp.adapter_state_dict(model)) == {f"layers.{i}.q_proj.shift" for i in (0, 1)}
    assert mp.count_parameters(model).trainable == 128
    with torch.no_grad():
        for parameter in mp.adapter_parameters(model):
            parameter.fill_(1.0)
    ids = torch.tensor([[1]])
    shifted = model(ids)
    with mp.disable_adapters(model):
        # any difference that allclose's own tolerances see
        assert not torch.allclose(model(ids), shifted)
    mp.scale_adapters(model, 0.0)
    with mp.disable_adapters(model):
        off = model(ids)
    assert torch.equal(model(ids), off)
    with pytest.raises(TypeError, match="returned NoneType"):
        mp.inject(Model(), ["q_proj"], lambda module: None)
    with pytest.raises(ValueError, match="inside other targets"):
        mp.inject(Model(), lambda name, module: True, nn.Identity)


def hugging_face_models():
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)
    bert = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    return {
        "llama": lambda: transformers.LlamaForCausalLM(llama),
        "gpt2": lambda: transformers.GPT2LMHeadModel(gpt2),
        "bert": lambda: transformers.BertForSequenceClassification(bert),
    }


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT, on Conv1D
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_all_linear_trains_as_many_parameters_as_peft(kind):
    peft = pytest.importorskip("peft")
    make = hugging_face_models()[kind]
    ours = make()
    names = mp.inject_lora(ours, "all-linear", 4, head=None if kind != "bert" else "classifier")
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    theirs = peft.LoraModel(
        make(), peft.LoraConfig(r=4, target_modules="all-linear", task_type=task), "default"
    )
    expected = {
        n
        for n, m in theirs.model.named_modules()
        if isinstance(m, peft.tuners.lora.layer.LoraLayer)
    }
    assert set(names) == expected
    lora = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert mp.count_parameters(ours).trainable == lora


def two_names() -> nn.Module:
    """One layer under two names."""
    model = nn.Module()
    model.a = model.b = nn.Linear(4, 4)
    return model


def random_lora(model: nn.Module, target, rank: int = 2, **lora) -> nn.Module:
    def init(layer):
        nn.init.normal_(layer.lora_a)
        nn.init.normal_(layer.lora_b)

    mp.inject_lora(model, target, rank, init=init, **lora)
    return model


class Gated(nn.Linear):
    """A linear layer that holds another."""

    def __init__(self):
        super().__init__(8, 8)
        self.gate = nn.Linear(8, 8)

    def forward(self, x):
        return super().forward(x) * self.gate(x).sigmoid()


def test_wrappers_are_in_the_mode_of_what_they_wrap():
    model = random_lora(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), ["0"], dropout=0.5)
    x = torch.randn(2, 8)
    assert not model[0].training and torch.equal(model(x), model(x))
    mp.merge(model)
    model(x)
    mp.remove(model)
    mp.quantize_model(model)
    assert not model[0].training


def test_a_target_inside_another_is_refused_and_nothing_changes():
    model = nn.Sequential(Gated(), nn.ReLU())
    before = list(model.named_modules())
    for change in (
        lambda: mp.inject_lora(model, "all-linear", 2),
        lambda: mp.quantize_model(model, also=(Gated,)),
        lambda: mp.inject_qlora(model, "all-linear", 2, also=(Gated,)),
    ):
        with pytest.raises(ValueError, match=r"\['0\.gate'\] lie inside other targets"):
            change()
    assert list(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert mp.inject_lora(model, "all-linear", 2, exclude=["0.gate"]) == ["0"]


def test_a_shared_layer_is_wrapped_under_all_its_names():
    model = random_lora(two_names(), ["a"])
    assert model.a is model.b
    assert sorted(mp.base_state_dict(model)) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    x = torch.randn(1, 4)
    before = model.b(x)
    mp.remove(model, merge=True)
    assert model.a is model.b
    torch.testing.assert_close(model.b(x), before, rtol=1e-5, atol=1e-6)  # float32


def test_the_head_of_a_model_inside_another():
    class Language(nn.Module):
        _keep_in_fp32_modules = ("norm",)

        def __init__(self):
            super().__init__()
            self.norm, self.body, self.lm_head = (nn.Linear(64, 64) for _ in range(3))

        def get_output_embeddings(self):
            return self.lm_head

    model = nn.ModuleDict({"language": Language(), "projector": nn.Linear(64, 64)})
    assert mp.inject_qlora(model, "all-linear", 2) == [
        "language.norm", "language.body", "projector"
    ]  # fmt: skip
    assert type(model["language"].lm_head) is nn.Linear
    assert type(model["language"].norm.base) is nn.Linear


def test_small_things():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert mp.inject_qlora(model, (name for name in ["0"]), 2) == ["0"]
    with pytest.raises(ValueError, match="no regular expression"):
        mp.inject_lora(model, ["1"], {"[": 2})
    linear = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="never mind"):
        LoRALinear(linear, 2, init=lambda layer: (_ for _ in ()).throw(RuntimeError("never mind")))
    assert linear.weight.requires_grad
    with pytest.raises(ValueError, match="itself"):
        mp.save_peft(LoRALinear(linear, 2), "nowhere")
