"""PEFT's cartridges: a prefix whose first positions do not train.  test_load.py has the outputs."""

import json

import pytest
import torch

import minipeft as mp
from minipeft.io.files import encoded, read_all, read_tensors, write_tensors

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS, CONFIG, KEY = "adapter_model.safetensors", "adapter_config.json", "prompt_embeddings"
IDS = torch.tensor([[1, 3, 5, 2], [4, 4, 0, 6]])
P = 4
ONLY_THEIRS = {"auto_mapping", "peft_version", "revision"}  # null, or of who wrote the file


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=20,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def in_peft(path, *, seed=1, **settings):
    """A cartridge of PEFT with random values, saved."""
    base = llama()
    torch.manual_seed(seed)
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **settings)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(path)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def steps(model, parameters):
    """Two steps of SGD."""
    optimizer = torch.optim.SGD(parameters, 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_a_cartridge_of_pefts_trains_here_as_it_does_there(frozen, tmp_path):
    theirs, ours = in_peft(tmp_path, num_frozen_tokens=frozen), llama()
    mp.load_peft(ours, tmp_path)
    encoder = ours.minipeft_prefix.encoder
    start = encoder.flat().detach().clone()
    assert encoder.frozen == frozen
    assert torch.equal(start, theirs.get_prompt_embedding_to_save("default"))
    # the same sums in float32, which attention may take in another order; logits are around 1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)
    steps(ours, [p for p in ours.parameters() if p.requires_grad])
    there = [p for p in theirs.parameters() if p.requires_grad]
    steps(theirs, there)
    after = theirs.get_prompt_embedding_to_save("default")
    torch.testing.assert_close(encoder.flat().detach(), after, rtol=0, atol=1e-6)
    assert torch.equal(encoder.flat()[:frozen], start[:frozen])
    assert not torch.equal(encoder.flat()[frozen:], start[frozen:])


@pytest.mark.parametrize("settings", [{}, {"hidden": 6}, {"dropout": 0.5}])
def test_a_frozen_prefix_is_written_as_pefts_cartridge(settings, tmp_path):
    in_peft(tmp_path / "theirs", num_frozen_tokens=2)
    ours = llama()
    encoder = mp.attach_prefix(ours, P, frozen=2, init_std=0.5, **settings).encoder
    mp.save_peft(ours, tmp_path / "ours")
    theirs, own = (json.loads((tmp_path / n / CONFIG).read_text()) for n in ("theirs", "ours"))
    assert own == {key: value for key, value in theirs.items() if key not in ONLY_THEIRS}
    (tensors, _), expected = (
        read_all(tmp_path / "ours" / WEIGHTS),
        read_tensors(tmp_path / "theirs" / WEIGHTS),
    )
    assert {k: (v.shape, v.dtype) for k, v in tensors.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    there = loaded.prompt_encoder["default"]
    assert there.num_frozen_tokens == 2
    assert torch.equal(there.frozen_embedding, encoder.flat()[:2])
    assert torch.equal(there.trainable_embedding, encoder.flat()[2:])
    torch.testing.assert_close(logits(loaded), logits(ours), rtol=0, atol=1e-6)
    again = llama()
    mp.load_peft(again, tmp_path / "ours")
    found = again.minipeft_prefix.encoder
    assert (found.frozen, found.dropout) == (2, encoder.dropout)
    assert torch.equal(found.flat(), encoder.flat())


def test_cartridges_that_peft_composes_load(tmp_path):
    from peft import compose_cartridge_adapters

    for name, frozen in (("a", 1), ("b", 2)):
        in_peft(tmp_path / name, seed=frozen, num_frozen_tokens=frozen)
    compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "both")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "both").eval()
    ours = llama()
    mp.load_peft(ours, tmp_path / "both")
    encoder = ours.minipeft_prefix.encoder
    assert (encoder.prefix_length, encoder.frozen) == (2 * P, 1)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)
    beside = llama()
    for name in ("a", "b"):
        mp.load_peft(beside, tmp_path / name, name=name)
    torch.testing.assert_close(logits(beside), logits(theirs), rtol=0, atol=1e-6)


def test_a_file_without_the_number_means_what_peft_means(tmp_path):
    in_peft(tmp_path, num_frozen_tokens=2)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["num_frozen_tokens"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).prompt_encoder["default"]
    ours = llama()
    mp.load_peft(ours, tmp_path)
    assert ours.minipeft_prefix.encoder.frozen == theirs.num_frozen_tokens == 1


REFUSED = {
    "as many frozen as there are": ({"num_frozen_tokens": P}, {}, "is 4 of num_virtual_tokens 4"),
    "fewer than none": ({"num_frozen_tokens": -1}, {}, "num_frozen_tokens is -1, expected a whole"),
    "truth": ({"num_frozen_tokens": True}, {}, "num_frozen_tokens is True"),
    "a fraction": ({"num_frozen_tokens": 1.0}, {}, "num_frozen_tokens is 1.0"),
    "nothing": ({"num_frozen_tokens": None}, {}, "num_frozen_tokens is None"),
    "an unknown field": ({"num_warm_tokens": 2}, {}, "num_warm_tokens = 2 is no field known"),
    "a field of prefix tuning": ({"prefix_projection": True}, {}, "prefix_projection = True is no"),
    "its field in prefix tuning": (
        {"peft_type": "PREFIX_TUNING"}, {}, "num_frozen_tokens = 1 is no field known",
    ),
    "another number of tokens": ({"num_virtual_tokens": 5}, {}, "4 rows; adapter_config.json says"),
    "no number of tokens": ({"num_virtual_tokens": None}, {}, "num_virtual_tokens is None"),
    "other layers": ({"num_layers": 3}, {}, "a prefix of 3 layers"),
    "other heads": ({"num_attention_heads": 4}, {}, "with 4 key/value heads"),
    "other columns": ({}, {KEY: torch.zeros(P, 30)}, "30 columns; the 2 layers .* take 32"),
    "three dimensions": ({}, {KEY: torch.zeros(P, 4, 8)}, "no floating-point 'prompt_embeddings'"),
    "whole numbers": ({}, {KEY: torch.zeros(P, 32, dtype=torch.int64)}, "no floating-point"),
    "values that are not finite": ({}, {KEY: torch.full((P, 32), torch.inf)}, "NaN or Inf"),
    "no table": ({}, {KEY: None}, "no floating-point 'prompt_embeddings'"),
    "a key too many": ({}, {"frozen_embedding": torch.zeros(1, 32)}, "unexpected 'frozen_embed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_damaged_cartridge_leaves_the_model_as_it_was(kind, tmp_path):
    in_peft(tmp_path)
    config, tensors, message = REFUSED[kind]
    text = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(text | config))
    changed = read_tensors(tmp_path / WEIGHTS) | tensors
    write_tensors(tmp_path / WEIGHTS, {k: v for k, v in changed.items() if v is not None})
    model = llama()
    before, names = logits(model), set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        mp.load_peft(model, tmp_path)
    assert set(model.state_dict()) == names and torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_positions_said_twice_are_refused(tmp_path):
    mp.attach_prefix(ours := llama(), P, frozen=1)
    mp.save_peft(ours, tmp_path)
    tensors, metadata = read_all(tmp_path / WEIGHTS)
    metadata["minipeft_training"] = json.dumps({"prefix": {"frozen": 2}})
    (tmp_path / WEIGHTS).write_bytes(encoded(tensors, metadata))
    with pytest.raises(ValueError, match="is not how a prefix trains"):
        mp.load_peft(llama(), tmp_path)
