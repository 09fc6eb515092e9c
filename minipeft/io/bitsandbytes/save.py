"""A model with 4-bit layers as a checkpoint that transformers with bitsandbytes loads.

Experts are the exception: `save_quantized` says how they are written.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import is_adapter, is_packed, linear_shape
from minipeft.adapters.replicas import unwrapped
from minipeft.adapters.sharded import refuse_shards
from minipeft.adapters.state import named_adapters
from minipeft.integrations.transformers.file_names import write_names
from minipeft.io import mxfp4
from minipeft.io.bitsandbytes import checkpoint
from minipeft.io.bitsandbytes.weight import entries
from minipeft.io.header import nbytes
from minipeft.io.replace import Replacement
from minipeft.io.shards import ShardWriter, split
from minipeft.model.base_state import base_state_dict, plain_modules
from minipeft.model.peft_words import in_our_words
from minipeft.qlora import NF4Linear, PackedModule
from minipeft.quantized.experts import NF4Experts


def _tensors(
    model: nn.Module, quant_storage: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, PackedModule]]:
    """The checkpoint's tensors by their names in files, and the 4-bit layers by the model's."""
    layers: dict[str, PackedModule] = {}
    modules = plain_modules(model)
    for name, module in modules.items():
        if not is_packed(module):
            continue
        if not isinstance(module, NF4Linear | NF4Experts):
            raise ValueError(
                f"save_quantized: {name} is a {type(module).__name__}, which bitsandbytes' "
                "format does not have; dequantise it, or keep the state dict"
            )
        layers[name] = module
    if not layers:
        raise ValueError("save_quantized: the model has no 4-bit layer; call quantize_model first")
    found: dict[str, PackedModule | Tensor] = {}
    own_names: list[str] = []
    seen: set[tuple[int, int]] = set()
    for key, value in base_state_dict(model).items():
        name, _, own = key.rpartition(".")
        if name in layers and own != "bias":
            if own == "packed":
                found[_weight_name(name, layers[name])] = layers[name]
            continue
        if value.numel() == 0 or value.is_meta:
            raise ValueError(f"save_quantized: {key} has no values here ({tuple(value.shape)})")
        place = (value.data_ptr(), value.numel())
        if place not in seen or name in layers:  # tied ones are written once, as transformers does
            found[key] = value
        seen.add(place)
        own_names.append(key)
    shapes = {name: tuple(what.shape) for name, what in found.items()}
    try:
        names = write_names(modules[""], {*own_names, *found}, found, shapes)
    except ValueError as error:
        raise ValueError(f"save_quantized: {error}") from None
    tensors: dict[str, Tensor] = {}
    for name, what in found.items():
        if isinstance(what, PackedModule):
            tensors |= _codes(names[name], what, quant_storage)
        else:
            tensors[names[name]] = what
    return tensors, layers


def _weight_name(name: str, layer: PackedModule) -> str:
    """The name of the dense weight that a layer stands for."""
    if isinstance(layer, NF4Experts):
        return name
    return f"{name}.weight" if name else "weight"


def _codes(name: str, layer: PackedModule, quant_storage: torch.dtype) -> dict[str, Tensor]:
    """A 4-bit weight as the file's tensors: bitsandbytes', or MXFP4's if it came from those."""
    if not (isinstance(layer, NF4Experts) and layer.turned):
        return entries(name, layer, quant_storage=quant_storage)
    made = None
    if _is_mxfp4(layer):
        made = mxfp4.entries(name, layer.state().packed, layer.absmax, layer.coded_shape)
    if made is None:
        raise ValueError(
            f"save_quantized: {name} has codes along its second axis that are not MXFP4's; no file "
            "format has them: dequantise it, or keep the state dict"
        )
    return made


def _is_mxfp4(layer: PackedModule) -> bool:
    own = layer.codebook
    return own is not None and tuple(own.tolist()) == mxfp4.E2M1 and layer.block_size == 32


def _config(
    model: nn.Module, layers: dict[str, PackedModule], quant_storage: torch.dtype
) -> dict[str, Any]:
    own: Any = getattr(model, "config", None)
    config: dict[str, Any] = dict(own.to_dict()) if hasattr(own, "to_dict") else {}
    config.setdefault("architectures", [type(model).__name__])
    config["architectures"] = config["architectures"] or [type(model).__name__]
    first = next(iter(layers.values()))
    compute = next((m.compute_dtype for m in layers.values() if isinstance(m, NF4Linear)), None)
    dense = [n for n, m in plain_modules(model).items()
             if n and not is_packed(m) and not is_adapter(m) and linear_shape(m)]  # fmt: skip
    if all(map(_is_mxfp4, layers.values())):
        config["quantization_config"] = {
            "quant_method": mxfp4.MXFP4, "modules_to_not_convert": dense
        }  # fmt: skip
        config.setdefault("dtype", str(first.weight_dtype).removeprefix("torch."))
        return config
    fp4 = first.codebook is not None
    config["quantization_config"] = checkpoint.quantization_config(
        quant_type="fp4" if fp4 else "nf4", double_quant=first.double_quant, dense=dense,
        compute_dtype=compute or first.weight_dtype, quant_storage=quant_storage,
    )  # fmt: skip
    return config


@in_our_words
def save_quantized(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 10**9,
    quant_storage: torch.dtype = torch.uint8,
) -> list[str]:
    """Write a model with 4-bit layers as a bitsandbytes checkpoint; returns the 4-bit names.

    config.json (the model's own, if it has one, with a quantization_config), and safetensors
    files of at most `max_shard_bytes` with an index if there are several; a sha256 for every
    tensor.  Adapters are not part of it, and a warning says so: the base is written under its own
    names, a model of
    transformers under the names that transformers gives them in files.  All files become the
    directory's in one rename (io/replace.py), so one with a config.json is complete, and one in
    which a save died can be saved into.  `quant_storage` views codes as a float dtype, as sharded
    training with bitsandbytes wants them.

    NF4Experts are written as bitsandbytes' `replace_parameter_4bit` writes a parameter: one tensor
    of codes for all experts, under the parameter's name, with the same entries beside it as a
    linear layer's.  `load_quantized` reads them back; transformers with bitsandbytes has no 4-bit
    experts.  Experts that came from MXFP4 files are written as MXFP4 again (io/mxfp4.py); if there
    are no other 4-bit layers, transformers reads that checkpoint too.

    Raises:
        ValueError: no 4-bit layer, one that the format does not have (embeddings), a
            tensor without values, one that transformers' table of names leads to no file name for,
            a directory that holds a checkpoint already, or shards of fully_shard.
        OSError: the disk is full, and the like; the directory is then as it was.
    """
    directory = Path(path)
    if max_shard_bytes < 1:
        raise ValueError(f"save_quantized: max_shard_bytes={max_shard_bytes}; expected above 0")
    model = unwrapped(model)
    refuse_shards(
        "save_quantized", model,
        "the base does not change while adapters train: write it before fully_shard, and the "
        "adapter with save_peft",
    )  # fmt: skip
    tensors, layers = _tensors(model, quant_storage)
    if adapters := named_adapters(model):
        warnings.warn(
            f"save_quantized: the adapter ({next(iter(adapters))}, {len(adapters)} layers in all) "
            "is not in this checkpoint, which holds the base; save_peft writes the adapter",
            stacklevel=3,
        )
    config = _config(model, layers, quant_storage)
    specs = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    sizes = {name: nbytes(spec) for name, spec in specs.items()}
    files = split(sizes, max_shard_bytes)

    def refuse_another() -> None:
        present = [n for n in (checkpoint.CONFIG, checkpoint.INDEX) if (directory / n).exists()]
        if present or any(directory.glob("*.safetensors")):
            raise ValueError(
                f"save_quantized: {directory} holds a checkpoint already; choose another"
            )

    with Replacement(directory, check=refuse_another) as unit:
        for file, names in files.items():
            announced = {name: specs[name] for name in names}
            with ShardWriter(unit.path(file), announced, shown=directory / file) as writer:
                for name in names:
                    writer.write(name, tensors[name])
                writer.finish()
        if len(files) > 1:
            unit.write(checkpoint.INDEX, checkpoint.index_text(files, sizes))
        unit.write(checkpoint.CONFIG, checkpoint.config_text(config))
    return list(layers)
