"""MXFP4 files, as gpt-oss has them: equal to transformers' own dequantisation in every bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minipeft as mp
from minipeft.io import mxfp4
from minipeft.layers import LoRAExperts, NF4Experts
from minipeft.qlora import PackedModule
from tests.checkpoint_families import build, eager, outputs

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def random_codes(*shape, low=110, high=135):
    """Blocks and scales, (*rows, in/32, 16) and (*rows, in/32)."""
    *rows, row = shape
    blocks = torch.randint(0, 256, (*rows, row // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(low, high, (*rows, row // 32), dtype=torch.uint8)


def one_by_one(blocks, scales):
    """E2M1 times 2^(scale - 127), a number at a time, in Python's float64."""
    rows, count = scales.numel(), 32
    codes, powers = blocks.reshape(rows, 16).tolist(), scales.flatten().tolist()
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = []
    for row in range(rows):
        for place in range(count):
            code = (codes[row][place // 2] >> (4 * (place % 2))) & 15
            sign = -1.0 if code & 8 else 1.0
            values.append(sign * magnitudes[code & 7] * 2.0 ** (powers[row] - 127))
    return torch.tensor(values, dtype=torch.float64).view(*scales.shape[:-1], -1)


def layer_of(blocks, scales, dtype=torch.float32):
    settings, state = mxfp4.state_of("w", {"w_blocks": blocks, "w_scales": scales}, dtype)
    layer = NF4Experts(
        *settings.shape, turned=True, block_size=32, double_quant=False, dtype=dtype, device="meta"
    )
    layer.fill(state)
    return layer


def test_every_code_and_scale_is_what_the_format_says():
    """All 16 codes under all 255 scales; what float32 cannot hold is Inf there."""
    blocks = torch.arange(16, dtype=torch.uint8).repeat(1, 255, 1, 1) * 17
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1)
    found = layer_of(blocks, scales).weight.mT
    assert torch.equal(found, one_by_one(blocks, scales).float())
    assert torch.equal(found.signbit(), one_by_one(blocks, scales).signbit())


@pytest.mark.parametrize("dtype", BITS)
def test_equals_transformers_in_every_bit(dtype):
    peer = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random_codes(3, 10, 96, low=0, high=255)
    expected = peer.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    layer = layer_of(blocks, scales, dtype)
    assert layer.shape == tuple(expected.shape) == (3, 96, 10)
    kind = BITS[dtype]
    assert torch.equal(layer.weight.view(kind), expected.view(kind))
    for number in range(3):
        one = layer[number].contiguous()
        assert torch.equal(one.view(kind), expected[number].contiguous().view(kind))


def test_entries_and_back():
    blocks, scales = random_codes(2, 6, 64, low=0, high=255)
    layer = layer_of(blocks, scales)
    made = mxfp4.entries("w", layer.state().packed, layer.absmax, layer.coded_shape)
    assert torch.equal(made["w_blocks"], blocks) and torch.equal(made["w_scales"], scales)
    absmax = layer.absmax.clone()
    absmax[0, 0, 0] = 3.0
    assert mxfp4.entries("w", layer.state().packed, absmax, layer.coded_shape) is None


def test_rows_are_multiplied_by_their_experts():
    blocks, scales = random_codes(3, 10, 64)
    layer, x = layer_of(blocks, scales), torch.randn(7, 64)
    expert = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    expected = torch.stack([row @ layer.weight[e] for row, e in zip(x, expert, strict=True)])
    torch.testing.assert_close(
        layer(x, expert), expected, rtol=1e-5, atol=1e-3
    )  # sums of 64 up to 3,100: measured 2e-4


def gpt_oss(path, dtype=torch.bfloat16, **scales):
    """A checkpoint in MXFP4, and the dense model that transformers' decoding makes of it."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = build("gpt-oss").to(dtype)
    model.save_pretrained(path)
    (file,) = path.glob("*.safetensors")
    tensors, decoded = load_file(file), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(name).shape
        blocks, powers = random_codes(experts, columns, rows, **scales)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": powers}
        decoded[name] = convert_moe_packed_tensors(blocks, powers, dtype=dtype)
    save_file(tensors, file)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    assert transformers and decoded
    with torch.no_grad():
        for name, value in decoded.items():
            model.get_parameter(name).copy_(value)
    return model.requires_grad_(False)  # matmul has another order of sums for what trains


def empty(path):
    return eager(mp.meta_model(path)).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpt_oss_checkpoint_is_read_into_packed_layers(tmp_path, dtype):
    model = gpt_oss(tmp_path / "a", dtype, low=115, high=122)
    ours = empty(tmp_path / "a")
    names = mp.load_quantized(ours, tmp_path / "a")
    assert names == [f"model.layers.{i}.mlp.experts.{w}" for i in (0, 1)
                     for w in ("gate_up_proj", "down_proj")]  # fmt: skip
    for name, value in model.state_dict().items():
        found = ours.get_submodule(name).weight if name in names else ours.state_dict()[name]
        assert found.dtype == dtype and torch.equal(found, value), name
    if dtype == torch.bfloat16:  # the cast model has rounded rotary frequencies, the read one not
        return
    assert torch.equal(outputs(ours, "gpt-oss"), outputs(model, "gpt-oss"))
    dense = mp.dequantize_model(ours)
    assert sorted(dense) == sorted(names)
    assert torch.equal(outputs(ours, "gpt-oss"), outputs(model, "gpt-oss"))


def test_transformers_reads_its_own_way_to_the_same_values(tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt_oss(tmp_path / "a", low=115, high=122)
    ours = empty(tmp_path / "a")
    names = mp.load_quantized(ours, tmp_path / "a")
    mp.save_quantized(ours, tmp_path / "b")
    config = transformers.Mxfp4Config(dequantize=True)
    for folder in ("a", "b"):
        theirs = transformers.GptOssForCausalLM.from_pretrained(
            tmp_path / folder, quantization_config=config, dtype=torch.bfloat16
        )
        for name in names:
            assert torch.equal(theirs.get_parameter(name), ours.get_submodule(name).weight), name


def test_what_was_mxfp4_comes_back_as_mxfp4(tmp_path):
    gpt_oss(tmp_path / "a")
    ours = empty(tmp_path / "a")
    mp.load_quantized(ours, tmp_path / "a")
    mp.save_quantized(ours, tmp_path / "b")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("a", "b"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    mp.quantize_model(ours)  # NF4 beside it: attention
    mp.save_quantized(ours, tmp_path / "c")
    again = empty(tmp_path / "c")
    mp.load_quantized(again, tmp_path / "c")
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_lora_over_mxfp4_experts(tmp_path):
    model = gpt_oss(tmp_path / "a", torch.float32, low=115, high=122)
    ours = empty(tmp_path / "a")
    mp.load_quantized(ours, tmp_path / "a")
    target = r".*\.experts\.gate_up_proj"
    for each in (ours, model):
        torch.manual_seed(0)
        mp.inject_lora(each, target, rank=2)
        for layer in each.modules():
            if isinstance(layer, LoRAExperts):
                nn.init.normal_(layer.lora_b, std=0.1)
    found, expected = outputs(ours, "gpt-oss"), outputs(model, "gpt-oss")
    # float32, the same experts decoded on both sides: measured 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


BROKEN = {
    "scales of another shape": (lambda b, s: (b, s[:, :, :-1])),
    "blocks of 15 bytes": (lambda b, s: (b[..., :15], s)),
    "scales of floats": (lambda b, s: (b, s.float())),
    "codes of a 2-D weight": (lambda b, s: (b[0], s[0])),
    "a scale that is NaN": (lambda b, s: (b, s.index_fill(0, torch.tensor([0]), 255))),
}


@pytest.mark.parametrize("how", BROKEN)
def test_damaged_codes_are_named_with_their_file(tmp_path, how):
    gpt_oss(tmp_path / "a")
    file, name = tmp_path / "a" / "model.safetensors", "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(file)
    blocks, scales = BROKEN[how](tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    tensors |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
    save_file(tensors, file)
    model = empty(tmp_path / "a")
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name}"):
        mp.load_quantized(model, tmp_path / "a")
    assert all(p.is_meta for p in model.parameters())


def test_the_plain_row_decodes_the_same():
    blocks, scales = random_codes(2, 6, 64)
    settings, state = mxfp4.state_of("w", {"w_blocks": blocks, "w_scales": scales}, torch.float32)
    layer = PackedModule(settings.shape, block_size=32, double_quant=False, device="meta")
    layer.fill(state)
    assert torch.equal(layer.weight.double(), one_by_one(blocks, scales))
