"""A Hugging Face checkpoint: config.json, and safetensors files with an index if there are several.

config.json                         "quantization_config": what is in 4 bits
model.safetensors                   or
model.safetensors.index.json        {"weight_map": {tensor: file}}, model-00001-of-00003...
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from minipeft.io.bitsandbytes.weight import DTYPES
from minipeft.io.fields import read_object
from minipeft.io.mxfp4 import MXFP4
from minipeft.io.pickled import SUFFIXES
from minipeft.io.replace import current
from minipeft.io.shards import Reader, indexed

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MAX_JSON = 2**28  # an index has about 100 bytes a tensor


def open_weights(
    path: Path,
    *,
    mmap: bool = True,
    pickled: bool = False,
    kept: bool = False,
    verify: bool | None = True,
) -> Reader:
    """All tensors of a checkpoint directory, or of one file.

    safetensors files; with `pickled` also pickled ones (io/pickled.py), where there are no others.
    `kept` and `verify` are those of the Reader.

    Raises:
        ValueError: no weights (or pickled ones, without `pickled`), or a damaged file or index.
    """
    if path.is_file():
        if path.suffix in SUFFIXES and not pickled:
            raise ValueError(f"{path}: a pickled file; convert it to safetensors")
        return Reader([path], mmap=mmap, kept=kept, verify=verify)
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or directory")
    if current(path / INDEX).is_file():
        return indexed(path / INDEX, largest=_MAX_JSON, mmap=mmap, kept=kept, verify=verify)
    if current(path / SINGLE).is_file():
        return Reader([path / SINGLE], mmap=mmap, kept=kept, verify=verify)
    if pickled and (path / PICKLED_INDEX).is_file():
        return indexed(path / PICKLED_INDEX, largest=_MAX_JSON)
    if pickled and (path / PICKLED).is_file():
        return Reader([path / PICKLED])
    others = sorted(p.name for p in path.glob("*.bin"))
    why = f"; {others[:3]} are pickled files: convert them to safetensors" if others else ""
    if pickled:
        why = f", no {PICKLED} and no {PICKLED_INDEX}; pass the folder of a checkpoint, or a file"
    raise ValueError(f"{path}: no {SINGLE} and no {INDEX}{why}")


def config_of(path: Path) -> dict[str, object]:
    """config.json of a checkpoint directory; empty for a single file.

    Raises:
        ValueError: missing or damaged: a directory without it is not complete.
    """
    if path.is_file():
        return {}
    if not current(path / CONFIG).is_file():
        raise ValueError(
            f"{path}: no {CONFIG}, so it is not complete; expected the local folder of a checkpoint"
        )
    return read_object(path / CONFIG, largest=_MAX_JSON)


def check_four_bits(path: Path, config: Mapping[str, object]) -> None:
    """Raise ValueError if the config says that the weights are quantised in some other way."""
    said = config.get("quantization_config")
    if said is None:
        return
    method = said.get("quant_method") if isinstance(said, dict) else said
    known = method in ("bitsandbytes", MXFP4)
    if not isinstance(said, dict) or not known or said.get("load_in_8bit"):
        what = "8-bit integers" if method == "bitsandbytes" else repr(str(method)[:40])
        raise ValueError(
            f"{path / CONFIG}: quantised by {what}; expected bitsandbytes in 4 bits, or {MXFP4}"
        )


def dtype_of(config: Mapping[str, object]) -> torch.dtype:
    """The dtype of weights that config.json names; if it names none bfloat16, MXFP4's own."""
    said = config.get("dtype", config.get("torch_dtype"))
    return DTYPES.get(str(said), torch.bfloat16)


def quantization_config(
    *,
    quant_type: str,
    double_quant: bool,
    dense: Iterable[str],
    compute_dtype: torch.dtype,
    quant_storage: torch.dtype = torch.uint8,
) -> dict[str, object]:
    """What transformers wants to know of a bitsandbytes checkpoint; `dense`: layers in 16 bits."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": str(quant_storage).removeprefix("torch."),
        "llm_int8_skip_modules": sorted(dense),  # None would mean transformers' own guess
    }


def index_text(files: Mapping[str, Iterable[str]], sizes: Mapping[str, int]) -> bytes:
    """The index of several files: the tensors in each, and the bytes of each tensor."""
    weight_map = {name: file for file, names in files.items() for name in names}
    total = sum(sizes[name] for name in weight_map)
    return config_text({"metadata": {"total_size": total}, "weight_map": weight_map})


def config_text(config: Mapping[str, object]) -> bytes:
    """config.json: what makes a directory a checkpoint, and is written last."""
    return json.dumps(config, indent=2, sort_keys=True).encode()
