"""Prefixes and prompts as files: PEFT's both ways, P-tuning v2's and ChatGLM's in, our own."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import minipeft as mp

pytest.importorskip("transformers")
from minipeft.io import prefixes
from tests.prefix_behaviours import Case, P, difference

TOLERANCE = 1e-5  # float32, logits around 1, summed in another order
FAMILIES = [
    "LLaMA", "Qwen3", "GPT-2", "OPT", "BLOOM", "CodeGen", "Falcon, 40B kind", "Mistral, window",
    "Gemma3, window", "BERT", "RoBERTa",
]  # fmt: skip
CONFIGS = {
    "prefix": ("PrefixTuningConfig", {}),
    "prefix, MLP": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 2}),
    "prompt": ("PromptTuningConfig", {}),
    "P-tuning, MLP": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "P-tuning, LSTM": ("PromptEncoderConfig", {
        "encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM",
    }),
}  # fmt: skip


def in_peft(model: nn.Module, kind: str, task: str):
    """A PEFT model of this kind, its parameters far from 0."""
    peft = pytest.importorskip("peft")
    name, settings = CONFIGS[kind]
    config = getattr(peft, name)(task_type=task, num_virtual_tokens=P, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in wrapped.prompt_encoder.parameters():
            parameter.normal_(std=0.5)
    return wrapped


def logits_of(peft_model, text: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = torch.ones_like(text)
        logits = peft_model(input_ids=text, attention_mask=mask).logits
    return logits[:, -text.shape[1] :]


def saved(peft_model, path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model.save_pretrained(path)


def loaded(model: nn.Module, path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, path).eval()


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "prefix") for family in FAMILIES]
    + [("LLaMA", kind) for kind in CONFIGS]
    + [("GPT-2", "cartridge"), ("Mistral, window", "cartridge"), ("BERT", "cartridge")]
    + [("GPT-2", "prompt"), ("BLOOM", "prompt"), ("Gemma3, window", "prompt")],
)
def test_pefts_adapters_come_in_and_go_out(family, kind, tmp_path, capsys):
    case, again = Case(family), Case(family)
    task = "CAUSAL_LM" if case.kind == "decoder" else "TOKEN_CLS"
    theirs = in_peft(copy.deepcopy(case.model), kind, task)
    expected = logits_of(theirs, case.text)
    saved(theirs, tmp_path / "theirs")
    names = mp.load_peft(case.model, tmp_path / "theirs")
    assert names[0] == "minipeft_prefix.encoders.default"
    came_in = difference(case.logits(), expected)
    with torch.no_grad():
        for parameter in mp.adapter_parameters(case.model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    mp.save_peft(case.model, tmp_path / "ours")
    went_out = difference(
        logits_of(loaded(again.model, tmp_path / "ours"), case.text), case.logits()
    )
    with capsys.disabled():
        print(f"\n{family}, {kind}: from PEFT {came_in:.1e}, in PEFT {went_out:.1e}")
    assert max(came_in, went_out) <= TOLERANCE
    third = Case(family)
    mp.load_peft(third.model, tmp_path / "ours")
    assert torch.equal(third.logits(), case.logits())


def test_a_p_tuning_network_of_ours_goes_to_peft(tmp_path):
    case, again = Case("LLaMA"), Case("LLaMA")
    mp.attach_prompt(case.model, P, kind="mlp", hidden=12)
    mp.save_peft(case.model, tmp_path)
    theirs = loaded(again.model, tmp_path)
    assert difference(logits_of(theirs, case.text), case.logits()) <= TOLERANCE


class TheirEncoder(nn.Module):
    """P-tuning v2's and ChatGLM's encoder, from its description: embedding, then an MLP or not."""

    def __init__(self, layers: int, heads: int, size: int, *, mlp: bool) -> None:
        super().__init__()
        self.shape = (layers, 2, heads, size)
        total = layers * 2 * heads * size
        self.embedding = nn.Embedding(P, 11 if mlp else total)
        if mlp:
            self.trans = nn.Sequential(nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, total))

    def forward(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """k and v per layer, (heads, P, size), as the models' get_prompt splits them."""
        flat = self.embedding.weight
        flat = self.trans(flat) if hasattr(self, "trans") else flat
        parts = flat.view(P, *self.shape).permute(1, 2, 3, 0, 4)
        return [(part[0], part[1]) for part in parts]


@pytest.mark.parametrize("mlp", [False, True], ids=["table", "mlp"])
@pytest.mark.parametrize(
    ("start", "position"), [("", "shift"), ("transformer.", "none")], ids=["P-tuning-v2", "ChatGLM"]
)
def test_checkpoints_of_p_tuning_v2_and_chatglm(start, position, mlp, tmp_path, capsys):
    from safetensors.torch import save_file

    theirs = TheirEncoder(3, 2, 8, mlp=mlp)
    state = {f"{start}prefix_encoder.{k}": v.contiguous() for k, v in theirs.state_dict().items()}
    state[f"{start}word_embeddings.weight"] = torch.randn(3, 3)
    save_file(state, tmp_path / "model.safetensors")
    case = Case("LLaMA")
    prefix = prefixes.load_prefix_encoder(case.model, tmp_path / "model.safetensors")
    assert prefix.position == position
    worst = max(
        difference(a, b)
        for ours, own in zip(prefix.encoder(), theirs(), strict=True)
        for a, b in zip(ours, own, strict=True)
    )
    with capsys.disabled():
        print(f"\n{start or 'P-tuning-v2'} {'MLP' if mlp else 'table'}: {worst:.1e}")
    assert worst <= (1e-5 if mlp else 0.0)  # float32 sums of 11 and 7 products of numbers around 1
    prefixes.save_prefix_encoder(case.model, tmp_path / "out.safetensors")
    other = Case("LLaMA")
    prefixes.load_prefix_encoder(other.model, tmp_path / "out.safetensors", position=position)
    assert torch.equal(other.logits(), case.logits())
    torch.save({k: nn.Parameter(v) for k, v in state.items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for source in (tmp_path / "pytorch_model.bin", tmp_path):  # as the trainer's folder has it
        other = Case("LLaMA")
        assert prefixes.load_prefix_encoder(other.model, source).position == position
        assert torch.equal(other.logits(), case.logits())


SETTINGS = {
    "table": {}, "frozen": {"frozen": 2}, "gated": {"gated": True}, "mlp": {"hidden": 6},
    "always": {"window": "always"}, "none": {"position": "none"},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["Mistral, window", "T5", "BERT"])
def test_own_files_hold_everything(family, settings, tmp_path):
    case, again = Case(family), Case(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the MLP's size
        prefix = mp.attach_prefix(case.model, P, init_std=0.5, **SETTINGS[settings])
    with torch.no_grad():
        for parameter in mp.adapter_parameters(case.model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    prefixes.save_prefix(case.model, tmp_path)
    found = prefixes.load_prefix(again.model, tmp_path)
    assert (found.position, found.window, found.locations) == (
        prefix.position, prefix.window, prefix.locations,
    )  # fmt: skip
    assert found.encoder.hidden is None and found.encoder.frozen == prefix.encoder.frozen
    assert difference(again.logits(), case.logits()) <= TOLERANCE


def trained_steps(case: Case, steps: int) -> None:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(mp.adapter_parameters(case.model), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        case.model(case.text, labels=case.text).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("attach", ["prefix", "mlp"])
def test_training_goes_on_from_a_file_with_its_network(attach, tmp_path, capsys):
    case, again = Case("LLaMA"), Case("LLaMA")
    if attach == "prefix":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mp.attach_prefix(case.model, P, hidden=6, embedding_dim=5)
    else:
        mp.attach_prompt(case.model, P, kind=attach, hidden=6)
    trained_steps(case, 3)
    prefixes.save_prefix(case.model, tmp_path, reparametrization=True)
    prefixes.load_prefix(again.model, tmp_path)
    trained_steps(case, 3)
    trained_steps(again, 3)
    with capsys.disabled():
        print(f"\nresumed {attach}: {difference(again.logits(), case.logits()):.1e}")
    assert difference(again.logits(), case.logits()) <= 1e-6  # the same operations


def test_gates_and_heads_are_saved(tmp_path):
    case, again = Case("LLaMA"), Case("LLaMA")
    prefix = mp.attach_prefix(case.model, P, gated=True)
    with torch.no_grad():
        for gate in prefix.encoder.gates:
            gate.normal_()
    prefixes.save_prefix(case.model, tmp_path / "gated")
    prefixes.load_prefix(again.model, tmp_path / "gated")
    assert torch.equal(again.logits(), case.logits())
    case, again = Case("BERT"), Case("BERT")
    mp.attach_prefix(case.model, P)
    with torch.no_grad():
        case.model.classifier.copy.weight.normal_()
    prefixes.save_prefix(case.model, tmp_path / "head")
    prefixes.load_prefix(again.model, tmp_path / "head")
    assert torch.equal(again.logits(), case.logits())
    with mp.disable_adapters(again.model):
        assert not torch.equal(again.logits(), case.logits())


@pytest.mark.parametrize(
    ("family", "attach", "message"),
    [
        ("LLaMA", lambda m: mp.attach_prefix(m, P, position="none"), "position='none'"),
        ("LLaMA", lambda m: mp.attach_prefix(m, P, gated=True, position="shift"), "a gated prefix"),
        ("Mistral, window", lambda m: mp.attach_prefix(m, P), "window='always'"),
        ("T5", lambda m: mp.attach_prefix(m, P), "a prefix in"),
    ],
)
def test_what_pefts_format_cannot_say_is_refused(family, attach, message, tmp_path):
    case = Case(family)
    attach(case.model)
    with pytest.raises(ValueError, match=message):
        mp.save_peft(case.model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_lora_and_a_prefix_of_one_name_are_refused_and_of_two_names_written(tmp_path):
    case = Case("LLaMA")
    mp.inject_lora(case.model, "all-linear", rank=2)
    mp.attach_prefix(case.model, P, name="deep")
    mp.save_peft(case.model, tmp_path / "both")
    assert (tmp_path / "both" / "deep" / "adapter_config.json").is_file()
    other = Case("LLaMA")
    mp.load_peft(other.model, tmp_path / "both")
    mp.load_peft(other.model, tmp_path / "both" / "deep", name="deep")
    assert torch.equal(other.logits(), case.logits())
    third = Case("LLaMA")
    mp.inject_lora(third.model, "all-linear", rank=2)
    mp.attach_prefix(third.model, P)
    with pytest.raises(ValueError, match="a name of its own"):
        mp.save_peft(third.model, tmp_path / "mixed")


LSTM = {"kind": "prompt_encoder", "embedding_dim": 32, "network": "lstm"}


def unsealed(directory) -> None:
    """Weights without the configuration that they were saved with, as older files were."""
    from minipeft.io.files import read_tensors, write_tensors

    for path in directory.glob("*.safetensors"):
        write_tensors(path, read_tensors(path))


def damage(path, change) -> None:
    unsealed(path.parent)
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(prefix_length=6), r"expected .* shape \(6, 96\)"),
        (lambda c: c.update(prefix_length=-1), "prefix_length is -1"),
        (lambda c: c.update(prefix_length=True), "prefix_length is True"),
        (lambda c: c.update(kind="other"), "kind is 'other', expected one of"),
        (lambda c: c.update(kv_shapes=[[2, 8, 4]] * 3), "made for layers"),
        (lambda c: c.update(kv_shapes=[[2, 8, 8]] * 2), "a name for each layer"),
        (lambda c: c.update(kv_shapes="x"), "kv_shapes is 'x', expected three sizes"),
        (lambda c: c.update(position="left"), "position='left'"),
        (lambda c: c.update(window=7), "window is 7"),
        (lambda c: c.update(frozen=9), "frozen=9"),
        (lambda c: c.update(gated="yes"), "gated is 'yes'"),
        (lambda c: c.update(dropout="a"), "dropout is 'a'"),
        (lambda c: c.update(hidden=4), "encoder.embedding is missing"),
        (lambda c: c.update(format=2), "format is 2, expected 1"),
        (lambda c: c.update(locations=["nowhere"] * 3), "nowhere"),
        (lambda c: c.update(prefix_length=2**30), "below 16777216"),
        (lambda c: c.update(prefix_length=2**23), r"expected .* shape \(8388608, 96\)"),
        (lambda c: c.update(hidden=2**23), "encoder.embedding is missing"),
        (lambda c: c.update(format=True), "format is True"),
        (lambda c: c.update(heads=["classifier"]), "heads"),
        (lambda c: c.update(dropout=float("nan")), "dropout"),
        (lambda c: c.update(kind="prompt", embedding_dim=31), "embeddings have"),
        (lambda c: c.update(LSTM), "of an LSTM only the table can be read"),
    ],
)
def test_damaged_files_leave_the_model_as_it_was(change, message, tmp_path):
    case, other = Case("LLaMA"), Case("LLaMA")
    mp.attach_prefix(case.model, P)
    prefixes.save_prefix(case.model, tmp_path)
    damage(tmp_path / "prefix_config.json", change)
    before, names = other.logits(), set(other.model.state_dict())
    with pytest.raises(ValueError, match=message):
        prefixes.load_prefix(other.model, tmp_path)
    assert set(other.model.state_dict()) == names and torch.equal(other.logits(), before)
    assert all(p.requires_grad for p in other.model.parameters())


def test_each_loader_names_the_other_and_the_model_that_a_file_is_of(tmp_path):
    case = Case("LLaMA")
    mp.attach_prefix(case.model, P)
    mp.save_peft(case.model, tmp_path / "peft")
    prefixes.save_prefix(case.model, tmp_path / "own")
    with pytest.raises(ValueError, match=r"use load_prefix"):
        mp.load_peft(Case("LLaMA").model, tmp_path / "own")
    with pytest.raises(ValueError, match="use load_peft"):
        prefixes.load_prefix(Case("LLaMA").model, tmp_path / "peft")
    for family in ("Mistral", "T5"):  # Mistral has the same shapes
        with pytest.raises(ValueError, match="made for a LlamaForCausalLM"):
            prefixes.load_prefix(Case(family).model, tmp_path / "own")


def test_adapters_of_other_models_are_refused(tmp_path):
    case = Case("LLaMA")
    mp.attach_prefix(case.model, P)
    mp.save_peft(case.model, tmp_path / "peft")
    prefixes.save_prefix(case.model, tmp_path / "own")
    for family, message in (("Qwen3", "96 columns; the 3 layers"), ("T5", "encoder-decoder")):
        with pytest.raises(ValueError, match=message):
            mp.load_peft(Case(family).model, tmp_path / "peft")
    with pytest.raises(ValueError, match="made for a LlamaForCausalLM"):
        prefixes.load_prefix(Case("Qwen3").model, tmp_path / "own")
    with pytest.raises(ValueError, match="called 'default' already"):
        mp.load_peft(case.model, tmp_path / "peft")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: cannot be read as tensors"):
            prefixes.load_prefix_encoder(Case("LLaMA").model, source)
        with pytest.raises(ValueError, match=r"load_prefix_encoder\(model, '.*'\) reads it"):
            prefixes.load_prefix(Case("LLaMA").model, source)
    with pytest.raises(ValueError, match=r"expected a file that ends in \.safetensors, \.bin"):
        prefixes.load_prefix_encoder(Case("LLaMA").model, tmp_path / "prefix.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        prefixes.load_prefix_encoder(Case("LLaMA").model, tmp_path / "empty")


def test_save_pretrained_writes_what_it_can_and_the_rest_beside_it(tmp_path):
    case = Case("LLaMA")
    mp.inject_lora(case.model, "all-linear", rank=2)
    mp.attach_prefix(case.model, P, position="none")
    for parameter in mp.adapter_parameters(case.model):
        nn.init.normal_(parameter, std=0.1)
    case.model.save_pretrained(tmp_path)
    other = Case("LLaMA")
    mp.load_peft(other.model, tmp_path)
    prefixes.load_prefix(other.model, tmp_path)
    assert torch.equal(other.logits(), case.logits())


@pytest.mark.parametrize("first", ["peft", "own"])
def test_a_checkpoint_of_lora_prefix_and_head_of_one_name_comes_back(first, tmp_path):
    case, other = Case("BERT"), Case("BERT")
    mp.inject_lora(case.model, ["query"], rank=2, head="classifier")
    mp.attach_prefix(case.model, P)
    for parameter in mp.adapter_parameters(case.model):
        nn.init.normal_(parameter, std=0.1)
    case.model.save_pretrained(tmp_path)
    loads = [mp.load_peft, prefixes.load_prefix]
    for load in loads if first == "peft" else loads[::-1]:
        load(other.model, tmp_path)
    assert torch.equal(other.logits(), case.logits())


@pytest.mark.parametrize("attach", ["mlp", "frozen", "prompt"])
def test_checkpoints_keep_what_training_needs(attach, tmp_path):
    case, again = Case("LLaMA"), Case("LLaMA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if attach == "prompt":
            mp.attach_prompt(case.model, P, kind="mlp", hidden=6)
        else:
            settings = {"mlp": {"hidden": 6}, "frozen": {"frozen": 2}}
            mp.attach_prefix(case.model, P, **settings[attach])
    case.model.save_pretrained(tmp_path)
    prefixes.load_prefix(again.model, tmp_path)
    shapes = [
        [(tuple(p.shape), p.requires_grad) for p in mp.adapter_parameters(m)]
        for m in (case.model, again.model)
    ]
    assert shapes[0] == shapes[1] and difference(again.logits(), case.logits()) == 0


def test_a_directory_used_again_holds_the_last_save_only(tmp_path):
    case = Case("LLaMA")
    mp.attach_prefix(case.model, P)
    case.model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    other = Case("LLaMA")
    mp.attach_prefix(other.model, P, position="none")
    other.model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    third = Case("LLaMA")
    mp.inject_lora(third.model, "all-linear", rank=2)
    third.model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert not (tmp_path / "prefix_config.json").exists()


def test_a_file_cannot_train_or_overwrite_the_base(tmp_path):
    from minipeft.io.files import read_tensors, write_tensors

    case, other = Case("LLaMA"), Case("LLaMA")
    mp.attach_prefix(case.model, P)
    prefixes.save_prefix(case.model, tmp_path)
    tensors = read_tensors(tmp_path / "prefix.safetensors")
    for place in ("model", "model.layers", "model.layers.0"):
        inside = other.model.get_submodule(place).state_dict()
        if place.endswith("0"):
            inside = {k: v.long() for k, v in inside.items()}
        more = {f"head.{place}.{k}": v for k, v in inside.items()}
        write_tensors(tmp_path / "prefix.safetensors", tensors | more)
        damage(tmp_path / "prefix_config.json", lambda c, place=place: c.update(heads=[place]))
        message = r"int64 of shape .*; expected floats" if place.endswith("0") else "is no head"
        with pytest.raises(ValueError, match=message):
            prefixes.load_prefix(other.model, tmp_path)
        assert all(p.requires_grad for p in other.model.parameters())


@pytest.mark.parametrize("modules", [["norm"], ["lm_head", "embed_tokens"]])
def test_modules_deep_in_the_model_train_and_are_saved(modules, tmp_path):
    case, again, third = Case("LLaMA"), Case("LLaMA"), Case("LLaMA")
    mp.attach_prefix(case.model, P)
    mp.train_modules(case.model, modules)
    for parameter in mp.adapter_parameters(case.model):
        nn.init.normal_(parameter, std=0.1)
    prefixes.save_prefix(case.model, tmp_path / "own")
    prefixes.load_prefix(again.model, tmp_path / "own")
    assert torch.equal(again.logits(), case.logits())
    mp.save_peft(case.model, tmp_path / "peft")
    mp.load_peft(third.model, tmp_path / "peft")
    assert torch.equal(third.logits(), case.logits())
    theirs = loaded(Case("LLaMA").model, tmp_path / "peft")
    assert difference(logits_of(theirs, case.text), case.logits()) <= TOLERANCE


def test_a_prefix_of_other_layers_and_the_same_width_is_refused(tmp_path):
    case = Case("Qwen3")  # 3 layers, 2 heads of 16
    mp.attach_prefix(case.model, P)
    mp.save_peft(case.model, tmp_path)
    for family in ("BERT", "BLOOM"):  # 3 layers, 4 heads of 8
        with pytest.raises(ValueError, match="with 2 key/value heads"):
            mp.load_peft(Case(family).model, tmp_path)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p_tuning"])
def test_gathered_values_are_what_is_written(kind, tmp_path):
    case = Case("LLaMA")
    if kind == "prefix":
        prefix = mp.attach_prefix(case.model, P)
    else:
        prefix = mp.attach_prompt(case.model, P, kind="table" if kind == "prompt" else "mlp")
    state = {n: p.detach() + 1 for n, p in case.model.named_parameters() if p.requires_grad}
    mp.save_peft(case.model, tmp_path / "peft", state_dict=state)
    prefixes.save_prefix(case.model, tmp_path / "own", state_dict=state)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.add_(1)
    for load, folder in ((mp.load_peft, "peft"), (prefixes.load_prefix, "own")):
        other = Case("LLaMA")
        load(other.model, tmp_path / folder)
        assert difference(other.logits(), case.logits()) <= TOLERANCE


@pytest.mark.parametrize(
    ("made_on", "attach", "family", "message"),
    [
        ("GPT-2", lambda m: mp.attach_prompt(m, P), "BERT", "is not a decoder"),
        ("GPT-2", lambda m: mp.attach_prompt(m, P), "T5", "is not a decoder"),
    ],
)
def test_files_are_refused_where_attaching_would_be(made_on, attach, family, message, tmp_path):
    case, other = Case(made_on), Case(family)
    attach(case.model)
    prefixes.save_prefix(case.model, tmp_path)

    def forge(config):
        """As if it were of this model, so that the later checks are reached."""
        config.pop("model_type")
        config.update({"position": "none"} if family == "T5" else {})

    damage(tmp_path / "prefix_config.json", forge)
    before = other.logits()
    with pytest.raises(ValueError, match=message):
        prefixes.load_prefix(other.model, tmp_path)
    assert torch.equal(other.logits(), before)


def test_tensors_that_a_prefix_cannot_hold_are_refused(tmp_path):
    from minipeft.io.files import write_tensors

    case = Case("LLaMA")
    mp.attach_prefix(case.model, P)
    prefixes.save_prefix(case.model, tmp_path)
    for bad, message in (
        (torch.ones(P, 96).long(), "expected floats of 16 bits"),
        (torch.full((P, 96), 1e300, dtype=torch.float64), "NaN or Inf"),
        (torch.ones(P, 96) + 0j, "C64, which is not"),
    ):
        write_tensors(tmp_path / "prefix.safetensors", {"flat": bad})
        with pytest.raises(ValueError, match=message):
            prefixes.load_prefix(Case("LLaMA").model, tmp_path)
    with torch.no_grad():
        case.model.minipeft_prefix.encoder.tables[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        prefixes.save_prefix(case.model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["half", "train", "keys", "training", "_modules"])
def test_names_that_a_module_cannot_hold_change_nothing(name):
    case = Case("LLaMA")
    before = case.logits()
    with pytest.raises(ValueError, match=r"means something in a ModuleDict|cannot name"):
        mp.attach_prefix(case.model, P, name=name)
    assert torch.equal(case.logits(), before) and not hasattr(case.model, "minipeft_prefix")
    assert not any(m._forward_pre_hooks for m in case.model.modules())


def test_a_head_that_cannot_train_now_changes_nothing():
    case = Case("BERT")
    mp.inject_lora(case.model, ["query"], rank=2, head="classifier")
    mp.merge(case.model)
    before = case.logits()
    with pytest.raises(ValueError, match="is merged"):
        mp.attach_prefix(case.model, P, name="b")
    assert torch.equal(case.logits(), before) and not hasattr(case.model, "minipeft_prefix")
    other = Case("BERT")
    mp.attach_prefix(other.model, P, train_head=False)
    mp.use_adapters(other.model, rows=["default", None])
    with pytest.raises(ValueError, match="a head would change for all of them"):
        mp.attach_prefix(other.model, P, name="b")


@pytest.mark.parametrize("family", ["BERT", "LLaMA"])
def test_unexpected_keys_are_named_or_reported(family, tmp_path):
    from minipeft.io.files import read_tensors, write_tensors

    case = Case(family)
    mp.attach_prefix(case.model, P, position="shift")
    mp.save_peft(case.model, tmp_path)
    tensors = read_tensors(tmp_path / "adapter_model.safetensors")
    more = {"base_model.zzz.weight": torch.ones(2)}
    write_tensors(tmp_path / "adapter_model.safetensors", tensors | more)
    with pytest.raises(ValueError, match="unexpected 'zzz'"):
        mp.load_peft(Case(family).model, tmp_path)
    found = mp.load_peft(Case(family).model, tmp_path, strict=False)
    assert found.unexpected == ["zzz"]
    with pytest.raises(TypeError, match="expected a transformers model"):
        mp.load_peft(nn.Sequential(nn.Linear(2, 2)), tmp_path, strict=False)
