"""A model on the meta device, filled from a 4-bit checkpoint.

4-bit weights go from the file into the layer as codes; no dense copy of them is made.

with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
load_quantized(model, path)
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.adapters.linearity import why_not_replaceable
from minipeft.adapters.progress import Progress
from minipeft.adapters.protocol import is_conv1d
from minipeft.adapters.targets import Names
from minipeft.inject import put
from minipeft.io.bitsandbytes import checkpoint
from minipeft.io.bitsandbytes.buffers import restore_buffers
from minipeft.io.bitsandbytes.weight import state_of, weight_of
from minipeft.io.replace import read_whole
from minipeft.io.shards import Reader
from minipeft.qlora import NF4Linear
from minipeft.quantized.conv1d import NF4Conv1D


def _groups(reader: Reader) -> dict[str, list[str]]:
    """The keys that belong to each 4-bit weight, by the weight's own key."""
    groups = {weight: [key] for key in reader.specs if (weight := weight_of(key))}
    for key in reader.specs:
        name = key if key in groups else key.rpartition(".")[0]
        if name in groups and key not in groups[name]:
            groups[name].append(key)
    return groups


def _holder(model: nn.Module, key: str) -> nn.Module:
    """The linear layer whose weight has this key; raises ValueError if there is none."""
    name, _, own = key.rpartition(".")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{key}: the model has no module {name!r}; is it another model's?"
        ) from None
    plain = isinstance(module, nn.Linear) and why_not_replaceable(module) is None
    if own != "weight" or not (plain or (is_conv1d(module) and type(module).__name__ == "Conv1D")):
        raise ValueError(
            f"{key}: 4-bit codes for a {type(module).__name__}; only nn.Linear and Conv1D take them"
        )
    return module


def _layer(
    module: nn.Module, key: str, found: Mapping[str, Tensor], device: torch.device,
    compute_dtype: torch.dtype | None,
) -> NF4Linear:  # fmt: skip
    settings, state = state_of(key, found)
    weight: Tensor = module.weight  # type: ignore[assignment]
    expected = tuple(weight.T.shape if is_conv1d(module) else weight.shape)
    if settings.shape != expected:
        raise ValueError(
            f"{key}: codes of a weight {settings.shape}; the model's is {expected} (out, in)"
        )
    kind = NF4Conv1D if is_conv1d(module) else NF4Linear
    layer = kind(
        expected[1], expected[0], bias=False, block_size=settings.block_size,
        double_quant=settings.double_quant, compute_dtype=compute_dtype, dtype=settings.dtype,
        device="meta",
    )  # fmt: skip
    layer.fill({name: value.to(device) for name, value in state.items()})
    if isinstance(layer, NF4Conv1D):
        layer.dense_class = type(module)
    return layer.train(module.training)


def _check_dense(
    path: Path, wanted: Mapping[str, Tensor], reader: Reader, packed: set[str]
) -> None:
    """Raise ValueError unless the file has what the model wants beside 4-bit weights, and no more.

    A tied tensor may come once.
    """
    present = reader.specs.keys() - packed
    ids = {id(wanted[name]) for name in wanted.keys() & present}
    missing = sorted(name for name, value in wanted.items() if id(value) not in ids)
    unexpected = sorted(present - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path}: missing {missing[:5]} ({len(missing)} in all), unexpected {unexpected[:5]} "
            f"({len(unexpected)} in all); is the checkpoint another model's?"
        )
    for name in present:
        if reader.specs[name][1] != tuple(wanted[name].shape):
            raise ValueError(
                f"{reader.file_of[name]}: {name} has shape {reader.specs[name][1]}; the model's "
                f"is {tuple(wanted[name].shape)}"
            )


def load_quantized(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    progress: bool | None = None,
    mmap: bool = True,
) -> Names:
    """Fill `model`, built on the meta device, from a 4-bit checkpoint; bitsandbytes is not needed.

    `path` is a directory (config.json and safetensors files, with an index if there are several)
    or one safetensors file, written by transformers with bitsandbytes, by `save_quantized` or by
    `quantize_checkpoint`.  Layers whose weights are codes become NF4Linear (NF4Conv1D) in place;
    the rest is loaded in the file's dtype, or in `dtype`.  Weights go to `device`, one tensor at a
    time; tied tensors stay tied; buffers that no file holds (rotary frequencies) are computed by
    the model's own `_init_weights`.  Checksums are verified where the file has them.  `progress`
    shows a bar; None: on a terminal.  `mmap=False` reads each tensor from its file instead of
    mapping the files: for disks on a network.  Returns the names of the 4-bit layers.

    Raises:
        ValueError: the checkpoint is incomplete, damaged, not in 4 bits, or another model's; the
            file and the tensor are named.  The model is then as it was.
    """
    path, device = Path(path), torch.device(device)
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_quantized: expected a module, got {type(model).__name__}")

    def load() -> Names:
        checkpoint.check_four_bits(path, checkpoint.config_of(path))
        with checkpoint.open_weights(path, mmap=mmap) as reader:
            groups = _groups(reader)
            if not groups:
                raise ValueError(
                    f"{path}: no tensor is in 4 bits; load it as it is and call quantize_model, or "
                    "write a 4-bit checkpoint with quantize_checkpoint"
                )
            holders = {key: _holder(model, key) for key in groups}
            wanted: dict[str, Tensor] = {
                name: value for name, value in model.state_dict(keep_vars=True).items()
                if name not in groups
            }  # fmt: skip
            _check_dense(path, wanted, reader, {key for keys in groups.values() for key in keys})
            names = [*groups, *(name for name in wanted if name in reader.specs)]
            layers: dict[str, NF4Linear] = {}
            tensors: dict[str, Tensor] = {}
            for name in Progress(names, desc="loading", unit="tensor", shown=progress):
                if name not in groups:
                    value = reader.read(name)
                    kept = dtype is None or not value.is_floating_point()
                    tensors[name] = value.to(device, value.dtype if kept else dtype)
                    continue
                found = {key: reader.read(key) for key in groups[name]}
                try:
                    layers[name] = _layer(holders[name], name, found, device, compute_dtype)
                except ValueError as error:
                    raise ValueError(f"{reader.file_of[name]}: {error}") from error
        buffers = restore_buffers(model, device)
        return _assign(model, layers, tensors, wanted, buffers)

    return read_whole(path.parent if path.is_file() else path, load)


def _assign(
    model: nn.Module,
    layers: Mapping[str, NF4Linear],
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> Names:
    """Put everything into the model."""
    by_id: dict[int, Tensor] = {}
    for name, value in tensors.items():
        first = by_id.setdefault(id(wanted[name]), value)
        if first is not value and not torch.equal(first, value):
            raise ValueError(
                f"{name}: tied to another tensor in the model, but the file has two values; untie "
                "them (tie_word_embeddings=False)"
            )
    made = {
        id(old): nn.Parameter(by_id[id(old)], old.requires_grad)
        if isinstance(old, nn.Parameter) else by_id[id(old)]
        for old in wanted.values()
    }  # fmt: skip
    for name, value in {**{n: made[id(old)] for n, old in wanted.items()}, **buffers}.items():
        holder, _, own = name.rpartition(".")
        setattr(model.get_submodule(holder), own, value)
    places = {key.rpartition(".")[0]: layer for key, layer in layers.items()}
    for name, layer in places.items():
        bias = model.get_submodule(name).bias
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[operator]
    put(model, places)
    return Names(places)
