"""A model with 4-bit layers as a checkpoint that transformers with bitsandbytes loads."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import is_adapter, is_packed, linear_shape
from minipeft.adapters.state import named_adapters
from minipeft.io.bitsandbytes import checkpoint
from minipeft.io.bitsandbytes.weight import entries
from minipeft.io.header import nbytes
from minipeft.io.replace import Replacement
from minipeft.io.shards import ShardWriter, split
from minipeft.model.base_state import base_state_dict, plain_modules
from minipeft.qlora import NF4Linear, PackedModule


def _tensors(
    model: nn.Module, quant_storage: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, PackedModule]]:
    """The checkpoint's tensors, and the 4-bit layers by their names."""
    layers: dict[str, PackedModule] = {}
    for name, module in plain_modules(model).items():
        if not is_packed(module):
            continue
        if not isinstance(module, NF4Linear):
            raise ValueError(
                f"save_quantized: {name} is a {type(module).__name__}, which bitsandbytes' "
                "format does not have; dequantise it, or keep the state dict"
            )
        layers[name] = module
    if not layers:
        raise ValueError("save_quantized: the model has no 4-bit layer; call quantize_model first")
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for key, value in base_state_dict(model).items():
        name, _, own = key.rpartition(".")
        if name in layers:
            if own == "packed":
                weight = f"{name}.weight" if name else "weight"
                tensors |= entries(weight, layers[name], quant_storage=quant_storage)
            elif own == "bias":
                tensors[key] = value
            continue
        if value.numel() == 0 or value.is_meta:
            raise ValueError(f"save_quantized: {key} has no values here ({tuple(value.shape)})")
        place = (value.data_ptr(), value.numel())
        if place not in seen:  # a tied tensor is written once, as transformers does
            tensors[key] = value
        seen.add(place)
    return tensors, layers


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
    fp4 = first.codebook is not None
    config["quantization_config"] = checkpoint.quantization_config(
        quant_type="fp4" if fp4 else "nf4", double_quant=first.double_quant, dense=dense,
        compute_dtype=compute or first.weight_dtype, quant_storage=quant_storage,
    )  # fmt: skip
    return config


def save_quantized(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 10**9,
    quant_storage: torch.dtype = torch.uint8,
) -> list[str]:
    """Write a model with NF4Linear layers as a bitsandbytes checkpoint; returns the 4-bit names.

    config.json (the model's own, if it has one, with a quantization_config), and safetensors
    files of at most `max_shard_bytes` with an index if there are several; a sha256 for every
    tensor.  Adapters are not part of it, and a warning says so: the base is written under its own
    names.  All files
    become the directory's in one rename (io/replace.py), so one with a config.json is complete, and
    one in which a save died can be saved into.  `quant_storage` views codes as a float
    dtype, as sharded training with bitsandbytes wants them.

    Raises:
        ValueError: no 4-bit layer, one that the format does not have (embeddings, experts), a
            tensor without values, or a directory that holds a checkpoint already.
        OSError: the disk is full, and the like; the directory is then as it was.
    """
    directory = Path(path)
    if max_shard_bytes < 1:
        raise ValueError(f"save_quantized: max_shard_bytes={max_shard_bytes}; expected above 0")
    tensors, layers = _tensors(model, quant_storage)
    if adapters := named_adapters(model):
        warnings.warn(
            f"save_quantized: the adapter ({next(iter(adapters))}, {len(adapters)} layers in all) "
            "is not in this checkpoint, which holds the base; save_peft writes the adapter",
            stacklevel=2,
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
