"""bitsandbytes checkpoints: both ways with bitsandbytes itself, strict, atomic, never dense."""

import json
import os
import shutil

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import NF4Linear
from minipeft.integrations.transformers import meta_model
from minipeft.io.bitsandbytes import load_quantized, save_quantized
from minipeft.io.bitsandbytes.weight import STATE_BYTES, entries, specs, state_of
from minipeft.io.shards import Reader
from minipeft.layers import NF4Conv1D

NAME = "some.layer.weight"


def llama(tied=False, dtype=torch.bfloat16):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=2, vocab_size=96, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).bfloat16().eval()


class Small(nn.Module):
    """A model of nobody's: a table, a layer of whole blocks, a ragged one, a buffer, a tie."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.a = nn.Linear(64, 64, bias=False)
        self.b = nn.Linear(64, 7)
        self.c = nn.Linear(7, 64)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, rows):
        return self.head(self.norm(self.c(self.b(self.a(self.embed(rows))))))


def on_meta(kind=Small):
    with torch.device("meta"):
        return kind()


def saved(path, **settings):
    model = Small().eval()
    mp.quantize_model(model)
    save_quantized(model, path, **settings)
    return model


def assert_equal_models(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("max_shard_bytes", [2000, 10**9])
def test_a_model_of_your_own_round_trips(tmp_path, max_shard_bytes):
    model = saved(tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 2000)
    again = on_meta().eval()
    assert load_quantized(again, tmp_path / "saved") == ["a", "b", "c"]
    assert_equal_models(again, model)
    assert again.head.weight is again.embed.weight
    rows = torch.tensor([1, 5])
    assert torch.equal(again(rows), model(rows))
    if max_shard_bytes > 2000:
        single = on_meta()
        load_quantized(single, files[0])
        assert_equal_models(single, model)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 128), (64, 33), (8, 7)])
def test_entries_and_back(shape, storage, double_quant):
    layer = NF4Linear.from_weight(torch.randn(shape), double_quant=double_quant)
    if layer.packed.numel() % storage.itemsize:
        with pytest.raises(ValueError, match="do not fill"):
            entries(NAME, layer, quant_storage=storage)
        return
    found = entries(NAME, layer, quant_storage=storage)
    settings, state = state_of(NAME, found)
    if storage is torch.uint8:
        assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == specs(NAME, settings)
    again = NF4Linear(shape[1], shape[0], bias=False, double_quant=double_quant)
    again.fill(state)
    assert settings.dtype == torch.float32 and settings.shape == shape
    assert_equal_models(again, layer)


STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def description(found):
    return json.loads(bytes(found[STATE].tolist()))


def edited(found, **changes):
    """The entries with other values in their JSON; None takes one out."""
    state = {**description(found), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    text = json.dumps(state).encode()
    return {**found, STATE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_of_any_float_type(kind):
    layer = NF4Linear.from_weight(torch.randn(48, 128))
    found = entries(NAME, layer)
    for name in ("nested_absmax", "nested_quant_map", "quant_map"):
        found[f"{NAME}.{name}"] = found[f"{NAME}.{name}"].to(kind)
    settings, state = state_of(NAME, found)
    if kind is torch.float64:
        assert settings.double_quant
    else:  # a rounded map is a map of its own: scales are decoded by it
        assert not settings.double_quant
        table, scale = (found[f"{NAME}.nested_{n}"].float() for n in ("quant_map", "absmax"))
        offset = torch.tensor(description(found)["nested_offset"])
        code = found[f"{NAME}.absmax"].int()
        expected = table[code] * scale.repeat_interleave(256)[: len(code)] + offset
        assert torch.equal(state["absmax"], expected)
    plain = NF4Linear.from_weight(torch.randn(48, 128), double_quant=False)
    found = entries(NAME, plain)
    found[f"{NAME}.absmax"] = found[f"{NAME}.absmax"].to(kind)
    _, state = state_of(NAME, found)
    assert torch.equal(state["absmax"], found[f"{NAME}.absmax"].float())


def test_old_shapes_and_other_block_sizes_of_scales():
    layer = NF4Linear.from_weight(torch.randn(64, 512))
    found = entries(NAME, layer)
    _, state = state_of(NAME, {**found, NAME: found[NAME].view(1, -1)})
    assert torch.equal(state["packed"], layer.packed.flatten())
    scale = torch.rand(4)
    found = edited({**found, f"{NAME}.nested_absmax": scale}, nested_blocksize=128)
    settings, state = state_of(NAME, found)
    assert not settings.double_quant and state["absmax"].shape == (512,)


BROKEN = {
    "absmax missing": lambda f: {k: v for k, v in f.items() if not k.endswith("weight.absmax")},
    "one entry too many": lambda f: {**f, f"{NAME}.scb": torch.ones(3)},
    "map too short": lambda f: {**f, f"{NAME}.quant_map": torch.zeros(15)},
    "map too large": lambda f: {**f, f"{NAME}.quant_map": torch.full((16,), 2.0)},
    "map of integers": lambda f: {**f, f"{NAME}.quant_map": torch.zeros(16, dtype=torch.int32)},
    "nested map too long": lambda f: {**f, f"{NAME}.nested_quant_map": torch.zeros(257)},
    "scales that are NaN": lambda f: {**f, f"{NAME}.nested_absmax": torch.full((1,), torch.nan)},
    "scales too many": lambda f: {**f, f"{NAME}.nested_absmax": torch.zeros(9)},
    "codes too few": lambda f: {**f, NAME: f[NAME][:-1]},
    "codes of integers": lambda f: {**f, NAME: f[NAME].view(1, -1).view(torch.int32)},
    "float scales, nested": lambda f: {**f, f"{NAME}.absmax": torch.zeros(96)},
    "shape negative": lambda f: edited(f, shape=[-48, -128]),
    "shape of another size": lambda f: edited(f, shape=[48, 129]),
    "shape without end": lambda f: edited(f, shape=[10**30, 10**30]),
    "shape beyond floats": lambda f: edited(f, shape=[2**62] * 20),
    "shape of booleans": lambda f: edited(f, shape=[True, 6144]),
    "shape missing": lambda f: edited(f, shape=None),
    "block size 48": lambda f: edited(f, blocksize=48),
    "block size a text": lambda f: edited(f, blocksize="64"),
    "dtype int8": lambda f: edited(f, dtype="int8"),
    "another data type": lambda f: edited(f, quant_type="af4"),
    "offset NaN": lambda f: edited(f, nested_offset=float("nan")),
    "offset a text": lambda f: edited(f, nested_offset="0"),
    "nested block size 0": lambda f: edited(f, nested_blocksize=0),
    "JSON cut": lambda f: {**f, STATE: f[STATE][:40]},
    "JSON a list": lambda f: {**f, STATE: torch.tensor(list(b"[]"), dtype=torch.uint8)},
    "JSON of floats": lambda f: {**f, STATE: torch.zeros(9)},
    "two descriptions": lambda f: {**f, f"{NAME}.quant_state.bitsandbytes__fp4": torch.zeros(9)},
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_broken_entries_raise_and_name_the_tensor(how):
    found = entries(NAME, NF4Linear.from_weight(torch.randn(48, 128)))
    state_of(NAME, found)
    with pytest.raises(ValueError, match=NAME):
        state_of(NAME, BROKEN[how](found))


def test_what_bitsandbytes_cannot_hold_is_refused(tmp_path):
    layer = NF4Linear.from_weight(torch.randn(48, 128), double_quant=False)
    layer.fill({**dict(layer.state_dict()), "codebook": torch.linspace(-1, 1, 16)})
    with pytest.raises(ValueError, match="no data type with this codebook"):
        entries(NAME, layer)
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="no 4-bit layer"):
        save_quantized(model, tmp_path / "a")
    mp.quantize_model(model, embeddings=True)
    with pytest.raises(ValueError, match="0 is a NF4Embedding"):
        save_quantized(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    saved(tmp_path / "b")
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        saved(tmp_path / "b")


def test_adapters_are_left_out(tmp_path):
    model = Small().eval()
    mp.inject_qlora(model, ["a", "c"], rank=2)
    with pytest.warns(UserWarning, match=r"the adapter \(a, 2 layers in all\) is not in this"):
        save_quantized(model, tmp_path / "saved")
    again = on_meta().eval()
    load_quantized(again, tmp_path / "saved")
    rows = torch.tensor([1, 5])
    with mp.disable_adapters(model):
        assert torch.equal(again(rows), model(rows))


def test_another_models_checkpoint_changes_nothing(tmp_path):
    saved(tmp_path / "saved")

    class Other(Small):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(3, 3)

    class Narrow(Small):
        def __init__(self):
            super().__init__()
            self.c = nn.Linear(7, 32)

    class Without(Small):
        def __init__(self):
            super().__init__()
            del self.a

    class Convolution(Small):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(64, 64, 1, bias=False)

    for kind, message in (
        (Other, r"missing \['extra.bias', 'extra.weight'\]"), (Narrow, r"the model's is \(32"),
        (Without, "no module 'a'"), (Convolution, "codes for a Conv1d"),
    ):  # fmt: skip
        model = on_meta(kind)
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match=message):
            load_quantized(model, tmp_path / "saved")
        assert dict(model.named_modules()) == before
        assert all(p.is_meta for p in model.parameters())


def test_checkpoints_that_are_not_complete_or_not_in_four_bits(tmp_path):
    saved(tmp_path / "good", max_shard_bytes=2000)
    broken = tmp_path / "broken"

    def damaged(change):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(tmp_path / "good", broken)
        change()

    def rewritten(name, **changes):
        path = broken / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    shard = sorted((tmp_path / "good").glob("model-*"))[1].name
    index = "model.safetensors.index.json"
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for change, message in (
        (lambda: os.remove(broken / shard), f"{shard}: no such file"),
        (lambda: os.remove(broken / "config.json"), "not complete"),
        (lambda: os.remove(broken / index), "no model.safetensors"),
        (lambda: os.truncate(broken / shard, 300), f"{shard}: damaged"),
        (lambda: rewritten(index, weight_map={"a": "../x.safetensors"}), "expected the name of a"),
        (lambda: rewritten(index, weight_map={}), "no 'weight_map'"),
        (
            lambda: rewritten(index, weight_map={"a.weight": shard, "z": shard}),
            "z is not in",
        ),
        (lambda: rewritten("config.json", quantization_config={"quant_method": "gptq"}), "gptq"),
        (lambda: rewritten("config.json", quantization_config=eight), "8-bit integers"),
        (lambda: (broken / "config.json").write_text("[]"), "expected a JSON object"),
    ):
        damaged(change)
        with pytest.raises(ValueError, match=message):
            load_quantized(on_meta(), broken)
    dense = tmp_path / "dense"
    dense.mkdir()
    from safetensors.torch import save_file

    state = {name: t.clone() for name, t in Small().state_dict().items() if name != "head.weight"}
    save_file(state, dense / "model.safetensors")
    (dense / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no tensor is in 4 bits"):
        load_quantized(on_meta(), dense)
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled files"):
        load_quantized(on_meta(), dense)
    with pytest.raises(ValueError, match="no config"):
        load_quantized(on_meta(), tmp_path / "nowhere")


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path):
    saved(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    data = bytearray(path.read_bytes())
    with Reader([path]) as reader:
        assert "a.weight" in reader.specs
    data[-1000] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="differs from its checksum"):
        load_quantized(on_meta(), tmp_path / "saved")


def test_two_values_for_a_tied_tensor(tmp_path):
    from safetensors.torch import save_file

    saved(tmp_path / "saved")
    with Reader([tmp_path / "saved" / "model.safetensors"]) as reader:
        tensors = {name: reader.read(name) for name in reader.specs}
    tied = next(name for name in ("head.weight", "embed.weight") if name not in tensors)
    other = {"head.weight": "embed.weight", "embed.weight": "head.weight"}[tied]
    save_file({**tensors, tied: tensors[other] + 1}, tmp_path / "two.safetensors")
    model = on_meta()
    with pytest.raises(ValueError, match="two values"):
        load_quantized(model, tmp_path / "two.safetensors")
    assert all(p.is_meta for p in model.parameters())
    save_file({**tensors, tied: tensors[other].clone()}, tmp_path / "same.safetensors")
    load_quantized(model, tmp_path / "same.safetensors")
    assert model.head.weight is model.embed.weight


def test_buffers_that_no_file_holds(tmp_path):
    class Computed(Small):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.arange(3.0), persistent=False)

    class Restored(Computed):
        def _init_weights(self, module):
            if module is self:
                module.scale.copy_(torch.arange(3.0))

    saved(tmp_path / "saved")
    with pytest.raises(ValueError, match="scale: a buffer that no checkpoint holds"):
        load_quantized(on_meta(Computed), tmp_path / "saved")
    model = on_meta(Restored)
    load_quantized(model, tmp_path / "saved")
    assert torch.equal(model.scale, torch.arange(3.0))


def test_a_buffer_that_a_module_around_computes(tmp_path):
    """Falcon-H1's model fills the buffers of its layers; random state stays as it was."""

    class Computed(Small):
        def __init__(self):
            super().__init__()
            self.norm.register_buffer("scale", torch.arange(3.0), persistent=False)

        def _init_weights(self, module):
            if module is self:
                self.norm.scale.copy_(torch.arange(3.0))
                torch.rand(1)

    saved(tmp_path / "saved")
    model, before = on_meta(Computed), torch.get_rng_state()
    load_quantized(model, tmp_path / "saved")
    assert torch.equal(model.norm.scale, torch.arange(3.0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("double_quant", [True, False])
def test_transformers_with_bitsandbytes_loads_what_is_written(tmp_path, tied, double_quant):
    peer = pytest.importorskip("bitsandbytes.functional")
    transformers = pytest.importorskip("transformers")
    model = llama(tied)
    names = mp.quantize_model(model, double_quant=double_quant)
    save_quantized(model, tmp_path / "saved", max_shard_bytes=60_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16
    )
    for name in names:
        weight = theirs.get_submodule(name).weight
        decoded = peer.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(decoded, model.get_submodule(name).weight), name
    ours = meta_model(tmp_path / "saved").eval()
    load_quantized(ours, tmp_path / "saved")
    rows = torch.randint(96, (2, 9))
    with torch.no_grad():  # theirs in train mode: eval() would change its layers
        assert torch.equal(ours(rows).logits, theirs.train()(rows).logits)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_transformers_with_bitsandbytes_writes_loads(
    tmp_path, quant_type, double_quant, storage, make
):
    peer = pytest.importorskip("bitsandbytes.functional")
    transformers = pytest.importorskip("transformers")
    make().save_pretrained(tmp_path / "dense")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_quant_storage=storage,
        bnb_4bit_use_double_quant=double_quant,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = meta_model(tmp_path / "theirs")
    names = load_quantized(ours, tmp_path / "theirs")
    assert len(names) == (14 if make is llama else 8)
    for name in names:
        weight, layer = theirs.get_submodule(name).weight, ours.get_submodule(name)
        assert type(layer) is (NF4Linear if make is llama else NF4Conv1D)
        assert torch.equal(
            peer.dequantize_4bit(weight.data, weight.quant_state), layer.dequantize()
        )
    save_quantized(ours, tmp_path / "again")
    once_more = meta_model(tmp_path / "again")
    load_quantized(once_more, tmp_path / "again")
    assert_equal_models(once_more, ours)


def test_reading_needs_no_bitsandbytes(tmp_path, plain_python):
    saved(tmp_path / "saved")
    script = f"""
import sys
sys.modules["bitsandbytes"] = None
sys.modules["transformers"] = None
import torch
from torch import nn
import minipeft as mp
model = nn.Module()
with torch.device("meta"):
    model.embed, model.a = nn.Embedding(20, 64), nn.Linear(64, 64, bias=False)
    model.b, model.c, model.norm = nn.Linear(64, 7), nn.Linear(7, 64), nn.BatchNorm1d(64)
print(mp.io.bitsandbytes.load_quantized(model, {str(tmp_path / "saved")!r}))
"""
    assert plain_python(script).strip() == "['a', 'b', 'c']"


def test_state_json_has_a_fixed_size():
    layer = NF4Linear.from_weight(torch.randn(64, 64) * 1e-7)
    found = entries(NAME, layer)
    assert found[STATE].numel() == STATE_BYTES


def test_meta_model_names_what_is_wrong(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="no config"):
        meta_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="architectures"):
        meta_model(tmp_path)
    for name in ("os", "Trainer", "NoSuchModel"):
        content = {"model_type": "llama", "architectures": [name]}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="no model class"):
            meta_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such"}))
    with pytest.raises(ValueError, match="not transformers'"):
        meta_model(tmp_path)
