"""Names in files, names in models: renamed, joined from one tensor per expert, ignored, refused."""

import json

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io.bitsandbytes.weight import entries
from minipeft.io.shards import Reader
from minipeft.layers import NF4Experts
from tests.checkpoint_families import build, eager, outputs

transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402


def tensors_of(folder):
    with Reader(sorted(folder.glob("*.safetensors"))) as reader:
        return {key: reader.read(key) for key in reader.specs}


def coded(key, value, **settings):
    """bitsandbytes' entries of a dense weight, and its decoded values."""
    layer = mp.NF4Linear.from_weight(value, **settings)
    return entries(key, layer), layer.weight


def folder_with(path, family, change):
    """A checkpoint of the dense model whose tensors were changed; and the model."""
    model = build(family)
    model.save_pretrained(path)
    (file,) = path.glob("*.safetensors")
    save_file({k: v.contiguous() for k, v in change(tensors_of(path)).items()}, file)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps(config))
    return model


def empty(path):
    return eager(mp.meta_model(path)).eval()


def unchanged(model, path, match, **arguments):
    """Loading raises this, and leaves the model on the meta device with its modules."""
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=match):
        mp.load_quantized(model, path, **arguments)
    assert dict(model.named_modules()) == before
    assert all(p.is_meta for p in model.parameters())


def experts_in_4_bits(decoded, *, unless=lambda key: False, **settings):
    """Codes for every weight of an expert; `decoded` gets what they decode to."""

    def change(tensors):
        made = {}
        for key, value in tensors.items():
            if ".experts." in key and not unless(key):
                own, decoded[key] = coded(key, value, **settings)
                made |= own
            else:
                made[key] = value
        return made

    return change


def joined_by_hand(decoded, layer, names, experts, block="mlp"):
    """The weights of the experts of one layer, one under the other, stacked."""
    prefix = f"model.layers.{layer}.{block}.experts"
    return torch.stack([
        torch.cat([decoded[f"{prefix}.{e}.{name}.weight"] for name in names])
        for e in range(experts)
    ])  # fmt: skip


OLD = {  # by family: what a layer's mixture was called in files, and the matrices of an expert
    "Qwen3-MoE": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "Mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}


@pytest.mark.parametrize("family", OLD)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_one_4_bit_tensor_per_expert_is_joined_in_every_bit(tmp_path, family, double_quant, mmap):
    """Mixtral's MLP has 96 columns: blocks of 64 run over the ends of rows."""
    decoded = {}
    model = folder_with(tmp_path / "a", family,
                        experts_in_4_bits(decoded, double_quant=double_quant))  # fmt: skip
    ours = empty(tmp_path / "a")
    names = mp.load_quantized(ours, tmp_path / "a", mmap=mmap)
    assert names == [f"model.layers.{i}.mlp.experts.{w}" for i in (0, 1)
                     for w in ("gate_up_proj", "down_proj")]  # fmt: skip
    assert names.made[names[0]] == "made of 8 in the file" and not names.notes
    block, gate, up, down = OLD[family]
    with torch.no_grad():
        for number in (0, 1):
            experts = model.model.layers[number].mlp.experts
            experts.gate_up_proj.copy_(joined_by_hand(decoded, number, [gate, up], 4, block))
            experts.down_proj.copy_(joined_by_hand(decoded, number, [down], 4, block))
            for own in ("gate_up_proj", "down_proj"):
                layer = ours.get_submodule(f"model.layers.{number}.mlp.experts.{own}")
                assert isinstance(layer, NF4Experts)
                assert torch.equal(layer.weight, getattr(experts, own))
    assert torch.equal(outputs(ours, family), outputs(model, family))


@pytest.mark.parametrize("family", ["Qwen3-MoE", "Mixtral", "Qwen3-VL-MoE", "gpt-oss"])
def test_experts_come_back_from_save_quantized(tmp_path, family):
    """gpt-oss and Qwen3-VL have them as (experts, in, out); transformers may turn the latter's."""
    model = build(family)
    names = mp.quantize_model(model, experts=True)
    assert any(name.endswith("gate_up_proj") for name in names)
    mp.save_quantized(model, tmp_path / "a")
    ours = empty(tmp_path / "a")
    assert sorted(mp.load_quantized(ours, tmp_path / "a")) == sorted(names)
    for name, value in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert torch.equal(outputs(ours, family), outputs(model, family))


def test_experts_are_written_as_bitsandbytes_writes_a_parameter(tmp_path):
    """Its own reader, `replace_parameter_4bit_prequantized`, decodes them to the same weight."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = build("Qwen3-MoE")
    mp.quantize_model(model, experts=True)
    mp.save_quantized(model, tmp_path / "a")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = {k.removeprefix(f"{name}."): v for k, v in tensors_of(tmp_path / "a").items()
             if k.startswith(name)}  # fmt: skip
    holder = nn.Module()
    holder.weight = nn.Parameter(found.pop(name), requires_grad=False)
    parametrize.replace_parameter_4bit_prequantized(holder, "weight", found, torch.device("cpu"))
    assert torch.equal(holder.weight, model.get_submodule(name).weight)


def test_blocks_that_cannot_move_whole_are_decoded_and_said(tmp_path):
    decoded = {}
    model = folder_with(tmp_path / "a", "Qwen3-MoE", experts_in_4_bits(
        decoded, unless=lambda key: ".up_proj." in key))  # fmt: skip
    ours = empty(tmp_path / "a")
    names = mp.load_quantized(ours, tmp_path / "a")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert name not in names and "not all of them are in 4 bits" in names.notes[name]
    given = {**decoded, **{k: v for k, v in tensors_of(tmp_path / "a").items() if ".up_proj." in k}}
    expected = joined_by_hand(given, 0, ["gate_proj", "up_proj"], 4)
    assert torch.equal(ours.model.layers[0].mlp.experts.gate_up_proj, expected)
    assert type(model.model.layers[0].mlp.experts.gate_up_proj) is nn.Parameter


def test_block_sizes_that_differ_are_decoded_and_said(tmp_path):
    decoded = {}
    wide = experts_in_4_bits(decoded, unless=lambda key: ".up_proj." in key)
    narrow = experts_in_4_bits(decoded, unless=lambda key: key[-15:] != ".up_proj.weight",
                               block_size=32)  # fmt: skip

    def change(tensors):
        rest = {k: v for k, v in tensors.items() if ".up_proj." not in k}
        return {**wide(rest), **narrow({k: v for k, v in tensors.items() if k not in rest})}

    folder_with(tmp_path / "a", "Qwen3-MoE", change)
    ours = empty(tmp_path / "a")
    names = mp.load_quantized(ours, tmp_path / "a")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert "blocks of 32" in names.notes[name] or "blocks of 64" in names.notes[name]
    expected = joined_by_hand(decoded, 0, ["gate_proj", "up_proj"], 4)
    assert torch.equal(ours.model.layers[0].mlp.experts.gate_up_proj, expected)


def test_one_4_bit_tensor_is_split_in_every_bit(tmp_path):
    """DINOv2's SwiGLU: gate and up are one weight in files and two in the model."""
    decoded = {}

    def change(tensors):
        made = {}
        for key, value in tensors.items():
            own, whole = coded(key, value) if "weights_in.weight" in key else ({key: value}, None)
            made |= own
            decoded[key] = whole
        return made

    folder_with(tmp_path / "a", "DINOv2, SwiGLU", change)
    ours = empty(tmp_path / "a")
    names = mp.load_quantized(ours, tmp_path / "a")
    assert names[0] == "dinov2.encoder.layer.0.mlp.gate_proj" and len(names) == 4
    for layer in (0, 1):
        whole = decoded[f"dinov2.encoder.layer.{layer}.mlp.weights_in.weight"]
        mlp = ours.dinov2.encoder.layer[layer].mlp
        assert torch.equal(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), whole)
    outputs(ours, "DINOv2, SwiGLU")


def test_codes_that_transformers_ran_together_are_refused_by_name(tmp_path):
    """It joins 4-bit weights as if they were dense: two descriptions one after the other."""

    def change(tensors):
        made = {}
        for key, value in tensors.items():
            if "weights_in.weight" not in key:
                made[key] = value
                continue
            halves = [coded(key, half)[0] for half in value.chunk(2)]
            made |= {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
        return made

    folder_with(tmp_path / "a", "DINOv2, SwiGLU", change)
    unchanged(empty(tmp_path / "a"), tmp_path / "a",
              r"^[^:]*model\.safetensors: dinov2.*weights_in\.weight.*no valid JSON")  # fmt: skip


def test_a_missing_expert_is_named(tmp_path):
    change = experts_in_4_bits({})

    def without(tensors):
        return change({k: v for k, v in tensors.items() if ".experts.2.gate_proj" not in k})

    folder_with(tmp_path / "a", "Qwen3-MoE", without)
    unchanged(empty(tmp_path / "a"), tmp_path / "a", r"model\.safetensors.*gate_up_proj.*missing")


def test_experts_that_are_read_whole_are_refused(tmp_path):
    folder_with(tmp_path / "a", "Qwen3-MoE", experts_in_4_bits({}))
    model = mp.meta_model(tmp_path / "a")
    model.set_experts_implementation("grouped_mm")
    unchanged(model, tmp_path / "a", "set_experts_implementation")


def test_names_of_older_files(tmp_path):
    """The base's prefix is missing, and there are buffers that the model computes now."""

    def change(tensors):
        made = {}
        for key, value in tensors.items():
            key = key.removeprefix("model.")
            own = coded(key, value)[0] if key.endswith("_proj.weight") else {key: value}
            made |= own
        made["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        return made

    folder_with(tmp_path / "a", "LLaMA", change)
    ours = empty(tmp_path / "a")
    names = mp.load_quantized(ours, tmp_path / "a")
    assert len(names) == 14 and "model.layers.0.self_attn.q_proj" in names
    assert names.left_out == {
        "layers.0.self_attn.rotary_emb.inv_freq": "LlamaForCausalLM declares it ignorable"
    }
    assert "left out" in names.report()


def test_ignore_names_what_the_model_can_do_without(tmp_path):
    folder = tmp_path / "a"
    model = build("LLaMA")
    mp.quantize_model(model)
    mp.save_quantized(model, folder)
    base = transformers.LlamaModel(transformers.LlamaConfig(**model.config.to_dict()))
    with torch.device("meta"):
        base = type(base)(base.config)
    unchanged(base, folder, r"unexpected \['lm_head.weight'\].*ignore=")
    unchanged(base, folder, "fit no tensor of the file", ignore=["lm_head", "vision"])
    unchanged(base, folder, "fit no tensor of the file", ignore="lm")
    unchanged(base, folder, "no regular expression", ignore="(")
    for ignore in (["lm_head"], ["lm_head.weight"], r"lm_head\..*"):
        with torch.device("meta"):
            base = type(base)(base.config)
        names = mp.load_quantized(base, folder, ignore=ignore)
        assert names.left_out == {"lm_head.weight": "named in ignore="}
        assert torch.equal(base.layers[0].mlp.up_proj.weight,
                           model.model.layers[0].mlp.up_proj.weight)  # fmt: skip


def test_two_tensors_for_one_are_both_named(tmp_path):
    def change(tensors):
        made = dict(tensors)
        key = "model.layers.0.self_attn.q_proj.weight"
        made |= coded(key, made.pop(key))[0]
        made["model.norm.weight"] = torch.ones(64)
        made["norm.weight"] = torch.ones(64)
        return made

    folder_with(tmp_path / "a", "LLaMA", change)
    unchanged(
        empty(tmp_path / "a"),
        tmp_path / "a",
        r"model\.norm\.weight and norm\.weight are both model\.norm\.weight.*ignore=",
    )
    names = mp.load_quantized(empty(tmp_path / "a"), tmp_path / "a", ignore=["norm.weight"])
    assert names == ["model.layers.0.self_attn.q_proj"]


def test_a_missing_shard_is_named(tmp_path):
    model = build("ViT")
    mp.quantize_model(model)
    mp.save_quantized(model, tmp_path / "a", max_shard_bytes=20_000)
    shard = sorted((tmp_path / "a").glob("model-*"))[1]
    shard.unlink()
    unchanged(empty(tmp_path / "a"), tmp_path / "a", f"{shard.name}: no such file")


def test_quantize_checkpoint_refuses_what_load_quantized_would(tmp_path):
    model = build("LLaMA")
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = tensors_of(tmp_path / "a")
    save_file({**tensors, "extra.weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"extra\.weight.*nowhere in the model.*ignore="):
        mp.quantize_checkpoint(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    names = mp.quantize_checkpoint(tmp_path / "a", tmp_path / "b", ignore=["extra"])
    assert names.left_out["extra.weight"] == "named in ignore="
    mp.load_quantized(empty(tmp_path / "b"), tmp_path / "b")
