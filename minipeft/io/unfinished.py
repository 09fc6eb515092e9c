"""A folder that is made shard by shard, and appears when it is whole.

The work is done in `<destination>.unfinished` beside the destination; a shard has its name only
when it is whole.  At the end the folder is renamed.  So a destination that exists is complete, and
after an interruption, at whatever moment, the same call goes on: with the next shard, or, where
only the record of the run is left to be removed, with that.
"""

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from minipeft.io.fields import read_object
from minipeft.io.header import Spec
from minipeft.io.replace import locked, write_file
from minipeft.io.shards import Reader

_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx", ".ot",
}  # fmt: skip


def is_finished(destination: Path, record: str, wanted: Mapping[str, object]) -> bool:
    """Whether this run has renamed its folder already, and died before it removed its record.

    `record` is the name of the file that says what a run does, `wanted` what it holds for this one.

    Raises:
        ValueError: the destination is another run's.
    """
    if not _is_taken(destination):
        return False
    path = destination / record
    if not path.is_file() or read_object(path) != wanted:
        raise ValueError(f"{destination}: exists already; choose another directory")
    path.unlink()
    return True


def _is_taken(destination: Path) -> bool:
    return destination.exists() and (not destination.is_dir() or any(destination.iterdir()))


@contextmanager
def working_for(destination: Path, record: str, wanted: Mapping[str, object]) -> Iterator[Path]:
    """Hold the lock of the folder to work in; it is renamed when the context ends without an error.

    Raises:
        ValueError: the folder belongs to another run, which still goes on or had other settings;
            the destination was made meanwhile.
    """
    directory = destination.with_name(f"{destination.name}.unfinished")
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory, wait=False) as alone:
        if alone is False:
            raise ValueError(f"{directory}: another process is working in it")
        leftovers = set(directory.glob(".*.tmp"))
        if leftovers.issuperset(directory.iterdir()):  # new, or its run died before its record
            write_file(directory / record, json.dumps(wanted, indent=2).encode())
        found = read_object(directory / record) if (directory / record).is_file() else None
        if found != wanted:
            raise ValueError(
                f"{directory}: left by a run with another source or other settings; delete it, or "
                "choose another destination"
            )
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)  # write_file takes those of its own file away
        try:
            yield directory
        except ValueError:  # refused: if nothing is done yet, nothing stays
            if all(path.name == record for path in directory.iterdir()):
                shutil.rmtree(directory)
            raise
        if _is_taken(destination):
            raise ValueError(f"{destination}: exists already; it was made meanwhile")
        if destination.exists():  # empty; Windows renames onto nothing
            destination.rmdir()
        os.replace(directory, destination)
        (destination / record).unlink()


def is_done(path: Path, expected: Mapping[str, Spec], *, mmap: bool) -> bool:
    """Whether a shard is there already, with these tensors."""
    if not path.is_file():
        return False
    try:
        with Reader([path], mmap=mmap) as reader:
            return reader.specs == dict(expected)
    except ValueError:
        return False


def check_room(directory: Path, needed: int) -> None:
    """Raise OSError unless so many bytes are free."""
    if needed > (free := shutil.disk_usage(directory).free):
        what = f"{needed:,} bytes to write, {free:,} bytes free"
        raise OSError(errno.ENOSPC, what, str(directory))


def state_of(paths: Collection[Path]) -> dict[str, list[int]]:
    """What tells one state of a source's files from another: sizes and times, by name."""
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths)}


def copy_others(source: Path, directory: Path, but: Collection[str]) -> None:
    """Tokeniser, settings, licence: all files but weights, indices and the names in `but`."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in but:
            shutil.copyfile(path, directory / path.name)
