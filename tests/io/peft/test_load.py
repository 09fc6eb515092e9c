"""Adapter directories: what PEFT writes loads here, what is written here loads in PEFT."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import minipeft as mp
from minipeft.io.files import read_tensors, write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.block = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    def forward(self, x):
        return self.block(self.down(torch.relu(self.up(x))))


def plain(kind="linear"):
    torch.manual_seed(0)
    if kind == "linear":
        return Model()
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(24, 32), nn.ReLU(), nn.Linear(24, 32))


def randomise(parameters):
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)


CASES = {
    "plain": {"target": ["up", "down"], "rank": 4, "alpha": 8},
    "rslora": {"target": ["up", "down"], "rank": 4, "alpha": 8, "rank_stabilized": True},
    "patterns": {"target": ["up", "block.0", "block.2"], "rank": {"up": 8, ".*": 2},
                 "alpha": {"block.2": 3.5, ".*": 16}},
    "dropout": {"target": "all-linear", "rank": 2, "dropout": 0.25},
    "one of two names": {"target": ["block.0"], "rank": 2},
}  # fmt: skip
peft_warnings = [
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]


def saved(tmp_path, case="plain", kind="linear"):
    model = plain(kind)
    arguments = dict(CASES[case]) if kind == "linear" else {"target": "all-linear", "rank": 4}
    mp.inject_lora(model, arguments.pop("target"), **arguments)
    randomise(mp.adapter_parameters(model))
    mp.save_peft(model, tmp_path)
    return model.eval()


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_loads_again(tmp_path, case, kind):
    if kind == "Conv1D":
        pytest.importorskip("transformers")
    model, x = saved(tmp_path, case, kind), torch.randn(3, 32)
    fresh = plain(kind)
    mp.load_peft(fresh, tmp_path)
    assert torch.equal(fresh.eval()(x), model(x))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == set(
        mp.adapter_state_dict(model)
    )


def test_keys_without_the_prefix_load_too(tmp_path):
    model = saved(tmp_path)
    tensors = read_tensors(tmp_path / WEIGHTS)
    write_tensors(
        tmp_path / WEIGHTS, {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
    )
    fresh = plain()
    assert mp.load_peft(fresh, tmp_path) == ["up", "down"]
    x = torch.randn(2, 32)
    assert torch.equal(fresh(x), model(x))


def loaded_state(model):
    return [(n, id(m)) for n, m in model.named_modules()], [
        p.requires_grad for p in model.parameters()
    ]


def refuse(path, match, model=None):
    """Loading raises with this message, and the model is as it was."""
    model = plain() if model is None else model
    before = loaded_state(model)
    with pytest.raises(ValueError, match=match):
        mp.load_peft(model, path)
    assert loaded_state(model) == before


def test_a_file_cut_short_anywhere_raises(tmp_path):
    saved(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    for length in [0, 1, 7, 8, 9, 100, *range(200, len(data), 997), len(data) - 1]:
        (tmp_path / WEIGHTS).write_bytes(data[:length])
        refuse(tmp_path, "damaged")


def test_flipped_bits_raise(tmp_path):
    saved(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    generator = torch.Generator().manual_seed(0)
    for index in torch.randint(len(data), (150,), generator=generator).tolist():
        broken = bytearray(data)
        broken[index] ^= 1 << (index % 8)
        (tmp_path / WEIGHTS).write_bytes(broken)
        try:
            model = plain()
            mp.load_peft(model, tmp_path)
        except ValueError:
            assert type(model.up) is nn.Linear
        else:  # only where the bit has no meaning: padding, or the name of a metadata key
            assert index < 8 + struct.unpack("<Q", data[:8])[0]


def change_tensors(tmp_path, change):
    tensors = read_tensors(tmp_path / WEIGHTS)
    change(tensors)
    write_tensors(tmp_path / WEIGHTS, tensors)


KEY = "base_model.model.up.lora_A.weight"
TENSOR_CHANGES = {
    "a factor missing": (lambda t: t.pop(KEY), "missing \\['lora_A'\\]"),
    "a module missing": (
        lambda t: [t.pop(k) for k in list(t) if ".up." in k], "no keys for 'up'",
    ),
    "an extra module": (
        lambda t: t.update({k.replace(".up.", ".side."): v.clone() for k, v in t.items()}), "side",
    ),
    "an untargeted module": (
        lambda t: t.update({k.replace(".up.", ".block.0."): torch.zeros(1) for k in t}),
        r"unexpected 'base_model.model.block.0",
    ),
    "an unknown key": (lambda t: t.update({"up.bias": torch.zeros(3)}), "unexpected 'up.bias'"),
    "a magnitude": (
        lambda t: t.update({"base_model.model.up.lora_magnitude_vector": torch.zeros(48)}),
        "lora_magnitude_vector",
    ),
    "another shape": (lambda t: t.update({KEY: torch.zeros(4, 31)}), r"\(4, 31\).*\(4, 32\)"),
    "another rank": (lambda t: t.update({KEY: torch.zeros(5, 32)}), r"\(5, 32\)"),
    "integers": (lambda t: t.update({KEY: torch.zeros(4, 32, dtype=torch.int32)}), "int32"),
    "NaN": (lambda t: t[KEY].fill_(float("nan")), "NaN"),
    "another model's": (
        lambda t: [t.update({f"base_model.model.model.{k[17:]}": t.pop(k)}) for k in list(t)],
        "another model's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSOR_CHANGES)
def test_wrong_tensors_raise(tmp_path, kind):
    change, message = TENSOR_CHANGES[kind]
    saved(tmp_path)
    change_tensors(tmp_path, change)
    refuse(tmp_path, message)


CONFIG_CHANGES = {
    "dora": ({"use_dora": True}, "missing .'lora_magnitude_vector'"),
    "bias": ({"bias": "some"}, "bias"),
    "modules to save": ({"modules_to_save": ["up"]}, "no keys for 'up'"),
    "another method": ({"peft_type": "IA3"}, "peft_type"),
    "unknown field": ({"frobnicate": 3}, "frobnicate"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "rank text": ({"r": "8"}, "r is '8'"),
    "rank zero": ({"r": 0}, "r is 0"),
    "rank fraction": ({"r": 4.5}, "r is 4.5, expected a whole"),
    "pattern fraction": ({"rank_pattern": {"up": 1.5}}, "whole"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha"),
    "alpha negative": ({"lora_alpha": -8}, "alpha"),
    "no targets": ({"target_modules": []}, "target_modules"),
    "target number": ({"target_modules": 3}, "target_modules"),
    "broken target": ({"target_modules": "("}, "regular expression"),
    "pattern of nothing": ({"rank_pattern": {"side": 4}}, r"\['side'\] fit no module"),
    "pattern list": ({"rank_pattern": [1]}, "rank_pattern"),
    "broken pattern": ({"rank_pattern": {"(": 1}}, "regular expression"),
    "pattern text": ({"alpha_pattern": {"up": "x"}}, "expected a number"),
}


@pytest.mark.parametrize("kind", CONFIG_CHANGES)
def test_a_wrong_configuration_raises(tmp_path, kind):
    change, message = CONFIG_CHANGES[kind]
    saved(tmp_path)
    write_tensors(tmp_path / WEIGHTS, read_tensors(tmp_path / WEIGHTS))  # as older files: no seal
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    refuse(tmp_path, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '"LORA"'])
def test_a_configuration_that_is_no_object_raises(tmp_path, text):
    saved(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    refuse(tmp_path, "JSON")


def test_missing_files_and_what_is_no_pickle_raise(tmp_path):
    refuse(tmp_path / "nowhere", "no such file")
    saved(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    refuse(tmp_path, r"adapter_model\.bin: cannot be read as tensors")
    (tmp_path / "adapter_model.bin").unlink()
    refuse(tmp_path, r"adapter_model\.safetensors: no such file")


def test_a_wrapped_model_refuses_a_second_adapter(tmp_path):
    model = saved(tmp_path)
    refuse(tmp_path, "already has an adapter", model)


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    model = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    randomise(mp.adapter_parameters(model))

    def full(file):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        mp.save_peft(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_parameters_without_values_are_not_saved(tmp_path):
    model = saved(tmp_path).to("meta")
    with pytest.raises(ValueError, match="no values here"):
        mp.save_peft(model, tmp_path / "new")


def load_in_peft(model, path):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, path).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_written_here(tmp_path, case, kind, capsys):
    pytest.importorskip("peft")
    model, x = saved(tmp_path, case, kind), torch.randn(3, 32)
    theirs = load_in_peft(plain(kind), tmp_path)
    difference = (theirs(x) - model(x)).abs().max().item()
    with capsys.disabled():
        print(f"\nwritten here, loaded in PEFT ({case}, {kind}): {difference:.1e}")
    # float32, outputs up to 2: the same products in another order
    assert difference <= 1e-6
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(
        mp.adapter_state_dict(model)
    ) / 2  # fmt: skip


PEFT_CASES = {
    "plain": {"target_modules": ["up", "down"], "r": 4, "lora_alpha": 8},
    "rslora": {"target_modules": ["up", "down"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"target_modules": ["up", "0", "2"], "r": 4, "rank_pattern": {"up": 8},
                 "alpha_pattern": {"^block.2": 3}},
    "regex": {"target_modules": r".*\.(0|2)|up", "r": 2, "exclude_modules": ["block.2"]},
    "all-linear": {"target_modules": "all-linear", "r": 2},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PEFT_CASES)
def test_what_peft_writes_loads_here(tmp_path, case, capsys):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(**PEFT_CASES[case]))
    randomise(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(tmp_path)
    ours = plain()
    names = mp.load_peft(ours, tmp_path)
    x, results = torch.randn(3, 32), []
    for model in (ours, theirs):
        y = model(inputs := x.clone().requires_grad_())
        y.square().sum().backward()
        results.append([y.detach(), inputs.grad])
    for name in names:
        layer = ours.get_submodule(name)
        peer = theirs.get_submodule(f"base_model.model.{name}")
        results[0] += [layer.lora_a.grad, layer.lora_b.grad]
        results[1] += [peer.lora_A["default"].weight.grad, peer.lora_B["default"].weight.grad]
    largest = max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True)
    )
    with capsys.disabled():
        print(f"\nwritten by PEFT, loaded here ({case}): outputs, gradients {largest:.1e}")
    # float32, of the largest element: the same products in another order
    assert largest <= 1e-6


def write_adapter(folder, tensor=None, **fields):
    """A valid adapter of one layer but for `fields` and `tensor`."""
    name = "base_model.model.query_projection"
    a = torch.randn(2, 8) if tensor is None else tensor
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": torch.zeros(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["query_projection"]} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"(?i)foo": 4}}, "no regular expression"),
        ({"rank_pattern": {"a{99999999999}": 4}}, "no regular expression"),
        ({"target_modules": "(" * 3000 + ")" * 3000}, "no regular expression"),
        ({"target_modules": r"((\w|\w)+)+X"}, "takes more than"),
        ({"lora_alpha": 10**400}, "lora_alpha"), ({"r": 10**400}, "r is"),
        ({"use_rslora": 1}, "use_rslora"), ({"layers_to_transform": 0}, "layers_to_transform"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_hostile_configurations(tmp_path, monkeypatch, fields, message):
    from minipeft.io.peft import patterns

    monkeypatch.setattr(patterns, "SECONDS", 2)
    model = nn.ModuleDict({"query_projection": nn.Linear(8, 8)})
    write_adapter(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        mp.load_peft(model, tmp_path)
    assert type(model["query_projection"]) is nn.Linear


def test_adapters_in_eight_bits_are_refused(tmp_path):
    write_adapter(tmp_path, torch.randn(2, 8).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        mp.load_peft(nn.ModuleDict({"query_projection": nn.Linear(8, 8)}), tmp_path)


def test_models_without_values_are_refused(tmp_path):
    with torch.device("meta"):
        model = nn.ModuleDict({"query_projection": nn.Linear(8, 8)})
    write_adapter(tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        mp.load_peft(model, tmp_path)
    assert type(model["query_projection"]) is nn.Linear
    mp.inject_lora(model, ["query_projection"], 2)
    state = {n: torch.zeros_like(t, device="cpu") for n, t in mp.adapter_state_dict(model).items()}
    with pytest.raises(ValueError, match="meta device"):
        mp.load_adapter_state_dict(model, state)


@pytest.mark.parametrize("name", ["user/adapter", "./nowhere"])
def test_a_folder_that_is_not_here_says_that_nothing_is_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse(name, "nothing is downloaded .huggingface_hub.snapshot_download")
    with pytest.raises(ValueError, match="nothing is downloaded"):
        mp.load_prefix(mp.PrefixEncoder([(1, 4, 4)], 2), name)
    with pytest.raises(ValueError, match=r"no config\.json, .*the local folder"):
        mp.load_quantized(plain(), name)


def test_a_folder_of_adapters_names_their_folders(tmp_path):
    model = plain()
    for name in ("fr", "de"):
        mp.inject_lora(model, ["up"], 2, name=name)
    mp.save_peft(model, tmp_path)
    refuse(tmp_path, r"its folders \['de', 'fr'\] do hold one: pass '.*de'")
    mp.load_peft(plain(), tmp_path / "de")


def test_a_second_adapter_is_told_how_to_come_in(tmp_path):
    model = saved(tmp_path)
    refuse(tmp_path, r"minipeft.remove.*or give this one a name=", model)
    mp.load_peft(model, tmp_path, name="fr")
    with pytest.raises(ValueError, match=r"minipeft.remove\(model, name='fr'\)"):
        mp.load_peft(model, tmp_path, name="fr")
