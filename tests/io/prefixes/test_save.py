"""Prefixes in files: those of one's own attention, beside LoRA, and what their training needs."""

import json

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io import prefixes
from minipeft.io.files import encoded, read_all
from minipeft.layers.prompt import PromptEmbedding

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[1, 3, 5, 2], [4, 4, 0, 6]])


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=20,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


class Attention(nn.Module):
    """A model with attention of its own that holds a prefix encoder."""

    def __init__(self, encoder=None):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(8, 24)
        if encoder is not None:
            self.prefix = encoder

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return mp.prefix_attention(q, k, v, *self.prefix()[0])


def encoder(length=3, **settings):
    torch.manual_seed(1)
    made = mp.PrefixEncoder([(2, 4, 4)], length, **settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


SETTINGS = [{"dropout": 0.4}, {"frozen": 2}, {"dropout": 0.4, "frozen": 1}]


@pytest.mark.filterwarnings("ignore:attach_prefix. the MLP")
@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("way", ["peft", "own"])
def test_prefixes_train_from_a_file_as_they_would_have_without_one(settings, way, hidden, tmp_path):
    """PEFT's format has no dropout of a prefix and no frozen rows; an MLP is folded by both."""
    model, again = llama(), llama()
    prefix = mp.attach_prefix(model, 4, hidden=hidden, **settings)
    if way == "peft":
        mp.save_peft(model, tmp_path)
        mp.load_peft(again, tmp_path)
    else:
        prefixes.save_prefix(model, tmp_path)
        prefixes.load_prefix(again, tmp_path)
    found = again.minipeft_prefix.encoder
    for key in ("dropout", "frozen", "prefix_length"):
        assert getattr(found, key) == getattr(prefix.encoder, key)
    if hidden is not None:  # what trains is another thing, a table
        return
    for net in (model, again):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
        for _ in range(2):
            torch.manual_seed(3)
            optimizer.zero_grad()
            net.train()(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    assert torch.equal(found.flat(), prefix.encoder.flat())


@pytest.mark.parametrize(
    "training",
    [{"dropout": 2.0}, {"dropout": "a"}, {"frozen": 4}, {"frozen": -1}, {"frozen": True}, [], 3,
     {"hidden": 3}, {"dropout": float("nan")}],
)  # fmt: skip
def test_what_a_file_says_of_a_prefix_is_checked(training, tmp_path):
    model, path = llama(), tmp_path / "adapter_model.safetensors"
    mp.attach_prefix(model, 4, dropout=0.1)
    mp.save_peft(model, tmp_path)
    tensors, metadata = read_all(path)
    own = {k: v for k, v in metadata.items() if k == "minipeft_config"}
    path.write_bytes(
        encoded(tensors, own | {"minipeft_training": json.dumps({"prefix": training})})
    )
    again = llama()
    with pytest.raises(ValueError, match=r"prefix|dropout|frozen"):
        mp.load_peft(again, tmp_path)
    assert not hasattr(again, "minipeft_prefix") and all(
        p.requires_grad for p in again.parameters()
    )


@pytest.mark.filterwarnings("ignore:.*stands alone")
def test_lora_beside_a_prefix_of_ones_own_is_saved_and_the_prefix_with_it(tmp_path):
    model, x = Attention(encoder()), torch.randn(2, 5, 8)
    mp.inject_lora(model, ["qkv"], rank=2)
    nn.init.normal_(model.qkv.lora_b)
    assert mp.save_peft(model, tmp_path / "lora") == ["qkv"]
    prefixes.save_prefix(model.prefix, tmp_path / "prefix")
    again = Attention(prefixes.load_encoder(tmp_path / "prefix"))
    mp.load_peft(again, tmp_path / "lora")
    assert torch.equal(again(x), model(x))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_what_is_not_in_the_file_is_said(tmp_path):
    model = Attention(encoder())
    mp.inject_lora(model, ["qkv"], rank=2)
    with pytest.warns(UserWarning, match=r"save_prefix\(model\.prefix, path\): it is not in this"):
        mp.save_peft(model, tmp_path)
    model.prompt = PromptEmbedding(3, 8)
    with pytest.warns(UserWarning, match="2 in all"):
        mp.save_peft(model, tmp_path)
    with pytest.raises(ValueError, match=r"stands alone.*save_prefix\(model\.prefix"):
        mp.save_peft(Attention(encoder()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


FORMS = {
    "a table": {"dropout": 0.25},
    "frozen rows": {"frozen": 1},
    "gates": {"gated": True},
    "an MLP": {"hidden": 5, "embedding_dim": 7, "dropout": 0.5, "frozen": 1, "gated": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_an_encoder_comes_back_from_its_file(form, tmp_path):
    saved = encoder(**FORMS[form])
    prefixes.save_prefix(saved, tmp_path, reparametrization=True)
    target = mp.PrefixEncoder([(2, 4, 4)], 3, **{**FORMS[form], "dropout": 0.0})
    parameters = list(target.parameters())
    assert prefixes.load_prefix(target, tmp_path) is target
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))
    for found in (target, prefixes.load_encoder(tmp_path)):
        assert found.dropout == saved.dropout
        state = found.state_dict()
        assert state.keys() == saved.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in saved.state_dict().items())
        assert [p.requires_grad for p in found.parameters()] == [
            p.requires_grad for p in saved.parameters()
        ]


def test_a_folded_encoder_keeps_its_prefix_and_says_where_it_goes(tmp_path):
    saved = encoder(hidden=5, dropout=0.5)
    prefixes.save_prefix(saved, tmp_path)
    with pytest.raises(ValueError, match=r"hidden is None.*encoder's 5.*load_encoder"):
        prefixes.load_prefix(encoder(hidden=5), tmp_path)
    found = prefixes.load_prefix(encoder(hidden=5).bake(), tmp_path)
    assert torch.equal(found.flat(), saved.flat()) and found.dropout == 0.5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: encoder(4), "prefix_length is 3, the encoder's 4"),
        (lambda: mp.PrefixEncoder([(2, 4, 8)], 3), "kv_shapes"),
        (lambda: mp.PrefixEncoder([(2, 4, 4)] * 2, 3), "kv_shapes"),
        (lambda: encoder(frozen=1), "frozen is 0, the encoder's 1"),
        (lambda: encoder(gated=True), "gated is False"),
    ],
)
def test_an_encoder_of_another_form_is_left_as_it_was(other, message, tmp_path):
    prefixes.save_prefix(encoder(), tmp_path)
    target = other()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prefixes.load_prefix(target, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_an_encoder_of_ones_own_cannot_be_attached_and_an_attached_one_can_be_had(tmp_path):
    prefixes.save_prefix(encoder(), tmp_path / "own")
    with pytest.raises(ValueError, match="pass a PrefixEncoder in the place of the model"):
        prefixes.load_prefix(llama(), tmp_path / "own")
    model = llama()
    prefix = mp.attach_prefix(model, 4)
    prefixes.save_prefix(model, tmp_path / "attached")
    found = prefixes.load_encoder(tmp_path / "attached")
    assert torch.equal(found.flat(), prefix.encoder.flat())
    mp.attach_prompt(other := llama(), 3)
    prefixes.save_prefix(other, tmp_path / "prompt")
    with pytest.raises(ValueError, match="holds a prompt, which is no PrefixEncoder"):
        prefixes.load_encoder(tmp_path / "prompt")


def test_a_prefix_whose_values_are_elsewhere_or_not_finite_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no values here"):
        prefixes.save_prefix(encoder().to("meta"), tmp_path / "a")
    broken = encoder()
    nn.init.constant_(broken.tables[0], float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        prefixes.save_prefix(broken, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_files_of_two_saves_of_a_prefix_are_refused(tmp_path):
    for name, length in (("a", 3), ("b", 3)):
        made = encoder(length, dropout=0.5 if name == "a" else 0.0)
        prefixes.save_prefix(made, tmp_path / name)
    (tmp_path / "a" / "prefix.safetensors").rename(tmp_path / "b" / "prefix.safetensors")
    with pytest.raises(
        ValueError, match=r"saved with dropout = 0\.5, and prefix_config\.json says"
    ):
        prefixes.load_encoder(tmp_path / "b")
