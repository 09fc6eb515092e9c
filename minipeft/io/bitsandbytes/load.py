"""A model on the meta device, filled from a 4-bit checkpoint.

4-bit weights go from the file into the layer as codes; no dense copy of them is made.

with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
load_quantized(model, path)
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.progress import Progress
from minipeft.adapters.protocol import is_conv1d
from minipeft.adapters.targets import Names
from minipeft.inject import put
from minipeft.integrations.transformers.file_names import Joined
from minipeft.io import mxfp4
from minipeft.io.bitsandbytes import checkpoint
from minipeft.io.bitsandbytes.blocks import Coded, NotWholeBlocksError, moved
from minipeft.io.bitsandbytes.buffers import restore_buffers
from minipeft.io.bitsandbytes.contents import Contents
from minipeft.io.bitsandbytes.plan import Ignore, Plan, planned
from minipeft.io.replace import read_whole
from minipeft.model.peft_words import in_our_words
from minipeft.qlora import NF4Linear, PackedModule
from minipeft.quantized.conv1d import NF4Conv1D
from minipeft.quantized.experts import NF4Experts


def _layer(
    place: Any, coded: Coded, device: torch.device, compute_dtype: torch.dtype | None
) -> PackedModule:
    """The 4-bit layer for a place, filled."""
    settings, state = coded
    stored: dict[str, Any] = {
        "block_size": settings.block_size, "double_quant": settings.double_quant,
        "dtype": settings.dtype, "device": "meta",
    }  # fmt: skip
    layer: NF4Linear | NF4Experts
    if isinstance(place, nn.Parameter):
        turned = settings.quant_type == mxfp4.MXFP4
        layer = NF4Experts(*settings.shape, turned=turned, compute_dtype=compute_dtype, **stored)
    else:
        out_features, in_features = settings.shape
        kind = NF4Conv1D if is_conv1d(place) else NF4Linear
        layer = kind(in_features, out_features, bias=False, compute_dtype=compute_dtype, **stored)
    layer.fill({name: value.to(device) for name, value in state.items()})
    if isinstance(layer, NF4Conv1D):
        layer.dense_class = type(place)
    return layer if isinstance(place, nn.Parameter) else layer.train(place.training)


class _Loading:
    """The layers and tensors made so far, by the model's names."""

    def __init__(
        self, plan: Plan, contents: Contents, device: torch.device, dtype: torch.dtype | None,
        compute_dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.plan, self.contents, self.device = plan, contents, device
        self.dtype, self.compute_dtype = dtype, compute_dtype
        self.layers: dict[str, PackedModule] = {}
        self.tensors: dict[str, Tensor] = {}
        self.made: dict[str, str] = {}
        self.notes: dict[str, str] = {}

    def one(self, name: str, key: str) -> None:
        """A weight that is one in the file and one in the model."""
        if name in self.plan.places:
            self._coded(name, key, self.contents.coded(key))
        else:
            self._dense(name, self.contents.dense(key))

    def several(self, join: Joined) -> None:
        """Weights that are joined or split on the way."""
        contents, count = self.contents, len(join.keys)
        where = contents.file(join.keys[0])
        why = "not all of them are in 4 bits"
        if all(key in contents.coded_keys for key in join.keys):
            pieces = {key: contents.coded(key) for key in join.keys}
            try:
                found = moved(pieces, join)
                for name, coded in found.items():
                    if name not in self.plan.places or coded[0].shape != self._shape(name):
                        raise NotWholeBlocksError(f"{name} cannot keep blocks of {join.keys[0]}")
                for name, coded in found.items():
                    self._coded(name, join.keys[0], coded)
                    self.made[name.removesuffix(".weight")] = f"made of {count} in the file"
                return
            except NotWholeBlocksError as error:
                why = str(error)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        values = join({key: contents.dense(key) for key in join.keys})
        for name, value in values.items():
            self._dense(name, value)
            if any(key in contents.coded_keys for key in join.keys):
                self.notes[name] = f"decoded to {value.dtype}, no longer in 4 bits: {why}"

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.plan.own[name].shape)

    def _coded(self, name: str, key: str, coded: Coded) -> None:
        place = self.plan.places[name]
        try:
            self.layers[name] = _layer(place, coded, self.device, self.compute_dtype)
        except ValueError as error:
            raise ValueError(f"{self.contents.file(key)}: {key}: {error}") from error

    def _dense(self, name: str, value: Tensor) -> None:
        kept = self.dtype is None or not value.is_floating_point()
        self.tensors[name] = value.to(self.device, value.dtype if kept else self.dtype)


@in_our_words
def load_quantized(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    ignore: Ignore = (),
    progress: bool | None = None,
    mmap: bool = True,
) -> Names:
    """Fill `model`, built on the meta device, from a 4-bit checkpoint; bitsandbytes is not needed.

    `path` is a directory (config.json and safetensors files, with an index if there are several)
    or one safetensors file, written by transformers with bitsandbytes, by `save_quantized` or by
    `quantize_checkpoint`, or in MXFP4 (gpt-oss).  Layers whose weights are codes become NF4Linear
    (NF4Conv1D) in place, 3-D weights of experts NF4Experts; the rest is loaded in the file's dtype,
    or in `dtype`; an MXFP4 weight has `dtype`, or that of config.json.  Weights go to `device`, one
    tensor at a time; tied tensors stay tied; buffers that no file holds (rotary frequencies) are
    computed by the model's own `_init_weights`.  Checksums are verified where the file has them.
    `progress` shows a bar; None: on a terminal.  `mmap=False` reads each tensor from its file
    instead of mapping the files: for disks on a network.

    In a model of transformers, names in the file become the model's by transformers' own tables.
    Tensors that these join or split (one for each expert) keep their codes where whole blocks move,
    with their scales in float32; where blocks would be taken apart they are decoded, and the
    result's `.notes` says so.  Tensors of the file that the model's class declares ignorable are
    left out, and so are those that `ignore` names: a full-match expression, or a list of names and
    of beginnings of names up to a dot.  Returns the names of the 4-bit layers; `.left_out` says
    what went nowhere and why, `.made` what was joined.

    Raises:
        ValueError: the checkpoint is incomplete, damaged, not in 4 bits, or another model's; a name
            that fits nothing, two for one; experts that the model reads whole; the file and the
            tensor are named.  The model is then as it was.
    """
    path, device = Path(path), torch.device(device)
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_quantized: expected a module, got {type(model).__name__}")

    def load() -> Names:
        config = checkpoint.config_of(path)
        checkpoint.check_four_bits(path, config)
        with checkpoint.open_weights(path, mmap=mmap) as reader:
            contents = Contents(reader, dtype or checkpoint.dtype_of(config))
            if not contents.coded_keys:
                raise ValueError(
                    f"{path}: no tensor is in 4 bits; load it as it is and call quantize_model, or "
                    "write a 4-bit checkpoint with quantize_checkpoint"
                )
            plan = planned(path, model, contents, ignore)
            loading = _Loading(plan, contents, device, dtype, compute_dtype)
            steps: list[Any] = [*plan.names.items(), *plan.joined]
            for step in Progress(steps, desc="loading", unit="tensor", shown=progress):
                loading.several(step) if isinstance(step, Joined) else loading.one(*step)
        buffers = restore_buffers(model, device, plan.computed)
        places = _assign(model, plan, loading.layers, loading.tensors, buffers)
        return Names(places, plan.ignored, loading.made, loading.notes)

    return read_whole(path.parent if path.is_file() else path, load)


def _assign(
    model: nn.Module,
    plan: Plan,
    layers: Mapping[str, PackedModule],
    tensors: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> list[str]:
    """Put everything into the model; the names of the 4-bit layers."""
    own = plan.own
    by_id: dict[int, Tensor] = {}
    for name, value in tensors.items():
        first = by_id.setdefault(id(own[name]), value)
        if first is not value and not torch.equal(first, value):
            raise ValueError(
                f"{name}: tied to another tensor in the model, but the file has two values; untie "
                "them (tie_word_embeddings=False)"
            )
    made = {
        number: nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        for number, value, old in ((id(o), by_id[id(o)], o) for o in own.values() if id(o) in by_id)
    }  # fmt: skip
    values = {name: made[id(old)] for name, old in own.items() if id(old) in made}
    for name, value in {**values, **buffers}.items():
        holder, _, last = name.rpartition(".")
        old = own.get(name)
        if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, old.requires_grad)
        setattr(model.get_submodule(holder), last, value)
    places: dict[str, nn.Module | nn.Parameter] = {}
    by_place = {id(plan.places[name]): layer for name, layer in layers.items()}
    order = {name: number for number, name in enumerate(own)}
    for name, layer in sorted(layers.items(), key=lambda item: order[item[0]]):
        if isinstance(layer, NF4Linear):
            name = name.rpartition(".")[0]
            bias = model.get_submodule(name).bias
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[operator]
        places[name] = layer
    for name, module in model.named_modules(remove_duplicate=False):  # under its other names too
        if id(module) in by_place:
            places.setdefault(name, by_place[id(module)])
    put(model, places)
    return list(places)
