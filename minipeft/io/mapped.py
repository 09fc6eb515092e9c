"""Tensors that are pages of their file: nothing is copied, the system reads what is touched.

A file is mapped privately: its pages count as the file's and not as memory of the process, and the
system drops them when memory is short.  A tensor may be written to; the pages that are written
become memory of the process, and the file stays as it is.

The file must stay as it is too, for as long as a tensor is there.  A file that is replaced by
another one under its name (as every save of minipeft does) stays on the disk until it is let go.
A file that is written to in place changes the tensors.  Where it has become shorter, the system
ends the process with SIGBUS when a page behind its end is touched.  `Watch`, a hook, asks before a
forward of the module that was loaded into; not while torch.compile's code runs, nor where a module
inside it is called by itself.
"""

import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.io.header import UnmappedFile

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0) \
    if hasattr(os, "uname") else 0  # fmt: skip


class MappedFile(UnmappedFile):
    """A safetensors file whose tensors are views of the mapped file.

    A tensor that does not start at a multiple of its element's size is copied.

    Raises:
        ValueError: as UnmappedFile; a file that ends too early does not become a mapping.
        OSError: the file cannot be opened or mapped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path, self._seen = path, _state(self._file.fileno())
        try:
            self._map = _mapped(self._file.fileno())
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> Tensor:
        """One tensor: of the mapped file, or a copy where the file has it unaligned."""
        (first, last), (dtype, shape) = self._places[name], self.specs[name]
        if first == last:
            return torch.empty(shape, dtype=dtype)
        start = self._start + first
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=last - first, offset=start)
        data = data.clone() if start % dtype.itemsize else data
        return data.view(dtype).reshape(shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's values are in the mapped file."""
        base = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        return base <= tensor.data_ptr() < base + len(self._map)

    def watch(self) -> "Watch":
        """What asks whether the file is still as it was when it was mapped."""
        return Watch([(str(self.path), os.dup(self._file.fileno()), self._seen)])


def _mapped(number: int) -> mmap.mmap:
    if os.name == "nt":
        return mmap.mmap(number, 0, access=mmap.ACCESS_COPY)
    # without NORESERVE the system refuses a private mapping that is larger than its memory
    flags = mmap.MAP_PRIVATE | _NORESERVE
    return mmap.mmap(number, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _state(number: int) -> tuple[int, int]:
    found = os.fstat(number)
    return found.st_size, found.st_mtime_ns


class Watch:
    """Asks whether mapped files are still what they were: a hook before a model's forward.

    A copy of it, with a copy of the model, watches nothing: the copy has values of its own.
    """

    def __init__(self, files: list[tuple[str, int, tuple[int, int]]] | None = None) -> None:
        self._files = files or []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (Watch, ())

    def __add__(self, other: "Watch") -> "Watch":
        made = Watch([*self._files, *other._files])
        self._files, other._files = [], []  # who has the numbers closes them
        return made

    def __call__(self, *_: Any) -> None:
        """The hook.

        Raises:
            RuntimeError: a file was written to, or has another length.
        """
        if torch.compiler.is_compiling():
            return
        for path, number, seen in self._files:
            if (now := _state(number)) != seen:
                what = f"has {now[0]} bytes, not {seen[0]}" if now[0] != seen[0] else "was written"
                raise RuntimeError(
                    f"{path}: {what} since the model's weights were mapped from it; load the model "
                    "again (replace such a file by renaming another one, and never write into it)"
                )

    def __del__(self) -> None:
        for _, number, _ in self._files:
            os.close(number)
