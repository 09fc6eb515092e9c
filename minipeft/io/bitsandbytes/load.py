"""A model on the meta device, filled from a 4-bit checkpoint.

4-bit weights go from the file into the layer as codes; no dense copy of them is made.

    model = meta_model(path)                  transformers' class, without memory
    inject_qlora(model, "all-linear", 16)     may come before: then adapters start here
    load_quantized(model, path)

Each process of a model that fully_shard has cut reads its own part (parts.py).  With `mapped` the
weights stay in the file (io/mapped.py).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.adapters.progress import Progress
from minipeft.adapters.protocol import is_conv1d
from minipeft.adapters.targets import Names
from minipeft.inject import restoring
from minipeft.integrations.transformers.file_names import Joined
from minipeft.io import mxfp4
from minipeft.io.bitsandbytes import checkpoint, parts
from minipeft.io.bitsandbytes.assign import assign, check_ties
from minipeft.io.bitsandbytes.blocks import Coded, NotWholeBlocksError, moved
from minipeft.io.bitsandbytes.buffers import restore_buffers
from minipeft.io.bitsandbytes.contents import Contents
from minipeft.io.bitsandbytes.plan import Ignore, Plan, planned
from minipeft.io.bitsandbytes.prepared import is_sharded
from minipeft.io.mapped import Watch
from minipeft.io.replace import read_whole
from minipeft.model.peft_words import in_our_words
from minipeft.model.start_later import settings_of, start, waiting
from minipeft.qlora import NF4Linear, PackedModule, as_float32
from minipeft.quantized.conv1d import NF4Conv1D
from minipeft.quantized.experts import NF4Experts


class _Options(NamedTuple):
    """The caller's wishes."""

    device: torch.device
    dtype: torch.dtype | None
    compute_dtype: torch.dtype | None
    mapped: bool


def _layer(
    place: Any, coded: Coded, options: _Options, device: torch.device, copy: bool
) -> PackedModule:
    """The 4-bit layer for a place, filled."""
    settings, state = coded
    stored: dict[str, Any] = {
        "block_size": settings.block_size, "double_quant": settings.double_quant,
        "dtype": settings.dtype, "device": "meta", "compute_dtype": options.compute_dtype,
    }  # fmt: skip
    layer: NF4Linear | NF4Experts
    if isinstance(place, nn.Parameter | NF4Experts):
        turned = settings.quant_type == mxfp4.MXFP4
        layer = NF4Experts(*settings.shape, turned=turned, **stored)
    else:
        out_features, in_features = settings.shape
        turned = is_conv1d(place) or isinstance(place, NF4Conv1D)
        kind = NF4Conv1D if turned else NF4Linear
        layer = kind(in_features, out_features, bias=False, **stored)
    layer.fill({name: value.to(device, copy=copy) for name, value in state.items()})
    if isinstance(layer, NF4Conv1D) and not isinstance(place, NF4Conv1D):
        layer.dense_class = type(place)
    return layer if isinstance(place, nn.Parameter) else layer.train(place.training)


class _Loading:
    """The layers and tensors made so far, by the model's names."""

    def __init__(self, plan: Plan, contents: Contents, options: _Options) -> None:
        self.plan, self.contents, self.options = plan, contents, options
        self.layers: dict[str, PackedModule] = {}
        self.tensors: dict[str, Tensor] = {}
        self.made: dict[str, str] = {}
        self.notes: dict[str, str] = {}

    def one(self, name: str, key: str) -> None:
        """A weight that is one in the file and one in the model."""
        if name in self.plan.places:
            self._coded(name, key, self.contents.coded(key))
        else:
            self._dense(name, key, self.contents.dense(key))

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
            self._dense(name, join.keys[0], value)
            if any(key in contents.coded_keys for key in join.keys):
                self.notes[name] = f"decoded to {value.dtype}, no longer in 4 bits: {why}"

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.plan.own[name].shape)

    def _coded(self, name: str, key: str, coded: Coded) -> None:
        place = self.plan.places[name]
        try:
            sharded = isinstance(place, PackedModule) and _is_sharded(place)
            copy = self.contents.views and not (self.options.mapped or sharded)
            device = torch.device("cpu") if sharded else self.options.device
            layer = self.layers[name] = _layer(place, coded, self.options, device, copy)
            if isinstance(place, PackedModule):
                self._same_parameters(place, layer)
            packed = layer.packed_parameters()["packed"]
            if self.options.mapped and not sharded and not self.contents.reader.is_kept(packed):
                self.notes[name] = "copied, not mapped: the file has its codes in another order"
        except ValueError as error:
            raise ValueError(f"{self.contents.file(key)}: {key}: {error}") from error

    def _same_parameters(self, place: PackedModule, layer: PackedModule) -> None:
        """Check that a layer that is there can have the codes; cut them where it is sharded."""
        found, metas = layer.packed_parameters(), place.packed_parameters()
        sharded = _is_sharded(place)
        own = "codebook_bytes"
        if found.keys() - {own} != metas.keys() - {own} or (sharded and own in found):
            raise ValueError(
                f"codes with {sorted(found)}, the model's layer has {sorted(metas)}; inject after "
                "load_quantized"
            )
        if not sharded:
            scales = found.get("absmax_bytes")
            if scales is not None and not self.contents.finite:
                _check_finite(as_float32(scales))
            return
        for part, whole in found.items():
            keep, device = self.options.mapped, self.options.device
            cut = parts.cut(part, metas[part], whole.detach(), device, keep=keep)
            if part == "absmax_bytes":
                flat = whole.dim() == 1
                _check_finite(as_float32(whole if flat else cut.to_local()))  # type: ignore[attr-defined]
            layer._parameters[part] = cut

    def _dense(self, name: str, key: str, value: Tensor) -> None:
        kept = self.options.dtype is None or not value.is_floating_point()
        dtype = value.dtype if kept else self.options.dtype
        old = self.plan.own[name]
        if is_sharded(old):
            keep = self.options.mapped and dtype == value.dtype
            cut = parts.cut(name, old, value, self.options.device, keep=keep)
            self.tensors[name] = cut if dtype == value.dtype else _cast(cut, dtype)
            return
        self.tensors[name] = made = value.to(self.options.device, dtype)
        if self.contents.views and not self.options.mapped and made is value:
            self.tensors[name] = made.clone()  # of a sharded model, whose file is let go
        elif self.options.mapped and not self.contents.reader.is_kept(made):
            why = "another dtype" if made is not value else "not aligned in the file, or decoded"
            self.notes[name] = f"copied, not mapped: {why}"


def _check_finite(scales: Tensor) -> None:
    if not bool(scales.isfinite().all()):
        raise ValueError("holds scales that are NaN or Inf")


def _is_sharded(place: PackedModule) -> bool:
    return any(map(is_sharded, place.packed_parameters().values()))


def _cast(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)


class _Loaded(NamedTuple):
    """What `_read` gives."""

    plan: Plan
    loading: _Loading
    buffers: dict[str, Tensor]
    watch: Watch | None
    fingerprint: str


@in_our_words
def load_quantized(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    ignore: Ignore = (),
    progress: bool | None = None,
    mmap: bool = True,
    mapped: bool = False,
    verify: bool | None = None,
) -> Names:
    """Fill `model`, built on the meta device, from a 4-bit checkpoint; bitsandbytes is not needed.

    `path` is a directory (config.json and safetensors files, with an index if there are several)
    or one safetensors file, written by transformers with bitsandbytes, by `save_quantized` or by
    `quantize_checkpoint`, or in MXFP4 (gpt-oss).  Layers whose weights are codes become NF4Linear
    (NF4Conv1D) in place, 3-D weights of experts NF4Experts; the rest is loaded in the file's dtype,
    or in `dtype`; an MXFP4 weight has `dtype`, or that of config.json.  Weights go to `device` (the
    CPU unless said otherwise), one tensor at a time; tied tensors stay tied; buffers that no file
    holds (rotary frequencies) are computed by the model's own `_init_weights`.  `progress` shows a
    bar; None: on a terminal.  `mmap=False` reads each tensor from its file instead of mapping the
    files: for disks on a network.

    The model may have been through `inject_qlora`, `quantize_model` or `inject_lora` on the meta
    device.  4-bit layers then get their codes, which must have their block_size and double_quant,
    and adapters without values get their start, as if they were injected now.

    It may also be sharded by `fully_shard` after that, on the meta device.  Every process calls
    this with the same arguments; each reads the bytes of its own rows, and has no whole tensor of
    them.  All start the adapters from the random numbers of the first.  Weights go to the device
    of the mesh.  If one process cannot load, all raise.

    With `mapped` codes and dense tensors are pages of the files (on a CPU): nothing is copied, and
    the system reads what is touched and drops it when memory is short, so the model may be larger
    than memory.  A tensor that is cast by `dtype`, or lies unaligned, is copied and in `.notes`.
    The files must stay as they are: one that has changed makes the next forward of `model` raise
    (not of compiled code, nor of a module inside it), and one that becomes shorter during a forward
    ends the process (SIGBUS).

    Checksums are verified where the file has them and all of it is read anyway.  With `mapped`, and
    of a sharded model, only descriptions are; `verify=True` reads everything once first (each
    process a share of the tensors), `verify=False` compares nothing.

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
            tensor are named.  A 4-bit layer of the model that the file has dense, or with other
            settings; an adapter on the meta device whose start is not known; a sharded model with
            dense layers where the file has codes, or with values.  The model is then as it was.
    """
    path = Path(path)
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_quantized: expected a module, got {type(model).__name__}")
    meshes = parts.meshes_of(model)

    def load() -> _Loaded:
        parts.refuse_values(model)
        own = parts.device_of(meshes) if meshes and device is None else None
        where = own or torch.device(device or "cpu")
        _check_options(mapped, mmap, where, bool(meshes))
        options = _Options(where, dtype, compute_dtype, mapped)
        folder = path.parent if path.is_file() else path
        return read_whole(
            folder, lambda: _read(model, path, options, meshes, ignore, progress, mmap, verify)
        )

    if not meshes:
        loaded = load()
    else:
        error, found = None, None
        try:
            found = load()
        except Exception as failed:  # the others wait to hear of it
            error = failed
        parts.agree(meshes, error, found.fingerprint if found else "")
        assert found is not None
        loaded = found
    plan, loading, where = loaded.plan, loaded.loading, loaded.loading.options.device
    with restoring(model):
        places = assign(plan, loading.layers, loading.tensors, loaded.buffers)
        _start(model, meshes, where)
        if left := [name for name, p in model.named_parameters() if p.is_meta]:
            raise ValueError(f"load_quantized: {left[:3]} would stay on the meta device")
        for number, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, Watch):  # of weights that this load has replaced
                del model._forward_pre_hooks[number]
        if loaded.watch is not None:
            model.register_forward_pre_hook(loaded.watch)
    return Names(places, plan.ignored, loading.made, loading.notes)


def _check_options(mapped: bool, mmap: bool, device: torch.device, sharded: bool) -> None:
    if mapped and (not mmap or device.type != "cpu"):
        raise ValueError(
            f"load_quantized: mapped=True with mmap={mmap} and device={str(device)!r}; weights can "
            "be pages of a file on the CPU only, and only of a file that may be mapped"
        )
    if sharded and not mmap:
        raise ValueError("load_quantized: shards are read from mapped files; leave mmap=True")


def _read(
    model: nn.Module, path: Path, options: _Options, meshes: Sequence[Any], ignore: Ignore,
    progress: bool | None, mmap: bool, verify: bool | None,
) -> _Loaded:  # fmt: skip
    """Everything that the model gets; nothing is changed."""
    config = checkpoint.config_of(path)
    checkpoint.check_four_bits(path, config)
    sharded = bool(meshes)
    views = sharded or options.mapped
    whole = False if verify is False else None if views else True  # as the Reader takes it
    with checkpoint.open_weights(path, mmap=mmap, kept=views, verify=whole) as reader:
        dtype = options.dtype or checkpoint.dtype_of(config)
        contents = Contents(reader, dtype, views=views, finite=not sharded)
        if not contents.coded_keys:
            raise ValueError(
                f"{path}: no tensor is in 4 bits; load it as it is and call quantize_model, or "
                "write a 4-bit checkpoint with quantize_checkpoint"
            )
        adapters = waiting("load_quantized", model)
        plan = planned(path, model, contents, ignore)
        if sharded:
            parts.check_plan(plan, contents)
        if verify and views:
            mine = parts.shares(meshes, list(reader.specs))
            for name in Progress(mine, desc="verifying", unit="tensor", shown=progress):
                reader.check(name)
        loading = _Loading(plan, contents, options)
        steps: list[Any] = [*plan.names.items(), *plan.joined]
        for step in Progress(steps, desc="loading", unit="tensor", shown=progress):
            loading.several(step) if isinstance(step, Joined) else loading.one(*step)
        check_ties(plan, loading.tensors)
        buffers = restore_buffers(
            model, options.device, [plan.model.real(n) for n in plan.computed]
        )
        watch = reader.watch() if views else None
        if watch is not None:
            try:
                watch()  # they may have changed while they were read
            except RuntimeError as error:
                raise ValueError(str(error)) from error
        said = [(name, *map(str, settings_of(layer))) for name, layer in adapters.items()]
        shapes = [(name, tuple(value.shape)) for name, value in plan.own.items()]
        print_of = parts.fingerprint(
            sorted(reader.specs.items()), sorted(map(str, reader.metadata.values())), shapes, said,
            options.dtype, options.compute_dtype, plan.names,
        )  # fmt: skip
        return _Loaded(plan, loading, buffers, watch if options.mapped else None, print_of)


def _start(model: nn.Module, meshes: Sequence[Any], device: torch.device) -> None:
    """Start the adapters that have no values yet, on all processes alike."""
    layers = waiting("load_quantized", model)
    if not meshes:
        start(layers, device, lambda value, meta: nn.Parameter(value, meta.requires_grad))
        return

    def place(value: Tensor, meta: nn.Parameter) -> nn.Parameter:
        if not is_sharded(meta):
            return nn.Parameter(value.to(device), meta.requires_grad)
        return parts.cut("an adapter", meta, value, device, keep=False)

    with parts.same_numbers(meshes):
        start(layers, torch.device("cpu"), place)
