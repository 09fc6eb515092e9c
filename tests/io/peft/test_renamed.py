"""Adapters made before transformers 5 changed the names of modules."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minipeft as mp
from tests.checkpoint_families import build, outputs

pytest.importorskip("transformers")
OLD = {  # by family: the names that modules had in files, the targets by their old and new names
    "ViT": ([
        ("vit.layers.", "vit.encoder.layer."), (".attention.q_proj", ".attention.attention.query"),
        (".attention.v_proj", ".attention.attention.value"), (".mlp.fc1", ".intermediate.dense"),
    ], ["query", "value", "intermediate.dense"], ["q_proj", "v_proj", "fc1"]),
    "LLaVA": ([
        ("model.language_model.", "language_model.model."),
    ], r"language_model\.model\..*\.q_proj", r"model\.language_model\..*\.q_proj"),
    "GPT-NeoX": ([("lm_head", "embed_out")], ["embed_out"], ["lm_head"]),
    "Qwen2-VL": ([("model.language_model.", "model.")], r"model\.layers\..*\.q_proj",
                 r"model\.language_model\..*\.q_proj"),
}  # fmt: skip


def saved(family, path, *, without=()):
    """An adapter's folder with the old names, and the model that it was made on."""
    renames, old, new = OLD[family]
    model = build(family)
    mp.inject_lora(model, new, rank=2, head="classifier" if family == "ViT" else None)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    mp.save_peft(model, path)
    tensors = {}
    for key, value in load_file(path / "adapter_model.safetensors").items():
        own = key.removeprefix("base_model.model.")
        for after, before in renames:
            own = own.replace(after, before)
        if not any(part in own for part in without):
            tensors[f"base_model.model.{own}"] = value
    save_file(tensors, path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    config["target_modules"] = old
    (path / "adapter_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("family", OLD)
def test_an_adapter_with_old_names_loads(tmp_path, family):
    model = saved(family, tmp_path / "a")
    again = build(family)
    names = mp.load_peft(again, tmp_path / "a")
    assert names and not names.missing and not names.unexpected
    assert torch.equal(outputs(again, family), outputs(model, family))
    mp.save_peft(again, tmp_path / "b")  # under today's names
    third = build(family)
    mp.load_peft(third, tmp_path / "b")
    assert torch.equal(outputs(third, family), outputs(model, family))


def test_an_adapter_with_old_names_that_is_not_complete_is_refused(tmp_path):
    saved("ViT", tmp_path / "a", without=["layer.1.attention.attention.value"])
    model = build("ViT")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"no keys for 'vit\.layers\.1\.attention\.v_proj'"):
        mp.load_peft(model, tmp_path / "a")
    assert dict(model.named_modules()) == before


def test_a_name_that_fits_nothing_is_named(tmp_path):
    saved("ViT", tmp_path / "a")
    with pytest.raises(ValueError, match=r"unexpected 'base_model\.model\.vit\.encoder\.layer\.0"):
        mp.load_peft(build("LLaMA"), tmp_path / "a")


def test_an_adapter_of_experts_that_were_joined_says_what_to_do(tmp_path):
    model = build("Mixtral")
    mp.inject_lora(model, ["q_proj"], rank=2)
    mp.save_peft(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1.lora_A.weight"
    save_file({**load_file(file), key: torch.ones(2, 64)}, file)
    with pytest.raises(ValueError, match=r"experts\.1\.w1.*joined.*experts\.gate_up_proj.*PEFT"):
        mp.load_peft(build("Mixtral"), tmp_path / "a")


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_what_peft_makes_of_such_an_adapter_loads(tmp_path):
    """PEFT joins the factors of one expert's matrices, and names the parameters by their ends."""
    peft = pytest.importorskip("peft")
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, rows, columns in (("w1", 96, 64), ("w2", 64, 96), ("w3", 96, 64)):
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}"
                tensors[f"{key}.{name}.lora_A.weight"] = torch.randn(2, columns) * 0.1
                tensors[f"{key}.{name}.lora_B.weight"] = torch.randn(rows, 2) * 0.1
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    theirs = peft.PeftModel.from_pretrained(build("Mixtral"), tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    ours = build("Mixtral")
    names = mp.load_peft(ours, tmp_path / "b")
    assert [name.rpartition(".")[2] for name in names] == ["gate_up_proj", "down_proj"] * 2
    expected = outputs(theirs, "Mixtral")
    assert not torch.equal(expected, outputs(build("Mixtral"), "Mixtral"))
    assert torch.equal(outputs(ours, "Mixtral"), expected)
