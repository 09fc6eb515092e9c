"""Tensors from pickled files (.bin, .pt, .pth), read without running what the pickle asks for.

torch.load(weights_only=True) builds tensors, containers and numbers, and refuses all else.  Here
also: nothing but one flat dictionary of plain tensors is taken, each tensor lies in its storage,
and the checksums (CRC-32) of the zip that torch.save writes are compared, which torch.load does
not.  Files from before torch 1.6 are no zip and hold no checksums: damage to a value goes
unnoticed, and the file is read as a whole, since it cannot be mapped.
"""

import argparse
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.io.header import NAMES, Spec, nbytes

SUFFIXES = (".bin", ".pt", ".pth")
_RELOAD = 2**23  # bytes that may be touched in a mapping; then it is made anew, see PickledFile
_AGAIN = (
    "load the file where you trust it, and save its tensors: safetensors.torch.save_file("
    "{name: value.contiguous().clone() for name, value in state.items()}, path)"
)


def read_pickled(path: str | os.PathLike[str], *, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a pickled file by name, in the CPU's memory; Parameters become tensors.

    The file is a dictionary from names to tensors.  `entry` names such a dictionary inside the
    file's, as of SwissArmyTransformer, {"module": {...}, "args": Namespace}: entry="module".  What
    else the file holds must still be data: texts, numbers, containers, argparse.Namespace.

    Raises:
        ValueError: no such file, one cut short or damaged; code, a module, anything but tensors;
            tensors that are sparse, quantised, complex, nested or without values, that are larger
            than their storage, or that overlap each other.  Two names of one tensor are taken
            (tied weights), and views that lie side by side (DeepSpeed's files).
    """
    clones: dict[tuple[object, ...], Tensor] = {}  # one for all names of one tensor
    found = view_pickled(path, entry=entry)
    for value in found.values():
        if _place(value) not in clones:
            clones[_place(value)] = value.clone()
    return {name: clones[_place(value)] for name, value in found.items()}


def view_pickled(path: str | os.PathLike[str], *, entry: str | None = None) -> dict[str, Tensor]:
    """As read_pickled, but the tensors lie in the mapped file: for those who copy a few of many.

    Raises:
        ValueError: as read_pickled.
    """
    return _loaded(Path(path), entry)[0]


def view_model(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """As view_pickled: of the file, or of its entry "module" (SwissArmyTransformer, DeepSpeed).

    Raises:
        ValueError: as read_pickled.
    """
    try:
        return view_pickled(path)
    except ValueError as error:
        try:
            return view_pickled(path, entry="module")
        except ValueError:
            raise error from None


class PickledFile:
    """A pickled file whose tensors are looked at one at a time: the interface of UnmappedFile.

    What is read of a mapping stays in memory until the mapping goes, so it is made anew after some
    MiB, and a large tensor has one of its own: a file of many GiB does not fill the memory.

    Raises:
        ValueError: as read_pickled.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._touched = path, 0
        self.metadata: dict[str, str] = {}
        self._found, self._mapped = _loaded(path, None)
        self.specs: dict[str, Spec] = {n: _spec(value) for n, value in self._found.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in the mapped file where that can be mapped.

        Raises:
            ValueError: the file was changed since it was opened.
        """
        size = nbytes(self.specs[name])
        if self._mapped and self._touched + size > _RELOAD:
            found, _ = _loaded(self._path, None, again=True)
            if {n: _spec(value) for n, value in found.items()} != self.specs:
                raise ValueError(f"{self._path}: was changed while it was read")
            if size > _RELOAD:
                return found[name]  # its mapping goes when it goes
            self._found, self._touched = found, 0
        self._touched += size
        return self._found[name]

    def close(self) -> None:
        """Let the file go."""
        self._found = {}


def _spec(value: Tensor) -> Spec:
    return value.dtype, tuple(value.shape)


def _place(value: Tensor) -> tuple[object, ...]:
    """What two names of one tensor have in common."""
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _loaded(
    path: Path, entry: str | None, *, again: bool = False
) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file, checked, and whether they lie in its mapping."""
    room = None
    try:
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
        if mapped and not again:
            room = _check_zip(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path}: {error.strerror}; expected a file that can be read") from error
    except Exception as error:  # of a damaged zip also EOFError, struct.error and others
        why = str(error) or type(error).__name__
        raise ValueError(f"{path}: cut short or damaged ({why}); get the file again") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can end in any of Python's errors
        raise ValueError(f"{path}: {_why(error)}") from error
    tensors = _checked(path, found, entry)
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes()
                for v in tensors.values()}  # fmt: skip
    if room is not None and sum(storages.values()) > room:
        raise ValueError(
            f"{path}: tensors of {sum(storages.values())} bytes, and {room} in the file's members; "
            "it is damaged: get it again"
        )
    return tensors, mapped


def _check_zip(path: Path) -> int:
    """The bytes of all storages; raises BadZipFile unless members are plain and fit their sums."""
    with zipfile.ZipFile(path) as members:
        found = members.infolist()
        if len({m.filename for m in found}) < len(found):
            raise zipfile.BadZipFile("a name comes twice")
        if packed := [m.filename for m in found if m.compress_type != zipfile.ZIP_STORED]:
            raise zipfile.BadZipFile(f"{packed[0]:.80} is compressed, which torch.save never does")
        if (bad := members.testzip()) is not None:
            raise zipfile.BadZipFile(f"{bad:.80} differs from its checksum")
        return sum(m.file_size for m in found if "/data/" in m.filename)


def _why(error: Exception) -> str:
    """What torch.load says of a file, without its advice to run the file's code."""
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return (
            f"a pickle that asks for {named[1]:.80}, which is no tensor and could run code, so it "
            f"is not read; {_AGAIN}"
        )
    said = text.partition("WeightsUnpickler error: ")[2] or text
    said = next(filter(None, said.splitlines()), type(error).__name__)
    return f"cannot be read as tensors ({said:.200}): damaged, or not of torch.save; get it again"


def _checked(path: Path, found: object, entry: str | None) -> dict[str, Tensor]:
    """A flat dictionary of tensors that lie in their storages."""
    if entry is not None:
        if not isinstance(found, dict) or entry not in found:
            has = [str(key)[:40] for key in found][:4] if isinstance(found, dict) else type(found)
            raise ValueError(f"{path}: no entry {entry!r}; it has {has}")
        found = found[entry]
    if type(found) not in (dict, OrderedDict):
        raise ValueError(
            f"{path}: holds a {type(found).__name__}; expected a dictionary of tensors; {_AGAIN}"
        )
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():  # type: ignore[attr-defined]  # a dict, see above
        if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter):
            inner = [key for key, own in found.items() if type(own) in (dict, OrderedDict)]  # type: ignore[attr-defined]
            how = f"read_pickled(path, entry={inner[0]!r:.60}) of minipeft.io.pickled reads the " \
                "tensors of one entry" if inner else _AGAIN  # fmt: skip
            raise ValueError(
                f"{path}: {name!r:.80} is a {type(value).__name__}; expected names and tensors "
                f"only; {how}"
            )
        tensors[name] = plain = Tensor.detach(value)  # a pickle may set a Parameter's attributes
        if flaw := _flaw(plain):
            raise ValueError(f"{path}: {name:.80} {flaw}; {_AGAIN}")
    _check_apart(path, tensors)
    return tensors


def _flaw(value: Tensor) -> str:
    """Why a tensor is not one of plain values; empty if it is."""
    if value.is_nested or value.layout != torch.strided:
        return f"is nested or sparse ({value.layout})"
    if value.dtype not in NAMES or value.is_quantized:
        return f"is {value.dtype}, which is not supported"
    if value.device.type != "cpu":
        return f"has no values: it is on {value.device}"
    if value.is_neg():
        return "is a view that negates its values"
    own, held = nbytes(_spec(value)), value.untyped_storage().nbytes()
    if own > held:
        return f"of shape {tuple(value.shape)} has {own} bytes, and its storage {held}"
    return ""


def _check_apart(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if tensors overlap; two names of one tensor do not count."""
    spans = []
    for name, value in tensors.items():
        if value.numel():
            sizes = zip(value.shape, value.stride(), strict=True)
            extent = 1 + sum((count - 1) * step for count, step in sizes)
            start = value.data_ptr()
            spans.append((start, start + extent * value.element_size(), name))
    reach, last = 0, ""
    for start, end, name in sorted(spans):
        if start < reach and _place(tensors[name]) != _place(tensors[last]):
            raise ValueError(
                f"{path}: {name:.80} shares memory with {last:.80}, and is not the same; {_AGAIN}"
            )
        if end > reach:
            reach, last = end, name
