"""Prefixes and prompts as files: PEFT's both ways, P-tuning v2's and ChatGLM's in, our own."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import minipeft as mp

pytest.importorskip("transformers")
from benchmarks.prefix_behaviours import Case, P, difference
from minipeft.io import ptuning

TOLERANCE = 1e-5  # float32, logits around 1, summed in another order
FAMILIES = [
    "LLaMA", "Qwen3", "GPT-2", "OPT", "BLOOM", "CodeGen", "Falcon, 40B kind", "Mistral, window",
    "Gemma3, window", "BERT", "RoBERTa",
]  # fmt: skip
CONFIGS = {
    "prefix": ("PrefixTuningConfig", {}),
    "prefix, MLP": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
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


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_a_p_tuning_network_of_ours_goes_to_peft(kind, tmp_path):
    case, again = Case("LLaMA"), Case("LLaMA")
    mp.attach_prompt(case.model, P, kind=kind, hidden=12)
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
    prefix = ptuning.load_prefix_encoder(case.model, tmp_path / "model.safetensors")
    assert prefix.position == position
    worst = max(
        difference(a, b)
        for ours, own in zip(prefix.encoder(), theirs(), strict=True)
        for a, b in zip(ours, own, strict=True)
    )
    with capsys.disabled():
        print(f"\n{start or 'P-tuning-v2'} {'MLP' if mlp else 'table'}: {worst:.1e}")
    assert worst <= (1e-5 if mlp else 0.0)  # float32 sums of 11 and 7 products of numbers around 1
    ptuning.save_prefix_encoder(case.model, tmp_path / "out.safetensors")
    other = Case("LLaMA")
    ptuning.load_prefix_encoder(other.model, tmp_path / "out.safetensors", position=position)
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
    ptuning.save_prefix(case.model, tmp_path)
    found = ptuning.load_prefix(again.model, tmp_path)
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


@pytest.mark.parametrize("attach", ["prefix", "lstm", "mlp"])
def test_training_goes_on_from_a_file_with_its_network(attach, tmp_path, capsys):
    case, again = Case("LLaMA"), Case("LLaMA")
    if attach == "prefix":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mp.attach_prefix(case.model, P, hidden=6, embedding_dim=5)
    else:
        mp.attach_prompt(case.model, P, kind=attach, hidden=6)
    trained_steps(case, 3)
    ptuning.save_prefix(case.model, tmp_path, reparametrization=True)
    ptuning.load_prefix(again.model, tmp_path)
    trained_steps(case, 3)
    trained_steps(again, 3)
    with capsys.disabled():
        print(f"\nresumed {attach}: {difference(again.logits(), case.logits()):.1e}")
    assert difference(again.logits(), case.logits()) <= 1e-6  # the same operations


def test_zero_gated_prompts_and_heads_are_saved(tmp_path):
    case, again = Case("LLaMA"), Case("LLaMA")
    prefix = mp.attach_zero_gated(case.model, P, n_layers=2)
    with torch.no_grad():
        for gate in prefix.encoder.source.gates:
            gate.normal_()
    ptuning.save_prefix(case.model, tmp_path / "zero")
    ptuning.load_prefix(again.model, tmp_path / "zero")
    assert torch.equal(again.logits(), case.logits())
    case, again = Case("BERT"), Case("BERT")
    mp.attach_prefix(case.model, P)
    with torch.no_grad():
        case.model.classifier.copy.weight.normal_()
    ptuning.save_prefix(case.model, tmp_path / "head")
    ptuning.load_prefix(again.model, tmp_path / "head")
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
        ("LLaMA", lambda m: mp.attach_zero_gated(m, P), "zero-gated"),
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


def damage(path, change) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(prefix_length=6), "expected \\(6, 96\\)"),
        (lambda c: c.update(prefix_length=-1), "prefix_length is -1"),
        (lambda c: c.update(prefix_length=True), "prefix_length is True"),
        (lambda c: c.update(kind="other"), "kind 'other'"),
        (lambda c: c.update(kv_shapes=[[2, 8, 8]] * 2), "made for layers"),
        (lambda c: c.update(kv_shapes="x"), "kv_shapes is x"),
        (lambda c: c.update(position="left"), "position='left'"),
        (lambda c: c.update(window=7), "window=7"),
        (lambda c: c.update(frozen=9), "frozen=9"),
        (lambda c: c.update(gated="yes"), "gated is 'yes'"),
        (lambda c: c.update(dropout="a"), "dropout is 'a'"),
        (lambda c: c.update(hidden=4), "missing or unexpected"),
        (lambda c: c.update(format=2), "format 2"),
        (lambda c: c.update(locations=["nowhere"]), "nowhere"),
    ],
)
def test_damaged_files_leave_the_model_as_it_was(change, message, tmp_path):
    case, other = Case("LLaMA"), Case("LLaMA")
    mp.attach_prefix(case.model, P)
    ptuning.save_prefix(case.model, tmp_path)
    damage(tmp_path / "prefix_config.json", change)
    before, names = other.logits(), set(other.model.state_dict())
    with pytest.raises(ValueError, match=message):
        ptuning.load_prefix(other.model, tmp_path)
    assert set(other.model.state_dict()) == names and torch.equal(other.logits(), before)
    assert all(p.requires_grad for p in other.model.parameters())


def test_adapters_of_other_models_are_refused(tmp_path):
    case = Case("LLaMA")
    mp.attach_prefix(case.model, P)
    mp.save_peft(case.model, tmp_path / "peft")
    ptuning.save_prefix(case.model, tmp_path / "own")
    for family, message in (("Qwen3", "96 columns; the 3 layers"), ("T5", "encoder-decoder")):
        with pytest.raises(ValueError, match=message):
            mp.load_peft(Case(family).model, tmp_path / "peft")
    with pytest.raises(ValueError, match="made for layers"):
        ptuning.load_prefix(Case("Qwen3").model, tmp_path / "own")
    with pytest.raises(ValueError, match="called 'default' already"):
        mp.load_peft(case.model, tmp_path / "peft")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickle"):
        ptuning.load_prefix_encoder(Case("LLaMA").model, tmp_path / "pytorch_model.bin")


def test_save_pretrained_writes_what_it_can_and_the_rest_beside_it(tmp_path):
    case = Case("LLaMA")
    mp.inject_lora(case.model, "all-linear", rank=2)
    mp.attach_prefix(case.model, P, position="none")
    for parameter in mp.adapter_parameters(case.model):
        nn.init.normal_(parameter, std=0.1)
    case.model.save_pretrained(tmp_path)
    other = Case("LLaMA")
    mp.load_peft(other.model, tmp_path)
    ptuning.load_prefix(other.model, tmp_path)
    assert torch.equal(other.logits(), case.logits())
