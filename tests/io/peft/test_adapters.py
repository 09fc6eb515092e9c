"""PEFT's files for everything beyond plain LoRA on linear layers, both ways, and strictly."""

import json

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io.files import read_tensors, write_tensors

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.tensor([[1, 3, 5, 2], [4, 4, 0, 6]])


class Zoo(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.norm = nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.norm(self.lin(self.emb(ids)))
        x = x + self.grouped(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(x + self.attn(x, x, x, need_weights=False)[0])


def zoo():
    torch.manual_seed(0)
    return Zoo().eval()


def llama(tie):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=20, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=20, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    return model


CASES = {
    "bias all": (zoo, {"target_modules": ["lin", "conv"], "bias": "all"}),
    "bias lora_only": (zoo, {"target_modules": ["lin", "conv"], "bias": "lora_only"}),
    "DoRA": (zoo, {"target_modules": ["lin", "emb", "conv"], "use_dora": True}),
    "grouped convolution": (zoo, {"target_modules": ["grouped"]}),
    "modules to save": (zoo, {"target_modules": ["lin"], "modules_to_save": ["head", "norm"]}),
    "tokens": (zoo, {"target_modules": ["lin"], "trainable_token_indices": {"emb": [5, 3]}}),
    "LLaMA, embeddings": (lambda: llama(False), {"target_modules": ["embed_tokens", "q_proj"]}),
    "LLaMA, tied embeddings": (lambda: llama(True), {"target_modules": ["embed_tokens"]}),
    "LLaMA, adapter tied": (
        lambda: llama(True), {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "LLaMA, tied tokens": (
        lambda: llama(True), {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    ),
    "LLaMA, tied modules": (
        lambda: llama(True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
         "ensure_weight_tying": True},
    ),
    "Mixtral experts": (
        mixtral,
        {"target_modules": ["q_proj"],
         "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}  # fmt: skip


def logits(model, ids=IDS):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


def trained_peft(case):
    make, settings = CASES[case]
    model = peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "out_proj.bias" in name:
                continue  # inside attention, where no layer of ours can train it
            if parameter.requires_grad and "lora_embedding" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.requires_grad:
                parameter.normal_(std=0.1)
    return make, model


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_loads_here_and_goes_back(case, tmp_path, capsys):
    make, theirs = trained_peft(case)
    theirs.save_pretrained(tmp_path)
    ours = make()
    before = logits(ours)
    names = mp.load_peft(ours, tmp_path)
    assert names and not names.missing and not names.unexpected
    here = (logits(ours) - logits(theirs)).abs().max().item()
    mp.save_peft(ours, tmp_path / "back")
    again = make()
    mp.load_peft(again, tmp_path / "back")
    assert torch.equal(logits(again), logits(ours))
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "back").eval()
    there = (logits(back) - logits(theirs)).abs().max().item()
    with capsys.disabled():
        print(f"\n{case}: PEFT's file here {here:.1e}, back in PEFT {there:.1e}")
    assert here <= 1e-5 and there <= 1e-5  # float32, order of sums
    assert (logits(ours) - before).abs().max() > 1e-3  # the adapter does something
    with mp.disable_adapters(ours):
        assert torch.equal(logits(ours), before)
    mp.remove(ours)
    assert torch.equal(logits(ours), before)


def test_attention_goes_both_ways_where_peft_is_right(tmp_path):
    """PEFT's forward applies out_proj's delta twice; its factors are what they should be."""
    theirs = peft.get_peft_model(zoo(), peft.LoraConfig(r=2, target_modules=["attn"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    theirs.save_pretrained(tmp_path)
    ours = zoo()
    mp.load_peft(ours, tmp_path)
    own, peer = ours.attn.adapter_parameters(), dict(theirs.named_parameters())
    inner = "base_model.model.attn"
    assert torch.equal(own["lora_a"], peer[f"{inner}.lora_A.default.weight"])
    assert torch.equal(
        own["out_lora_b"], peer[f"{inner}.base_layer.out_proj.lora_B.default.weight"]
    )
    mp.save_peft(ours, tmp_path / "back")
    first, second = (read_tensors(folder / WEIGHTS) for folder in (tmp_path, tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_several_adapters_are_folders_as_in_peft(tmp_path):
    theirs = peft.get_peft_model(zoo(), peft.LoraConfig(r=2, target_modules=["lin"]))
    theirs.add_adapter("fr", peft.LoraConfig(r=3, target_modules=["lin", "head"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    theirs.eval().save_pretrained(tmp_path)
    ours = zoo()
    mp.load_peft(ours, tmp_path)
    mp.load_peft(ours, tmp_path / "fr", name="fr")
    for name in ("default", "fr"):
        theirs.set_adapter(name)
        mp.use_adapters(ours, name)
        # float32, the same products in PEFT's layers: measured 0
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert mp.save_peft(ours, tmp_path / "back") == ["lin", "head"]
    for name in ("", "fr"):
        first = read_tensors(tmp_path / name / WEIGHTS)
        second = read_tensors(tmp_path / "back" / name / WEIGHTS)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(ValueError, match="already"):
        mp.load_peft(ours, tmp_path / "fr", name="fr")
    mp.save_peft(ours, tmp_path / "one", name="fr")
    mp.load_peft(zoo(), tmp_path / "one")


@pytest.mark.parametrize("where", ["lora_A.default.weight", "lora_A.fr.weight"])
def test_keys_with_an_adapters_name_load(where, tmp_path):
    model = zoo()
    mp.inject_lora(model, ["lin"], 2)
    mp.save_peft(model, tmp_path)
    tensors = read_tensors(tmp_path / WEIGHTS)
    tensors = {k.replace("lora_A.weight", where): v for k, v in tensors.items()}
    write_tensors(tmp_path / WEIGHTS, tensors)
    assert mp.load_peft(zoo(), tmp_path) == ["lin"]


def test_a_start_that_is_subtracted_is_written_as_the_plain_lora_it_is(tmp_path):
    model = zoo()
    mp.inject_lora(model, ["lin"], 2, 8, init=mp.starts.pissa())
    with torch.no_grad():
        model.lin.lora_b.add_(torch.randn_like(model.lin.lora_b))
    mp.save_peft(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 16)
    theirs = peft.PeftModel.from_pretrained(zoo(), tmp_path).eval()
    # float32, the same products in PEFT's layers: measured 0
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def saved(tmp_path, case="modules to save"):
    make, theirs = trained_peft(case)
    theirs.save_pretrained(tmp_path)
    return make


CHANGES = {
    "a saved module lost": ("modules to save", lambda t: t.pop("base_model.model.head.weight"),
                            "weight is missing"),
    "a whole saved module lost": (
        "modules to save",
        lambda t: [t.pop(f"base_model.model.norm.{n}") for n in ("weight", "bias")],
        "no keys for 'norm'",
    ),
    "a saved module of another size": (
        "modules to save", lambda t: t.update({"base_model.model.head.weight": torch.zeros(4, 8)}),
        r"\(4, 8\)",
    ),
    "a bias of another size": (
        "bias all", lambda t: t.update({"base_model.model.lin.base_layer.bias": torch.zeros(9)}),
        r"\(9,\)",
    ),
    "no magnitude": (
        "DoRA", lambda t: t.pop("base_model.model.lin.lora_magnitude_vector"), "missing",
    ),
    "token rows lost": (
        "tokens", lambda t: t.pop("base_model.model.emb.token_adapter.trainable_tokens_delta"),
        "no keys for 'emb'",
    ),
    "token rows of another number": (
        "tokens", lambda t: t.update({"base_model.model.emb.token_adapter.trainable_tokens_delta":
                                      torch.zeros(3, 8)}), r"\(3, 8\)",
    ),
    "one expert weight of two": (
        "Mixtral experts",
        lambda t: [t.pop(k) for k in list(t) if "experts.base_layer" in k], "expert weights",
    ),
    "NaN in a bias": (
        "bias all",
        lambda t: t["base_model.model.lin.base_layer.bias"].fill_(float("nan")), "NaN",
    ),
    "another base embedding": (
        "LLaMA, embeddings",
        lambda t: t["base_model.model.model.embed_tokens.base_layer.weight"].add_(1), "unexpected",
    ),
    "a kernel without axes": (
        "grouped convolution",
        lambda t: t.update({"base_model.model.grouped.lora_A.weight": torch.zeros(4)}), r"\(4,\)",
    ),
    "a pointwise kernel of two axes": (
        "grouped convolution",
        lambda t: t.update({"base_model.model.grouped.lora_B.weight": torch.zeros(8, 2)}),
        r"\(8, 2\)",
    ),
    "two names for one tensor": (
        "grouped convolution",
        lambda t: t.update({"base_model.model.grouped.lora_A.x.weight":
                            t["base_model.model.grouped.lora_A.weight"].clone()}),
        "the same tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_wrong_tensors_raise_and_nothing_changes(kind, tmp_path):
    case, change, message = CHANGES[kind]
    make = saved(tmp_path, case)
    tensors = read_tensors(tmp_path / WEIGHTS)
    change(tensors)
    write_tensors(tmp_path / WEIGHTS, tensors)
    model = make()
    before = (
        [(n, id(m)) for n, m in model.named_modules()],
        [p.requires_grad for p in model.parameters()],
    )
    with pytest.raises(ValueError, match=message):
        mp.load_peft(model, tmp_path)
    after = (
        [(n, id(m)) for n, m in model.named_modules()],
        [p.requires_grad for p in model.parameters()],
    )
    assert before == after


def test_not_strict_gives_exact_lists(tmp_path):
    make = saved(tmp_path, "tokens")
    tensors = read_tensors(tmp_path / WEIGHTS)
    del tensors["base_model.model.emb.token_adapter.trainable_tokens_delta"]
    tensors["base_model.model.other.lora_A.weight"] = torch.zeros(2, 2)
    write_tensors(tmp_path / WEIGHTS, tensors)
    with pytest.raises(ValueError, match=r"other.lora_A.*no keys for 'emb'"):
        mp.load_peft(make(), tmp_path)
    names = mp.load_peft(make(), tmp_path, strict=False)
    assert names == ["lin"]
    assert names.missing == ["emb"]
    assert names.unexpected == ["base_model.model.other.lora_A.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "some"}, "bias"), ({"modules_to_save": "head"}, "list of names"),
        ({"trainable_token_indices": {"emb": [-1]}}, "token numbers"),
        ({"trainable_token_indices": [1.5]}, "token numbers"), ({"use_dora": "yes"}, "use_dora"),
        ({"target_parameters": 3}, "target_parameters"), ({"lora_bias": True}, "lora_bias"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"trainable_token_indices": {"emb": [99]}}, "token ids"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_configurations_that_say_what_no_layer_does(change, message, tmp_path):
    make = saved(tmp_path, "tokens")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        mp.load_peft(make(), tmp_path)


def test_layers_that_the_format_cannot_express_are_refused(tmp_path):
    model = zoo()
    mp.inject_lora(model, ["lin"], 2)
    mp.inject_lora(model, ["head"], 2, dora=True)
    with pytest.raises(ValueError, match="different kinds"):
        mp.save_peft(model, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


@pytest.mark.filterwarnings("default")
def test_saving_a_loftq_adapter_says_that_its_base_is_another(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    mp.inject_qlora(model, ["0"], 4, init=mp.starts.loftq(1), skip=["1"])
    with pytest.warns(UserWarning, match="fits this base only"):
        mp.save_peft(model, tmp_path)
