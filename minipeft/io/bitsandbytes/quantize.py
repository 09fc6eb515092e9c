"""A 16-bit checkpoint made a 4-bit one, tensor by tensor: memory does not grow with the model.

The work is done in `<destination>.unfinished` beside the destination, a shard at a time; a shard
has its name only when it is whole.  At the end the directory is renamed.  So a destination that
exists is complete, and after an interruption, at whatever moment, the same call goes on: with the
next shard, or, where only the record of the run is left to be removed, with that.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from minipeft.adapters.progress import Progress
from minipeft.adapters.protocol import is_conv1d, linear_shape
from minipeft.adapters.targets import Head, HeadWarning, Names, likely_head, survey
from minipeft.io.bitsandbytes import checkpoint
from minipeft.io.bitsandbytes.weight import Settings, entries, specs
from minipeft.io.fields import read_object
from minipeft.io.header import Spec, nbytes
from minipeft.io.replace import locked, write_file
from minipeft.io.shards import Reader, ShardWriter, split
from minipeft.model.quantize import Skip, quantizable
from minipeft.nf4 import check_block_size
from minipeft.qlora import NF4Linear

PROGRESS = ".quantize_checkpoint.json"
_NOT_COPIED = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx", ".ot",
}  # fmt: skip
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _chosen(
    model: nn.Module, reader: Reader, skip: Skip, block_size: int, double_quant: bool, head: Head
) -> tuple[dict[str, tuple[Settings, bool]], dict[str, str]]:
    """What each weight becomes, and whether it is transposed first; which modules stay dense."""
    chosen, left_out = quantizable(survey(model, head), skip=skip)
    weights: dict[str, tuple[Settings, bool]] = {}
    absent: dict[int, str] = {}
    present: set[int] = set()
    for name, module in chosen.items():
        assert isinstance(module, nn.Module)  # 3-D parameters are taken on request only
        key = f"{name}.weight"
        if key not in reader.specs:
            absent[id(module)] = key
            continue
        present.add(id(module))
        dtype, shape = reader.specs[key]
        own = tuple(module.get_parameter("weight").shape)
        if shape != own:
            raise ValueError(
                f"{reader.file_of[key]}: {key} has shape {shape}; the model's is {own}"
            )
        if dtype not in _FLOATS:
            raise ValueError(f"{reader.file_of[key]}: {key} is {dtype}; expected a 16-bit float")
        transposed = is_conv1d(module)
        rows = shape[::-1] if transposed else shape
        weights[key] = (Settings(rows, dtype, block_size, "nf4", double_quant), transposed)
    if lost := [key for number, key in absent.items() if number not in present]:
        raise ValueError(
            f"{next(iter(reader.file_of.values())).parent}: no {sorted(lost)[:3]} ({len(lost)} in "
            f"all); the files have {sorted(reader.specs)[:3]}: pass the model that they belong to"
        )
    if not weights:
        raise ValueError(f"quantize_checkpoint: nothing to quantise; left out: {left_out}")
    return weights, left_out


def _is_taken(destination: Path) -> bool:
    return destination.exists() and (not destination.is_dir() or any(destination.iterdir()))


def _is_finished(destination: Path, wanted: Mapping[str, object]) -> bool:
    """Whether this run has renamed its directory already, and died before it removed its record.

    Raises:
        ValueError: the destination is another run's.
    """
    if not _is_taken(destination):
        return False
    record = destination / PROGRESS
    if not record.is_file() or read_object(record) != wanted:
        raise ValueError(f"{destination}: exists already; choose another directory")
    record.unlink()
    return True


@contextmanager
def _working_in(directory: Path, wanted: Mapping[str, object]) -> Iterator[None]:
    """Hold the lock of a directory that is new, or left by an interrupted run of the same kind.

    Raises:
        ValueError: it belongs to another run, which still goes on or had other settings.
    """
    record = directory / PROGRESS
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory, wait=False) as alone:
        if alone is False:
            raise ValueError(f"{directory}: another process is working in it")
        for leftover in directory.glob(".*.tmp"):
            leftover.unlink()
        if not any(directory.iterdir()):  # new, or its run died before it had a record
            write_file(record, json.dumps(wanted, indent=2).encode())
        found = read_object(record) if record.is_file() else None
        if found != wanted:
            raise ValueError(
                f"{directory}: left by a run with another source or other settings; delete it, or "
                "choose another destination"
            )
        yield


def _is_done(path: Path, expected: Mapping[str, Spec], *, mmap: bool) -> bool:
    if not path.is_file():
        return False
    try:
        with Reader([path], mmap=mmap) as reader:
            return reader.specs == dict(expected)
    except ValueError:
        return False


def _copy_others(source: Path, directory: Path) -> None:
    """Tokeniser, generation settings, licence: all files but weights and what is written here."""
    for path in sorted(source.iterdir()):
        written = path.name in (checkpoint.CONFIG, PROGRESS) or path.name.endswith(".index.json")
        if path.is_file() and not written and path.suffix not in _NOT_COPIED:
            shutil.copyfile(path, directory / path.name)


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    skip: Skip = (),
    block_size: int = 64,
    double_quant: bool = True,
    max_shard_bytes: int = 10**9,
    progress: bool | None = None,
    mmap: bool = True,
    head: Head = None,
) -> Names:
    """Write the 4-bit copy of a checkpoint in 16 or 32 bits, one tensor in memory at a time.

    `source` is a directory with config.json and safetensors files.  `model`, on the meta device,
    says which weights `quantize_model` would quantise, `head` as there; by default it is built from
    config.json with transformers.  The result is what `save_quantized` writes: it loads with
    `load_quantized` and with transformers + bitsandbytes.  Other files (tokeniser, licence) are
    copied.

    Interrupted, the same call goes on after the last whole shard (`max_shard_bytes` each) and ends
    with the same bytes.  `destination` appears when all is done; until then the work lies in
    `<destination>.unfinished`.  Needs about the largest packed tensor and 64 MiB of memory beside
    the mapped source; with `mmap=False`, for disks on a network, nothing is mapped, and it needs
    the largest tensor of the source too.  `progress` shows a bar; None: on a terminal.  Returns
    the names of the 4-bit layers; `.left_out` says what stayed dense and why.

    Raises:
        ValueError: a source that is damaged, quantised already or another model's; weights that
            are not finite (file, tensor and index are named); a destination that exists.
        OSError: the disk is full, and the like; the destination does not exist then.
    """
    source, destination = Path(source), Path(destination)
    check_block_size("quantize_checkpoint", block_size)
    if max_shard_bytes < 1:
        raise ValueError(f"quantize_checkpoint: max_shard_bytes={max_shard_bytes}")
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory")
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{destination}: lies in {source}, which is never written to")
    directory = destination.with_name(f"{destination.name}.unfinished")
    config = checkpoint.config_of(source)
    if config.get("quantization_config") is not None:
        raise ValueError(f"{source / checkpoint.CONFIG}: is quantised already")
    if model is None:
        from minipeft.integrations.transformers.meta import meta_model

        model = meta_model(source)
    with checkpoint.open_weights(source, mmap=mmap) as reader:
        weights, left_out = _chosen(model, reader, skip, block_size, double_quant, head)
        wanted = [key.removesuffix(".weight") for key in weights]
        notes = likely_head(survey(model, head), wanted)
        for name, note in notes.items():
            warnings.warn(f"{name} is made 4-bit, and {note}", HeadWarning, stacklevel=2)
        becomes = {
            key: specs(key, weights[key][0]) if key in weights else {key: spec}
            for key, spec in reader.specs.items()
        }
        sizes = {key: sum(map(nbytes, made.values())) for key, made in becomes.items()}
        files = split(sizes, max_shard_bytes)
        expected = {
            file: {name: spec for key in keys for name, spec in becomes[key].items()}
            for file, keys in files.items()
        }
        described = hashlib.sha256(repr((sorted(weights.items()), expected)).encode()).hexdigest()
        record: dict[str, object] = {
            "source": {p.name: [p.stat().st_size, p.stat().st_mtime_ns]
                       for p in sorted(set(reader.file_of.values()))},
            "settings": described,
        }  # fmt: skip
        names = Names(wanted, left_out, notes=notes)
        if _is_finished(destination, record):
            return names
        with (
            _working_in(directory, record),
            Progress(total=sum(map(nbytes, reader.specs.values())), desc="quantising", unit="B",
                     unit_scale=True, shown=progress) as bar,
        ):  # fmt: skip
            left = {file for file in files
                    if not _is_done(directory / file, expected[file], mmap=mmap)}  # fmt: skip
            needed = sum(sizes[key] for file in left for key in files[file])
            if needed > (free := shutil.disk_usage(directory).free):
                what = f"{needed:,} bytes to write, {free:,} bytes free"
                raise OSError(errno.ENOSPC, what, str(directory))
            for file, keys in files.items():
                if file in left:
                    _write(directory / file, expected[file], keys, weights, reader, bar)
                else:
                    bar.update(sum(nbytes(reader.specs[key]) for key in keys))
            _finish(directory, source, config, model, weights, expected)
            if _is_taken(destination):
                raise ValueError(f"{destination}: exists already; it was made meanwhile")
            if destination.exists():  # empty; Windows renames onto nothing
                destination.rmdir()
            os.replace(directory, destination)
            (destination / PROGRESS).unlink()
    return names


def _write(
    path: Path,
    expected: Mapping[str, Spec],
    keys: list[str],
    weights: Mapping[str, tuple[Settings, bool]],
    reader: Reader,
    bar: Progress,
) -> None:
    with ShardWriter(path, expected) as writer:
        for key in keys:
            tensor = reader.view(key)
            if key in weights:
                settings, transposed = weights[key]
                try:
                    layer = NF4Linear.from_weight(
                        tensor.T if transposed else tensor, block_size=settings.block_size,
                        double_quant=settings.double_quant,
                    )  # fmt: skip
                except ValueError as error:
                    raise ValueError(f"{reader.file_of[key]}: {key}: {error}") from error
                for name, value in entries(key, layer).items():
                    writer.write(name, value)
            else:
                writer.write(key, tensor)
            bar.update(nbytes(reader.specs[key]))
        writer.finish()


def _finish(
    directory: Path,
    source: Path,
    config: dict[str, object],
    model: nn.Module,
    weights: Mapping[str, tuple[Settings, bool]],
    expected: Mapping[str, Mapping[str, Spec]],
) -> None:
    """Everything but the weights, config.json last."""
    _copy_others(source, directory)
    if len(expected) > 1:
        sizes = {name: nbytes(spec) for own in expected.values() for name, spec in own.items()}
        write_file(directory / checkpoint.INDEX, checkpoint.index_text(expected, sizes))
    names = {key.removesuffix(".weight") for key in weights}
    dense = [n for n, m in model.named_modules() if n not in names and linear_shape(m)]
    first = next(iter(weights.values()))[0]
    config["quantization_config"] = checkpoint.quantization_config(
        quant_type="nf4", double_quant=first.double_quant, dense=dense, compute_dtype=first.dtype
    )
    write_file(directory / checkpoint.CONFIG, checkpoint.config_text(config))
