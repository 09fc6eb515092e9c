"""What a target names, which layer is the output head, and that nothing is missing in silence."""

import warnings

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.adapters.targets import HeadWarning, likely_head, survey


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Own(nn.Module):
    """A model of somebody's own: it has no get_output_embeddings."""

    def __init__(self, blocks=2, outputs=40, first=False):
        super().__init__()
        if first:
            self.output = nn.Linear(64, outputs)
        self.tokens = nn.Embedding(40, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        if not first:
            self.output = nn.Linear(64, outputs)


INSIDE = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("qkv", "out", "up", "down")]


@pytest.mark.parametrize("head", ["output", ["output"], "module", ["module"]])
@pytest.mark.parametrize("call", ["inject", "inject_lora", "inject_qlora", "quantize", "add"])
def test_head_names_what_is_left_out(call, head):
    model = Own()
    if "module" in head:
        head = model.output if head == "module" else [model.output]
    if call == "inject":
        names = mp.inject(model, "all-linear", lambda base: mp.LoRALinear(base, 2), head=head)
    elif call == "inject_lora":
        names = mp.inject_lora(model, "all-linear", 2, head=head)
    elif call == "inject_qlora":
        names = mp.inject_qlora(model, "all-linear", 2, head=head)
    elif call == "quantize":
        names = mp.quantize_model(model, head=head)
    else:
        names = mp.inject_lora(model, "all-linear", 2, head=head, name="fr")
    assert names == INSIDE and names.left_out["output"] == "the output head (head=)"
    assert type(model.output) is nn.Linear and names.notes == {}
    assert "output" in names.report() and "left out: the output head (head=)" in names.report()


def test_a_head_of_several_layers_is_left_out_whole():
    model = Own()
    model.output = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 7))
    names = mp.inject_qlora(model, "all-linear", 2, head="output")
    assert names == INSIDE
    assert {"output.0", "output.2"} <= set(names.left_out)
    with pytest.raises(ValueError, match=r"head: 'outputs' is no module"):
        mp.inject_lora(Own(), "all-linear", 2, head="outputs")
    with pytest.raises(ValueError, match="head: a Linear is no module"):
        mp.quantize_model(Own(), head=nn.Linear(64, 7))


def test_a_layer_that_looks_like_the_head_is_told_of():
    names = mp.inject_lora(Own(), "all-linear", 2)
    assert "output" in names, "LoRA on a head is a choice, not an error"
    assert set(names.notes) == {"output"} and "pass head='output'" in names.report()
    for quantise in (mp.quantize_model, lambda m, **k: mp.inject_qlora(m, "all-linear", 2, **k)):
        with pytest.warns(HeadWarning, match="output is made 4-bit, and looks like the output"):
            names = quantise(Own())
        assert "output" in names.notes
        names = quantise(Own(), head=())
        assert "output" in names and names.notes == {}
        assert "output" in quantise(Own(), skip=["output"]).left_out  # without a warning


def test_the_warning_as_an_error_changes_nothing():
    model = Own()
    before = dict(model.named_modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(HeadWarning):
            mp.inject_qlora(model, ["qkv"], 2)
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


NO_HEAD = {
    "trunk": lambda: nn.ModuleList(Block() for _ in range(2)),
    "one layer": lambda: nn.Sequential(nn.Linear(64, 4)),
    "autoencoder": lambda: nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64)),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 2
    ),
    "gated": lambda: nn.ModuleList(
        nn.ModuleDict({"w1": nn.Linear(8, 20), "w2": nn.Linear(20, 8), "w3": nn.Linear(8, 20)})
        for _ in range(2)
    ),
    "positions": lambda: nn.ModuleDict({"at": nn.Embedding(256, 64), "block": Block()}),
    "grouped queries": lambda: nn.ModuleList(
        nn.ModuleDict({"q": nn.Linear(64, 64), "k": nn.Linear(64, 16), "v": nn.Linear(64, 16)})
        for _ in range(2)
    ),
}  # fmt: skip
HEADS = {
    "vocabulary": (lambda: Own(), "output"),
    "registered first": (lambda: Own(first=True), "output"),
    "classes": (lambda: Own(outputs=7), "output"),
    "mlp": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 7)), "2"),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(64, 2, 128), nn.Linear(64, 5)),
        "1",
    ),
}


@pytest.mark.parametrize("kind", NO_HEAD)
def test_layers_of_a_trunk_do_not_look_like_a_head(kind):
    model = NO_HEAD[kind]()
    assert likely_head(survey(model), [name for name, _ in model.named_modules()]) == {}


@pytest.mark.parametrize("kind", HEADS)
def test_what_looks_like_a_head(kind):
    make, name = HEADS[kind]
    model = make()
    assert list(likely_head(survey(model), [name for name, _ in model.named_modules()])) == [name]


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2Model", "BertForSequenceClassification"])
def test_models_that_know_their_head_are_not_guessed_at(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50}
    sizes |= ({"n_embd": 32, "n_layer": 1, "n_head": 2} if "GPT" in kind else
              {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
               "intermediate_size": 64})  # fmt: skip
    kinds = getattr(transformers, kind)
    model = kinds(kinds.config_class(**sizes))
    known = "classifier" if "Bert" in kind else None
    assert mp.inject_lora(model, "all-linear", 2, head=known).notes == {}


@pytest.mark.parametrize(
    ("kind", "head"),
    [("BertForSequenceClassification", "classifier"), ("BertForQuestionAnswering", "qa_outputs"),
     ("BertForMaskedLM", None), ("BertModel", None)],
)  # fmt: skip
@pytest.mark.parametrize("inject", [mp.inject_lora, mp.inject_qlora])
def test_a_new_head_that_stays_frozen_is_warned_of(inject, kind, head):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        vocab_size=50,
    )  # fmt: skip

    def make():
        return getattr(transformers, kind)(config)

    if head is None:
        assert inject(make(), ["query"], 2).notes == {}
        return
    with pytest.warns(HeadWarning, match=f"{head} is a new head, and stays frozen.*train_modules"):
        names = inject(make(), ["query"], 2)
    assert f"{head}" in names.report()
    model = make()
    mp.train_modules(model, [head])  # it trains already
    assert inject(model, ["query"], 2).notes == {}
    assert model.get_submodule(head).adapter_parameters()
    assert inject(make(), ["query"], 2, head=head).notes == {}  # the caller knows of it
    assert inject(make(), ["query", head], 2).notes == {}  # it has LoRA


def test_head_reaches_quantize_checkpoint(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file(
        {n: t.bfloat16() for n, t in Own().state_dict().items()}, source / "model.safetensors"
    )
    with torch.device("meta"):
        model = Own()
    quantize = mp.io.bitsandbytes.quantize_checkpoint
    names = quantize(source, tmp_path / "a", model=model, head="output", progress=False)
    assert names == INSIDE and names.left_out["output"] == "the output head (head=)"
    with pytest.warns(HeadWarning, match="output"):
        names = quantize(source, tmp_path / "b", model=model, progress=False)
    assert "output" in names and "output" in names.notes


# names


def numbers():
    return nn.Sequential(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), nn.Linear(64, 64), nn.Linear(64, 64)
    )


def test_an_entry_that_is_a_full_name_means_that_module_alone():
    names = mp.inject_lora(numbers(), ["1"], 2)
    assert names == ["1"]
    assert "means that alone, not ['0.1'] (1 in all)" in names.notes["1"]
    assert mp.inject_lora(numbers(), r"(.*\.)?1", 2) == ["0.1", "1"]
    assert mp.inject_lora(numbers(), ["0.1", "1"], 2) == ["0.1", "1"]
    names = mp.quantize_model(numbers(), skip=["1"])
    assert names == ["0.0", "0.1", "2"]
    names = mp.inject_lora(numbers(), "all-linear", 2, exclude=["1"])
    assert names == ["0.0", "0.1", "2"]
    assert mp.inject(numbers(), ["1"], lambda base: mp.LoRALinear(base, 2)).notes.keys() == {"1"}
    assert mp.train_modules(numbers(), ["1"]) == ["1"]


def test_an_end_that_is_no_full_name_means_all_that_end_so():
    names = mp.inject_lora(Own(), ["qkv"], 2)
    assert names == ["blocks.0.qkv", "blocks.1.qkv"] and names.notes == {}


def test_patterns_of_ranks_follow_the_same_rule():
    model = numbers()
    mp.inject_lora(model, ["0.1", "1"], {"1": 3, "0.1": 5})
    assert (model[0][1].rank, model[1].rank) == (5, 3)


def test_load_peft_keeps_pefts_rule(tmp_path):
    """There an entry matches ends always: a file of ours or theirs means the same as in PEFT."""
    model = numbers()
    mp.inject_lora(model, ["1"], 2, init=lambda layer: nn.init.ones_(layer.lora_b))
    mp.save_peft(model, tmp_path)
    again = numbers()
    assert mp.load_peft(again, tmp_path) == ["1"]
    assert torch.equal(again[1].lora_a, model[1].lora_a)


# what is not wrapped


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 32, 64))


def test_all_linear_says_that_experts_stay_frozen():
    model = nn.ModuleDict({"mix": nn.Linear(64, 64), "experts": Experts()})
    names = mp.inject_lora(model, "all-linear", 2)
    assert names == ["mix"] and "name it as a target" in names.left_out["experts.up"]
    assert "experts.up" in names.report()
    assert mp.inject_lora(model, ["experts.up"], 2) == ["experts.up"]
    model = nn.ModuleDict({"mix": nn.Linear(64, 64), "experts": Experts()})
    mp.quantize_model(model, experts=True)
    names = mp.inject_lora(model, "all-linear", 2)
    assert "name it as a target" in names.left_out["experts.up"], "in 4 bits too"
    model = nn.ModuleDict({"mix": nn.Linear(64, 64), "experts": Experts()})
    names = mp.inject_lora(model, "all-linear", 2, exclude=["experts.up"])
    assert names.left_out["experts.up"] == "excluded"


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.bare = nn.Parameter(torch.randn(7, 64))
        self.layer = nn.Linear(64, 64)
        self.convolution = nn.Conv2d(3, 4, 3)
        self.transposed = nn.ConvTranspose1d(3, 4, 3)
        self.attention = nn.MultiheadAttention(64, 2)
        self.apart = nn.MultiheadAttention(64, 2, kdim=8, vdim=8)
        self.recurrent = nn.LSTM(64, 8)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.norm = nn.LayerNorm((2, 64))
        self.table = nn.Embedding(5, 64)
        self.experts = Experts()
        self.list = nn.ParameterList([torch.randn(3, 3)])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_weight_is_in_the_account(device):
    """Weights of two or more axes are made 4-bit, or in left_out, by themselves or by module."""
    from minipeft.model.quantize import quantizable

    with torch.device(device):
        model = Everything()
    chosen, left_out = quantizable(survey(model))
    named = (*chosen, *left_out)
    for name, parameter in model.named_parameters():
        covered = any(name == own or name.startswith(f"{own}.") for own in named)
        assert covered or parameter.dim() < 2, name
    assert left_out["bare"] == "a bare parameter of a Everything, which is no linear layer"
    assert left_out["convolution"] == "Conv2d is no linear layer"
    assert left_out["attention.in_proj_weight"] == "MultiheadAttention multiplies by it itself"
    assert {"apart.q_proj_weight", "apart.k_proj_weight", "recurrent", "bilinear", "norm",
            "transposed", "list.0"} <= set(left_out)  # fmt: skip
    assert not any(name.startswith("recurrent.") for name in left_out), "once for the module"


def test_the_account_reaches_names_and_report():
    model = Everything()
    names = mp.quantize_model(model, skip=["bilinear"])
    assert names == ["layer"] and names.left_out["bilinear"] == "skipped"
    report = str(mp.memory_report(model, names.left_out))
    assert "left dense: convolution (Conv2d is no linear layer)" in report
    model = Everything()
    names = mp.inject_qlora(model, ["layer"], 2)
    assert {"convolution", "bare", "attention.in_proj_weight", "experts.up"} <= set(names.left_out)
    packed = sum(m.logical_parameters() for m in model.modules() if isinstance(m, mp.NF4Linear))
    assert packed == 64 * 64


def test_an_adapter_is_no_bare_parameter():
    model = Everything()
    mp.inject_lora(model, ["layer", "table", "convolution"], 2)
    names = mp.quantize_model(model.train(), skip=(), experts=True)
    assert not any("lora" in name for name in names.left_out)


def test_a_head_of_ones_own_over_a_backbone_that_names_none_is_told_of():
    transformers = pytest.importorskip("transformers")

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            config = transformers.LlamaConfig(
                hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, vocab_size=64,
            )  # fmt: skip
            self.backbone, self.head = transformers.LlamaModel(config), nn.Linear(64, 3)

    with pytest.warns(HeadWarning, match="head is made 4-bit"):
        mp.inject_qlora(Own(), "all-linear", 2)


def test_a_layer_that_torch_compiled_is_wrapped_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[0] = torch.compile(model[0], backend="eager")
    names = mp.inject_lora(model, "all-linear", 2)
    assert names == ["0", "2"]
    model(torch.randn(2, 8)).sum().backward()
    assert model[0].lora_b.grad is not None


@pytest.mark.parametrize("said", ["all_linear", "all linear", "AllLinear", ["all-linear"]])
def test_all_linear_in_another_spelling_is_suggested(said):
    for call in (mp.inject_lora, mp.inject_qlora):
        with pytest.raises(ValueError, match="did you mean 'all-linear', as a string"):
            call(Own(), said, 4)


def test_a_container_as_target_names_what_it_holds():
    model = Own()
    for dora in (False, True):
        with pytest.raises(ValueError, match=r"'blocks\.0' is a Block.*name \['0\.qkv'.*4 in all"):
            mp.inject_lora(model, ["blocks.0"], 4, dora=dora)
    mp.inject_lora(model, ["0.qkv"], 4)  # what it names fits

    layer = nn.Sequential(nn.TransformerEncoderLayer(16, 2))
    with pytest.raises(ValueError, match=r"\['0\.self_attn', '0\.linear1', '0\.linear2'\]"):
        mp.inject_lora(layer, ["0"], 4)  # not out_proj, which attention never calls


@pytest.mark.parametrize("kind", [nn.LSTM(8, 8), nn.LayerNorm(8), nn.ConvTranspose1d(8, 8, 3)])
def test_a_kind_that_cannot_be_wrapped_names_those_that_can(kind):
    for call, given in ((mp.inject_lora, {}), (mp.inject_qlora, {"skip": ["1"]})):
        model = nn.Sequential(kind, nn.Linear(8, 8))
        with pytest.raises(ValueError, match=f"{type(kind).__name__}; LoRA wraps linear layers"):
            call(model, ["0"], 2, **given)
    with pytest.raises(ValueError, match="MultiheadAttention; DoRA wraps linear layers, emb"):
        mp.inject_lora(nn.Sequential(nn.MultiheadAttention(8, 2)), ["0"], 2, dora=True)
