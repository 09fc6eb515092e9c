"""A weights file knows the configuration that it was saved with, and its own metadata."""

import json
import re
import shutil
import struct

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io.files import read_all, read_tensors, write_tensors
from minipeft.io.replace import NotOneSave

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def save(folder, seed=1, **settings):
    model = plain()
    mp.inject_lora(model, ["0", "2"], **{"rank": 2, "alpha": 16, **settings})
    torch.manual_seed(seed)
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter)
    mp.save_peft(model, folder)
    return model


def edit(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "key", ["lora_alpha", "r", "target_modules", "use_rslora", "alpha_pattern"]
)
def test_a_field_that_is_gone_or_changed_is_noticed(key, tmp_path):
    """Without alpha PEFT's default would be taken, and load another adapter."""
    save(tmp_path, alpha={"0": 16, "2": 4}, rank_stabilized=True)
    saved = (tmp_path / CONFIG).read_text()
    before = plain()
    for change in (lambda c: c.pop(key), lambda c: c.update({key: {"use_rslora": False}.get(key)})):
        edit(tmp_path, change)
        model = plain()
        with pytest.raises(ValueError, match=f"{key}|expected"):
            mp.load_peft(model, tmp_path)
        assert list(model.state_dict()) == list(before.state_dict())
        (tmp_path / CONFIG).write_text(saved)
    mp.load_peft(plain(), tmp_path)


def test_a_field_added_by_hand_is_noticed(tmp_path):
    save(tmp_path)
    edit(tmp_path, lambda c: c.update(exclude_modules=["5"]))
    with pytest.raises(NotOneSave, match=r"exclude_modules = None.* says \['5'\].*save_file"):
        mp.load_peft(plain(), tmp_path)


@pytest.mark.parametrize("swapped", [WEIGHTS, CONFIG])
def test_files_of_two_saves_are_refused(swapped, tmp_path):
    save(tmp_path / "a", alpha=16)
    save(tmp_path / "b", seed=2, alpha=4)
    shutil.copyfile(tmp_path / "a" / swapped, tmp_path / "b" / swapped)
    with pytest.raises(NotOneSave, match="of two saves"):
        mp.load_peft(plain(), tmp_path / "b")


def test_what_no_number_depends_on_may_be_edited_and_text_may_be_laid_out_anew(tmp_path):
    model, x = save(tmp_path), torch.randn(2, 8)
    edit(tmp_path, lambda c: c.update(base_model_name_or_path="me/mine", inference_mode=False))
    edit(tmp_path, lambda c: c.update(layers_pattern=None, megatron_core="megatron.core"))
    edit(tmp_path, lambda c: c.update(target_modules=c["target_modules"][::-1]))
    again = plain()
    mp.load_peft(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_an_edited_configuration_loads_after_what_the_message_says(tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path)
    edit(tmp_path, lambda c: c.update(lora_alpha=8))
    with pytest.raises(ValueError, match=re.escape('metadata={"format": "pt"}')):
        mp.load_peft(plain(), tmp_path)
    path = tmp_path / WEIGHTS
    save_file(load_file(path), path, metadata={"format": "pt"})
    model = plain()
    mp.load_peft(model, tmp_path)
    assert model.get_submodule("0").scaling == 4


def test_older_files_of_ours_have_no_seal_and_load(tmp_path):
    model, x = save(tmp_path), torch.randn(2, 8)
    write_tensors(tmp_path / WEIGHTS, read_tensors(tmp_path / WEIGHTS))
    again = plain()
    mp.load_peft(again, tmp_path)
    assert torch.equal(again(x), model(x))


def with_metadata(path, change):
    """The file with other metadata."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


CHANGES = {
    "the checksums": lambda m: m.pop("minipeft_sha256"),
    "the configuration": lambda m: m.pop("minipeft_config"),
    "the training": lambda m: m.pop("minipeft_training"),
    "the checksum of the rest": lambda m: m.pop("minipeft_metadata"),
    "the format": lambda m: m.pop("minipeft_format"),
    "an older format": lambda m: m.update(minipeft_format="1"),
    "a newer format": lambda m: m.update(minipeft_format="3"),
    "an entry more": lambda m: m.update(more="x"),
    "another training": lambda m: m.update(minipeft_training="{}"),
    "two entries": lambda m: [m.pop("minipeft_config"), m.pop("minipeft_metadata")],
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_part_of_the_metadata_can_go_unnoticed(change, tmp_path):
    save(tmp_path, dtype=torch.float64)
    with_metadata(tmp_path / WEIGHTS, CHANGES[change])
    with pytest.raises(ValueError, match="damaged"):
        mp.load_peft(plain(), tmp_path)


def test_a_tensor_that_was_taken_out_is_missed(tmp_path):
    from safetensors.torch import save_file

    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2), "b": torch.ones(3)})
    tensors, metadata = read_all(tmp_path / "a.safetensors")
    save_file({"a": tensors["a"]}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="b is missing"):
        read_tensors(tmp_path / "a.safetensors")


def test_single_bits_of_a_configuration_never_load_as_other_numbers(tmp_path):
    model, x = save(tmp_path), torch.randn(2, 8)
    data, loaded = (tmp_path / CONFIG).read_bytes(), 0
    for index in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[index] ^= 1 << (index % 7)
        (tmp_path / CONFIG).write_bytes(damaged)
        again = plain()
        try:
            mp.load_peft(again, tmp_path)
        except ValueError:
            continue
        loaded += 1
        assert torch.equal(again(x), model(x))
    assert 0 < loaded < len(data) / 6  # what is left: spaces, names of nobody's fields


def test_a_file_that_was_changed_on_purpose_loads_as_the_error_says(tmp_path):
    import safetensors.torch

    save(tmp_path)
    path = tmp_path / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="differs from its checksum") as seen:
        mp.load_peft(plain(), tmp_path)
    line = re.search(r"safetensors\.torch\.save_file\(.*\)", str(seen.value))
    exec(line[0], {"safetensors": safetensors, "path": path})
    assert mp.load_peft(plain(), tmp_path) == ["0", "2"]
