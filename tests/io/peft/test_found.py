"""Adapter files as people have them: each computes what PEFT computes, or is refused by name."""

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
ROUNDING = 1e-6  # of the largest logit: float32 through two layers, in another order of sums


class Zoo(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.norm = nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.norm(self.lin(self.emb(ids)))
        return self.head(x + self.conv(x.transpose(1, 2)).transpose(1, 2))


def zoo():
    torch.manual_seed(0)
    return Zoo().eval()


def llama(tie=False, vocabulary=20):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def off(ours, theirs):
    """The largest difference, relative to the largest output."""
    return ((logits(ours) - logits(theirs)).abs().max() / logits(theirs).abs().max()).item()


def trained(make, settings, tmp_path):
    """A model of PEFT with random values in all that trains, saved."""
    model = peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    return model


def change(tmp_path, tensors=None, config=None):
    """Rewrite what was saved."""
    if tensors is not None:
        values = read_tensors(tmp_path / WEIGHTS)
        made = tensors(values)
        values = made if isinstance(made, dict) else values
        write_tensors(tmp_path / WEIGHTS, values)
    if config is not None:
        text = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps(text | config))


def state(model):
    """Which modules, whether each parameter trains, and all values."""
    return (
        [(n, id(m)) for n, m in model.named_modules()],
        [(n, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()],
    )


def refused(make, tmp_path, match, **settings):
    """Loading raises with this message, and the model is as it was."""
    model = make()
    modules, parameters = state(model)
    with pytest.raises(ValueError, match=match):
        mp.load_peft(model, tmp_path, **settings)
    after = state(model)
    assert after[0] == modules
    for (name, trains, value), (_, trained_now, now) in zip(parameters, after[1], strict=True):
        assert trains == trained_now and torch.equal(value, now), name


TOKENS = "trainable_token_indices"
QV = ["q_proj", "v_proj"]
BOTH = {"embed_tokens": [3, 5], "lm_head": [3, 5]}
DIFFERENT = {"embed_tokens": [3, 5], "lm_head": [4]}
CASES = {
    "layers as a list": (llama, {"target_modules": QV, "layers_to_transform": [1]}),
    "a layer as a number": (llama, {"target_modules": QV, "layers_to_transform": 0}),
    "layers with a pattern": (
        llama, {"target_modules": QV, "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "layers with patterns": (
        llama,
        {"target_modules": QV, "layers_to_transform": [1, 7], "layers_pattern": ["h", "layers"]},
    ),
    "layers with an expression": (
        llama,
        {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": r"(blocks|layers)"},
    ),
    "lora_bias": (zoo, {"target_modules": ["lin", "conv"], "lora_bias": True}),
    "lora_bias with rsLoRA and biases": (
        zoo,
        {"target_modules": ["lin", "head"], "lora_bias": True, "use_rslora": True, "bias": "all"},
    ),
    "tokens of table and head": (llama, {"target_modules": QV, TOKENS: BOTH}),
    "other tokens of the head": (llama, {"target_modules": QV, TOKENS: DIFFERENT}),
    "tokens of the head alone": (llama, {"target_modules": QV, TOKENS: {"lm_head": [4]}}),
    "tokens of tied table and head": (lambda: llama(True), {"target_modules": QV, TOKENS: BOTH}),
    "other tokens of the tied head": (
        lambda: llama(True), {"target_modules": QV, TOKENS: DIFFERENT},
    ),
    "tokens of the tied head alone": (
        lambda: llama(True), {"target_modules": QV, TOKENS: {"lm_head": [4]}},
    ),
    "LoRA on the head of tied tokens": (
        lambda: llama(True), {"target_modules": ["lm_head"], TOKENS: [3, 5]},
    ),
    "a head saved whole, and all biases": (
        zoo, {"target_modules": ["lin"], "bias": "all", "modules_to_save": ["head", "norm"]},
    ),
    "a name that only ends so": (llama, {"target_modules": QV, "modules_to_save": ["head"]}),
    "nothing saved whole": (llama, {"target_modules": QV, "modules_to_save": []}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_computes_the_same_here_and_back(case, tmp_path, capsys):
    make, settings = CASES[case]
    theirs = trained(make, settings, tmp_path)
    ours = make()
    before = logits(ours)
    names = mp.load_peft(ours, tmp_path)
    assert names and not names.missing and not names.unexpected
    here = off(ours, theirs)
    assert off(make(), theirs) > 1e-3  # the adapter does something
    mp.save_peft(ours, tmp_path / "back")
    again = make()
    mp.load_peft(again, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "back").eval()
    there = off(back, theirs)
    mp.merge(again)
    merged = off(again, theirs)
    with capsys.disabled():
        print(f"\n{case}: here {here:.1e}, back in PEFT {there:.1e}, merged {merged:.1e}")
    mp.unmerge(again)
    assert torch.equal(logits(again), logits(ours))
    assert max(here, there, merged) <= ROUNDING  # float32, order of sums
    with mp.disable_adapters(ours):
        assert torch.equal(logits(ours), before)
    mp.remove(ours)
    assert torch.equal(logits(ours), before)


def plain_lora(tmp_path):
    return trained(llama, {"target_modules": QV}, tmp_path)


SPELLINGS = {
    "torch.compile": lambda k: k.replace(".model.model.", ".model._orig_mod.model."),
    "torch.compile outside": lambda k: f"_orig_mod.{k}",
    "DDP outside": lambda k: f"module.{k}",
    "DDP": lambda k: k.replace("base_model.model.", "base_model.model.module."),
    "DDP over a compiled one, no prefix": lambda k: k.replace(
        "base_model.model.", "module._orig_mod."
    ),
    "FSDP": lambda k: k.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "checkpointing": lambda k: k.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "a compiled part": lambda k: k.replace(".self_attn", ".self_attn._orig_mod"),
    "an adapter's name with a dash and a space": lambda k: k.replace(
        ".weight", ".my-adapter v2.weight"
    ),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_every_spelling_of_a_name_is_understood(kind, tmp_path):
    theirs = plain_lora(tmp_path)
    change(tmp_path, lambda t: {SPELLINGS[kind](k): v for k, v in t.items()})
    ours = llama()
    mp.load_peft(ours, tmp_path)
    assert off(ours, theirs) <= ROUNDING


def test_names_in_the_configuration_are_in_the_files_spelling_too(tmp_path):
    settings = {
        "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 2},
        "modules_to_save": ["lm_head"],
    }
    theirs = trained(llama, settings, tmp_path)

    def spelled(name):
        inner = name.replace("model.layers.1.", "model.layers.1._checkpoint_wrapped_module.")
        return f"_orig_mod.{inner}"

    def keys(tensors):
        prefix = "base_model.model."
        return {prefix + spelled(k.removeprefix(prefix)): v for k, v in tensors.items()}

    pattern = r"^_orig_mod\.model\.layers\.1\._checkpoint_wrapped_module\.self_attn\.q_proj"
    change(tmp_path, keys, {
        "target_modules": [spelled(name) for name in settings["target_modules"]],
        "rank_pattern": {pattern: 2}, "modules_to_save": ["_orig_mod.lm_head"],
    })  # fmt: skip
    ours = llama()
    mp.load_peft(ours, tmp_path)
    assert off(ours, theirs) <= ROUNDING
    layer = r"_orig_mod\.model\.layers\.\d\.(_checkpoint_wrapped_module\.)?"
    change(tmp_path, None, {"target_modules": rf"{layer}self_attn\.q_proj"})
    ours = llama()
    mp.load_peft(ours, tmp_path)
    assert off(ours, theirs) <= ROUNDING


@pytest.mark.parametrize("form", ["modules_to_save", "modules_to_save.default"])
def test_a_module_saved_whole_under_pefts_own_name(form, tmp_path):
    theirs = trained(zoo, {"target_modules": ["lin"], "modules_to_save": ["head"]}, tmp_path)
    change(tmp_path, lambda t: {k.replace(".head.", f".head.{form}."): v for k, v in t.items()})
    ours = zoo()
    names = mp.load_peft(ours, tmp_path)
    assert sorted(names) == ["head", "lin"]
    assert off(ours, theirs) <= ROUNDING


def test_a_part_saved_whole_under_pefts_own_name(tmp_path):
    def make():
        torch.manual_seed(0)
        model = Zoo().eval()
        model.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
        return model

    theirs = trained(make, {"target_modules": ["lin"], "modules_to_save": ["head"]}, tmp_path)
    change(
        tmp_path,
        lambda t: {k.replace(".head.", ".head.modules_to_save.fr."): v for k, v in t.items()},
    )
    ours = make()
    mp.load_peft(ours, tmp_path)
    assert off(ours, theirs) <= ROUNDING


def test_two_values_for_a_module_saved_whole_are_refused(tmp_path):
    trained(zoo, {"target_modules": ["lin"], "modules_to_save": ["head"], "bias": "all"}, tmp_path)
    change(tmp_path, lambda t: t["base_model.model.head.modules_to_save.bias"].add_(1))
    refused(zoo, tmp_path, "are the same tensor")


def test_the_base_of_another_model_beside_a_module_saved_whole_is_refused(tmp_path):
    trained(zoo, {"target_modules": ["lin"], "modules_to_save": ["head"], "bias": "all"}, tmp_path)
    change(tmp_path, lambda t: t["base_model.model.head.original_module.bias"].add_(1))
    refused(zoo, tmp_path, "original_module.bias")


def test_a_bias_trained_over_a_module_saved_whole_is_saved_as_it_computes(tmp_path):
    model = zoo()
    mp.inject_lora(model, ["lin"], 2)
    mp.train_modules(model, ["head"])
    mp.train_biases(model, "all")
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    mp.save_peft(model, tmp_path)
    ours = zoo()
    mp.load_peft(ours, tmp_path)
    assert off(ours, model) <= ROUNDING
    assert off(peft.PeftModel.from_pretrained(zoo(), tmp_path).eval(), model) <= ROUNDING


def test_tokens_of_a_tied_head_lie_below_its_lora(tmp_path):
    model = llama(True)
    mp.inject_lora(model, ["lm_head"], 2)
    mp.train_tokens(model, [3, 5])
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    mp.save_peft(model, tmp_path)
    assert off(peft.PeftModel.from_pretrained(llama(True), tmp_path).eval(), model) <= ROUNDING
    ours = llama(True)
    mp.load_peft(ours, tmp_path)
    assert off(ours, model) <= ROUNDING
    before = logits(model)
    mp.merge(model)
    # float32: the product is rounded into the weight, logits up to 6; measured 1e-6
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


OTHER_TRAINERS = {
    "unsloth_fixed": True, "unsloth_version": "2026.11", "lora_dtype": "bfloat16",
    "merge_weights": True, "lorap_lr_ratio": 16.0,
}  # fmt: skip


def test_fields_of_other_trainers_are_read_past_and_listed(tmp_path):
    theirs = plain_lora(tmp_path)
    change(tmp_path, None, OTHER_TRAINERS | {"frobnicate": None})
    ours = llama()
    names = mp.load_peft(ours, tmp_path)
    assert names.ignored == OTHER_TRAINERS
    assert off(ours, theirs) <= ROUNDING


def test_a_field_that_nobody_knows_raises_and_is_returned_when_not_strict(tmp_path):
    theirs = plain_lora(tmp_path)
    change(tmp_path, None, {"frobnicate": [3], "unsloth_fixed": True})
    refused(llama, tmp_path, r"frobnicate = \[3\] is no field known here; strict=False")
    ours = llama()
    names = mp.load_peft(ours, tmp_path, strict=False)
    assert names.ignored == {"frobnicate": [3], "unsloth_fixed": True}
    assert off(ours, theirs) <= ROUNDING


REFUSED = {
    "alpha zero": ({"lora_alpha": 0}, "alpha=0"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "QALoRA": ({"use_qalora": True}, "use_qalora"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "slices of PEFT 0.2": ({"enable_lora": [True, False, True]}, "expected 2 parts of r"),
    "raw PiSSA": ({"init_lora_weights": "pissa"}, "pissa.*path_initial_model"),
    "raw LoftQ": ({"init_lora_weights": "loftq"}, "loftq"),
    "lora_bias without biases": ({"lora_bias": True}, "missing lora_B.bias"),
    "lora_bias as text": ({"lora_bias": "yes"}, "expected true or false"),
    "layers as text": ({"layers_to_transform": "0-3"}, "layers_to_transform is '0-3'"),
    "layers as truth": ({"layers_to_transform": True}, "layers_to_transform is True"),
    "fractions of layers": ({"layers_to_transform": [0.5]}, r"layers_to_transform is \[0.5\]"),
    "a pattern of layers alone": ({"layers_pattern": "layers"}, "without layers_to_transform"),
    "layers of an expression": (
        {"target_modules": ".*q_proj", "layers_to_transform": [1]}, "go with a list",
    ),
    "layers that are not there": (
        {"layers_to_transform": [5]}, "target_modules and layers_to_transform .* fit no module",
    ),
    "layers that lack keys": (
        {"layers_to_transform": [0]}, "unexpected .*layers.1.self_attn",
    ),
    "a broken pattern of layers": (
        {"layers_to_transform": [0], "layers_pattern": "("}, "no regular expression",
    ),
    "names as the text of a set": (
        {"target_modules": "{'q_proj', 'v_proj'}"}, "target_modules .* fit no module",
    ),
    "a kind in small letters": ({"peft_type": "lora"}, "'lora'; read are LORA, PREFIX_TUNING"),
    "no kind": ({"peft_type": None}, "None; read are LORA"),
    "a pattern of another adapter": ({"rank_pattern": {"k_proj2": 3}}, r"\['k_proj2'\] fit no"),
    "another rank as a fraction": ({"r": 4.5}, "whole number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_configuration_that_says_more_is_refused_by_name(kind, tmp_path):
    plain_lora(tmp_path)
    config, message = REFUSED[kind]
    change(tmp_path, None, config)
    refused(llama, tmp_path, message)


OTHER_KINDS = ["ADALORA", "LOHA", "IA3", "VERA", "OFT", "CPT", "XLORA",
               "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT"]  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_another_kind_is_refused_with_the_list_of_what_is_read(kind, tmp_path):
    plain_lora(tmp_path)
    change(tmp_path, None, {"peft_type": kind})
    read = "LORA, PREFIX_TUNING, PROMPT_TUNING, P_TUNING, CARTRIDGE"
    refused(llama, tmp_path, f"{kind}.*read are {read}")


SAME = {
    "whole numbers as fractions": {"r": 4.0, "lora_alpha": 6.0},
    "fields that are off": {"lora_bias": False, "layers_to_transform": [], "use_qalora": False},
    "empty patterns": {"rank_pattern": {}, "alpha_pattern": {}, "layers_pattern": []},
    "no fields but the needed": {"lora_dropout": None, "bias": None, "use_rslora": None},
}


@pytest.mark.parametrize("kind", SAME)
def test_a_configuration_that_says_the_same_loads(kind, tmp_path):
    theirs = plain_lora(tmp_path)
    given = {key: value for key, value in SAME[kind].items() if value is not None}
    change(tmp_path, None, given)
    if len(given) < len(SAME[kind]):
        config = json.loads((tmp_path / CONFIG).read_text())
        for key in SAME[kind]:
            config.pop(key)
        (tmp_path / CONFIG).write_text(json.dumps(config))
    ours = llama()
    mp.load_peft(ours, tmp_path)
    assert off(ours, theirs) <= ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_of_other_widths_load_as_peft_loads_them(dtype, tmp_path):
    plain_lora(tmp_path)
    change(tmp_path, lambda t: {k: v.to(dtype) for k, v in t.items()})
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    ours = llama()
    mp.load_peft(ours, tmp_path)
    assert off(ours, theirs) <= ROUNDING


def test_layers_that_the_configuration_does_not_name_are_unexpected(tmp_path):
    theirs = plain_lora(tmp_path)
    change(tmp_path, None, {"target_modules": ["q_proj"]})
    refused(llama, tmp_path, "unexpected .*v_proj")
    ours = llama()
    names = mp.load_peft(ours, tmp_path, strict=False)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj"}
    assert len(names.unexpected) == 4 and all("v_proj" in key for key in names.unexpected)
    there = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert off(ours, there) <= ROUNDING and off(ours, theirs) > 1e-3


def wider(tie=False, seed=None):
    """A model with two tokens more, whose rows are other numbers for each seed."""
    model = llama(tie)
    model.resize_token_embeddings(22, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[20:] = torch.randn(2, 16, generator=generator) * 0.1
    return model.eval()


WIDER = {
    "nothing of the vocabulary": {"target_modules": QV},
    "the embeddings": {"target_modules": [*QV, "embed_tokens"]},
    "the embeddings, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "the head": {"target_modules": [*QV, "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "the embeddings saved whole": {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
    "the embeddings saved whole, tied": {
        "target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "the new tokens": {"target_modules": QV, TOKENS: [20, 21]},
    "a new token of table and head": {
        "target_modules": QV, TOKENS: {"embed_tokens": [20], "lm_head": [20]},
    },
    "a new token, and the head": {"target_modules": ["lm_head"], TOKENS: [20]},
}  # fmt: skip


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", WIDER)
def test_an_adapter_of_a_larger_vocabulary_says_the_sizes_and_loads_then(case, tie, tmp_path):
    theirs = trained(lambda: wider(tie, 1), dict(WIDER[case]), tmp_path)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    tables = [k for k, v in read_tensors(tmp_path / WEIGHTS).items() if 22 in v.shape]
    if tables:
        refused(lambda: llama(tie), tmp_path, r"22 rows in the file and 20 in the model.*"
                r"resize_token_embeddings\(22\)")  # fmt: skip
    ours = wider(tie, 2)
    before = {k: v.clone() for k, v in mp.base_state_dict(ours).items()}
    mp.load_peft(ours, tmp_path)
    ids = torch.tensor([[20, 1, 21, 3]])
    # PEFT leaves some new rows out of the file: an untied head's where the embeddings have LoRA
    loaded = peft.PeftModel.from_pretrained(wider(tie, 2), tmp_path).eval()
    with torch.no_grad():
        expected, made = loaded(ids).logits, ours(ids).logits
    assert (made - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert all(torch.equal(v, before[k]) for k, v in mp.base_state_dict(ours).items())
    mp.save_peft(ours, tmp_path / "back")
    again = wider(tie, 2)
    mp.load_peft(again, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(wider(tie, 2), tmp_path / "back").eval()
    with torch.no_grad():
        assert (again(ids).logits - expected).abs().max() <= ROUNDING * expected.abs().max()
        assert (back(ids).logits - expected).abs().max() <= ROUNDING * expected.abs().max()
        mp.merge(again)
        # float32: the product is rounded into the weight, logits up to 3; measured 5e-7
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-6)
    mp.unmerge(again)
    mp.remove(again)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, wider(tie, 2)(ids).logits)


def test_a_table_that_differs_in_old_rows_is_another_models(tmp_path):
    theirs = trained(lambda: wider(seed=1), WIDER["the embeddings"], tmp_path)
    theirs.save_pretrained(tmp_path)
    change(tmp_path, lambda t: next(v for k, v in t.items() if "base_layer" in k)[0].add_(1))
    refused(lambda: wider(seed=2), tmp_path, "unexpected .*embed_tokens.base_layer.weight")


def test_a_tied_head_with_other_rows_for_the_same_tokens_is_refused(tmp_path):
    trained(llama, {"target_modules": QV, TOKENS: BOTH}, tmp_path)
    refused(lambda: llama(True), tmp_path, "tied, but their token rows differ")
