"""Names in files and in models, by transformers' own tables."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from minipeft.integrations.transformers.file_names import (
    ModuleNames,
    may_lack,
    read_names,
    write_names,
)
from tests.checkpoint_families import FAMILIES, build

pytest.importorskip("transformers")
FEW = ["LLaMA", "GPT-NeoX", "Mixtral", "ViT", "LLaVA", "Qwen2-VL", "Gemma 3", "DINOv2, SwiGLU",
       "ESM", "Marian", "Qwen3-VL-MoE"]  # fmt: skip


def own_names(model):
    return list(model.state_dict())


def test_other_models_have_one_name_for_both():
    model = nn.Sequential(nn.Linear(2, 2))
    own = own_names(model)
    found = read_names(model, own, [*own, "1.weight"])
    assert found.names == {name: name for name in own}
    assert found.unknown == {"1.weight": "1.weight"} and not found.joined and not found.ignored
    assert write_names(model, own, own) == {name: name for name in own}
    assert ModuleNames(model, ["0"]).find("1") is None
    assert may_lack(model, own) == []


def test_a_model_of_ones_own_imports_no_transformers(plain_python):
    script = """
import sys
from torch import nn
from minipeft.integrations.transformers.file_names import read_names
read_names(nn.Linear(2, 2), ["weight"], ["weight"])
print("transformers" in sys.modules)
"""
    assert plain_python(script).strip() == "False"


@pytest.mark.parametrize("family", FEW)
def test_what_transformers_writes_is_found(tmp_path, family):
    """Every tensor that save_pretrained writes, and nothing else, becomes the model's."""
    from safetensors.torch import load_file

    model = build(family)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    own = model.state_dict()
    found = read_names(model, own, written)
    values = {name: written[key] for key, name in found.names.items()}
    for join in found.joined:
        values |= join({key: written[key] for key in join.keys})
    assert not found.unknown
    for name, value in values.items():
        assert torch.equal(value, own[name]), name
    lacking = own.keys() - values.keys()
    held = {own[name].data_ptr() for name in values}
    assert all(own[n].data_ptr() in held or n in may_lack(model, lacking) for n in lacking)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in FEW else pytest.mark.slow) for f in FAMILIES],
)
def test_written_names_are_read_back(family):
    model = build(family)
    own = own_names(model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    keys = write_names(model, own, own, shapes)
    assert list(keys) == own and len(set(keys.values())) == len(own)
    back = {key: name for name, key in keys.items()}
    found = read_names(model, own, back, lambda key: shapes[back[key]])
    assert found.names == back and not found.joined


def test_names_are_those_that_transformers_writes(tmp_path):
    from safetensors.torch import load_file

    model = build("ViT")
    model.save_pretrained(tmp_path)
    own = own_names(model)
    assert set(write_names(model, own, own).values()) == set(
        load_file(tmp_path / "model.safetensors")
    )


def test_joined_tensors_move_without_values():
    model = build("Mixtral")
    own = model.state_dict()
    keys = [f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight" for w in ("w1", "w3", "w2")
            for e in (1, 0, 3, 2)]  # fmt: skip
    found = read_names(model, own, keys)
    assert [join.first for join in found.joined] == [
        "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    ]  # fmt: skip
    gate_up = found.joined[0]
    assert [key[-19:] for key in gate_up.keys] == [
        f"experts.{e}.{w}.weight" for w in ("w1", "w3") for e in range(4)
    ]
    shapes = gate_up({key: torch.empty(64, 64, device="meta") for key in gate_up.keys})
    assert {name: tuple(v.shape) for name, v in shapes.items()} == {
        "model.layers.0.mlp.experts.gate_up_proj": (4, 128, 64)
    }
    values = {key: torch.empty(64, 64) for key in gate_up.keys}
    values[gate_up.keys[0]] = torch.empty(64, 32)
    with pytest.raises(ValueError, match=r"gate_up_proj.*w1.*is a tensor missing"):
        gate_up(values)


def test_two_tensors_for_one_are_refused():
    model = build("LLaMA")
    with pytest.raises(ValueError, match=r"model\.norm\.weight and norm\.weight are both"):
        read_names(model, own_names(model), ["model.norm.weight", "norm.weight"])


def test_what_older_files_hold_is_ignored_with_a_reason():
    model = build("BERT")
    own = own_names(model)
    keys = ["bert.embeddings.position_ids", "bert.embeddings.LayerNorm.gamma",
            "bert.embeddings.LayerNorm.beta", "cls.predictions.bias"]  # fmt: skip
    found = read_names(model, own, keys)
    assert found.ignored == {keys[0]: "a buffer that the model computes"}
    assert found.names == {
        keys[1]: "bert.embeddings.LayerNorm.weight", keys[2]: "bert.embeddings.LayerNorm.bias"
    }  # fmt: skip
    assert found.unknown == {keys[3]: keys[3]}


def test_a_table_that_cannot_be_inverted_is_refused(monkeypatch):
    """Two names of the model that only one name in files stands for, and no way around it."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    model = build("LLaMA")
    own = own_names(model)
    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping",
        lambda *_, **__: [WeightRenaming("q_proj", "k_proj")],
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM.*cannot be inverted.*q_proj.*state dict"
    ):
        write_names(model, own, own)


def test_modules_by_their_older_names():
    model = build("ViT")
    names = ModuleNames(model, [name for name, _ in model.named_modules() if name])
    old = "vit.encoder.layer.1.attention.attention.query"
    assert names.find(old) == "vit.layers.1.attention.q_proj"
    assert names.find("vit.encoder.layer.7.attention.attention.query") is None
    assert names.find("vit.layers.1.attention.q_proj") is None  # the model has it
    assert names.in_files()["vit.layers.1.attention.q_proj"] == old


def test_minipeft_needs_transformers_for_none_of_this():
    script = "import sys; sys.modules['transformers'] = None; import minipeft.io.bitsandbytes"
    subprocess.run([sys.executable, "-c", script], check=True)
