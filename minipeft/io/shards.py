"""safetensors files larger than memory: written one tensor at a time, read one tensor at a time.

Format: https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, then
the tensors' bytes without gaps.  Sizes are known before values are, so every tensor has its place
before the first is written; the checksums fill placeholders in the header at the end.
"""

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from minipeft.io import pickled
from minipeft.io.fields import LARGEST, read_object
from minipeft.io.header import (
    DAMAGED,
    DTYPES,
    NAMES,
    Spec,
    UnmappedFile,
    bytes_of,
    checksums_in,
    digest,
    digest_of,
    metadata_with,
    nbytes,
)  # fmt: skip
from minipeft.io.mapped import MappedFile, Watch
from minipeft.io.replace import current


class ShardWriter:
    """A safetensors file of known names, dtypes and shapes, filled in any order.

    Written under a temporary name; `finish` flushes it to disk and renames it.  Leaving the
    context without it removes the temporary file.  `metadata`, strings of the file's header, may
    get other values before `finish`, each as long as it was.

    Raises:
        ValueError: a name that was not announced, was written already or not at all, or has
            another dtype or shape than announced.
        OSError: the disk is full, and the like; the message names file and tensor.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, Spec], *, shown: Path | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.path, self.specs, self.metadata = path, dict(specs), dict(metadata or {})
        self._shown = path if shown is None else shown  # what errors call the file
        number = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._temporary = path.with_name(f".{path.name}.{number}.tmp")
        # larger elements first: every tensor then starts at a multiple of its element's size
        order = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in order:
            start, end = end, end + nbytes(specs[name])
            self._places[name] = (start, end)
        self._sums = dict.fromkeys(order, "0" * 64)
        self._left = set(order)
        self._start = 8 + len(self._header())
        self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by finish or __exit__)
        self._total = self._start + end

    def _header(self) -> bytes:
        header: dict[str, object] = {"__metadata__": metadata_with(self._sums, self.metadata)}
        for name, (start, end) in self._places.items():
            dtype, shape = self.specs[name]
            header[name] = {
                "dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        return text.ljust(math.ceil(len(text) / 8) * 8)  # spaces: so that the data is aligned

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        if name not in self._left:
            raise ValueError(f"{self.path.name}: {name} was not announced, or is written already")
        if (tensor.dtype, tuple(tensor.shape)) != self.specs[name]:
            raise ValueError(
                f"{self.path.name}: {name} is {tensor.dtype} {tuple(tensor.shape)}; announced "
                f"{self.specs[name]}"
            )
        self.write_parts(name, [tensor.detach().cpu()])

    def write_parts(self, name: str, parts: Iterable[Tensor]) -> str:
        """Write one tensor as parts that follow each other in it; returns its digest."""
        if name not in self._left:
            raise ValueError(f"{self.path.name}: {name} was not announced, or is written already")
        spec, written = self.specs[name], 0
        total = digest_of(spec)
        start, end = self._places[name]
        for part in parts:
            data = bytes_of(part)
            if part.dtype != spec[0] or start + written + len(data) > end:
                raise ValueError(f"{self.path.name}: a part of {name} is not of {spec}")
            total.update(data)
            try:
                self._file.seek(self._start + start + written)
                self._file.write(data)
                self._file.flush()
            except OSError as error:
                raise OSError(
                    error.errno, f"{error.strerror} while writing {name}", str(self._shown)
                ) from error
            written += len(data)
        if start + written != end:
            raise ValueError(f"{self.path.name}: {name} has {end - start} bytes, got {written}")
        self._sums[name] = total.hexdigest()
        self._left.discard(name)
        return self._sums[name]

    def finish(self) -> None:
        """Write the header, flush to disk, rename."""
        if self._left:
            raise ValueError(f"{self.path.name}: not written yet: {sorted(self._left)[:5]}")
        header = self._header()
        if 8 + len(header) != self._start:
            raise ValueError(f"{self.path.name}: the metadata has another length than announced")
        try:
            self._file.truncate(self._total)
            self._file.seek(0)
            self._file.write(len(header).to_bytes(8, "little") + header)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} while finishing", str(self._shown)) \
                from error  # fmt: skip
        self._file.close()
        os.replace(self._temporary, self.path)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError:  # what is buffered does not fit either; the first error is on its way
            pass
        finally:
            self._temporary.unlink(missing_ok=True)


def split(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Names in their order, in files of at most `max_bytes` (one name at least in each).

    The files are called as Hugging Face's libraries call them.
    """
    groups: list[list[str]] = []
    filled = max_bytes
    for name, size in sizes.items():
        if filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": own for i, own in enumerate(groups)}


class Reader:
    """Tensors by name from safetensors files of one directory, and from .bin, .pt, .pth files.

    Each file is mapped into memory; with `mmap=False` each tensor is read from its file instead,
    when it is asked for: nothing is mapped, as a disk on the network may want it.  With `kept`
    views stay valid after the context, in the mapped file (mapped.py).  With `verify` None a view
    is not compared with its checksum, so that a part of it can be read alone; False: nothing is.
    Pickled files
    are mapped in any case (those from before torch 1.6 are read as a whole).  Damage to the
    structure is found on opening, a wrong checksum when a tensor is read.  Use as a context.

    Raises:
        ValueError: a file that is missing, damaged, or holds a name that another one holds.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        *,
        mmap: bool = True,
        kept: bool = False,
        verify: bool | None = True,
    ) -> None:
        self.mmap, self.kept, self.verify = mmap, kept, verify
        self._files: dict[Path, Any] = {}
        self._sums: dict[Path, dict[str, object] | None] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        self.file_of: dict[str, Path] = {}
        self.specs: dict[str, Spec] = {}
        try:
            self._open(paths)
        except BaseException:
            self.close()
            raise

    def _open(self, paths: Iterable[Path]) -> None:
        for path in paths:
            place = current(path)
            if not place.is_file():
                raise ValueError(f"{path}: no such file")
            self._files[path], self.metadata[path], specs = _opened(place, self.mmap, self.kept)
            self._sums[path] = sums = checksums_in(path, self.metadata[path])
            if sums is not None and (lost := sums.keys() - specs.keys()):
                raise ValueError(f"{path}: {sorted(lost)[0]:.80} is missing; the file is damaged")
            for name, spec in specs.items():
                if name in self.file_of:
                    raise ValueError(f"{path}: {name} is in {self.file_of[name].name} too")
                self.file_of[name], self.specs[name] = path, spec

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU: memory of its own, so that the file may go.

        Raises:
            ValueError: it cannot be read, or its checksum differs.
        """
        found = self.view(name)
        if self.verify is None:
            self.check(name, found)
        return found if type(self._files[self.file_of[name]]) is UnmappedFile else found.clone()

    def checksum(self, name: str) -> str | None:
        """The digest of a tensor that its file's metadata holds; None if that holds none."""
        found = (self._sums[self.file_of[name]] or {}).get(name)
        return found if isinstance(found, str) else None

    def view(self, name: str) -> Tensor:
        """One tensor, in the mapped file if it is mapped: for as long as this context lasts.

        Raises:
            ValueError: it cannot be read, or its checksum differs.
        """
        from safetensors import SafetensorError

        path = self.file_of[name]
        try:
            file = self._files[path]
            own = isinstance(file, UnmappedFile | pickled.PickledFile)
            tensor: Tensor = file.read(name) if own else file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: {name} cannot be read ({error})") from error
        if self.verify:
            self.check(name, tensor)
        return tensor

    def check(self, name: str, tensor: Tensor | None = None) -> None:
        """Compare a tensor, read whole, with its checksum, if its file has any.

        Raises:
            ValueError: they differ, or it cannot be read.
        """
        path = self.file_of[name]
        sums = self._sums[path]
        if sums is not None and tensor is None:
            tensor = self.view(name)
        if sums is not None and tensor is not None and sums.get(name) != digest(tensor):
            raise ValueError(f"{path}: {name} differs from its checksum; {DAMAGED}")

    def watch(self) -> Watch:
        """What asks whether the files, opened with `kept`, are still as they were."""
        found = Watch()
        for file in self._files.values():
            if isinstance(file, MappedFile):
                found = found + file.watch()
        return found

    def is_kept(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the files that were opened with `kept`."""
        files = self._files.values()
        return any(isinstance(file, MappedFile) and file.holds(tensor) for file in files)

    def close(self) -> None:
        """Let the files go."""
        for file in self._files.values():
            if isinstance(file, UnmappedFile | pickled.PickledFile):
                file.close()
        self._files.clear()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def indexed(
    index: Path,
    *,
    largest: int = LARGEST,
    mmap: bool = True,
    kept: bool = False,
    verify: bool | None = True,
) -> Reader:
    """The files that an index names: each tensor is in its file, and those files hold no others.

    The files are safetensors; those of an index that is called ....bin.index.json are pickled.

    Raises:
        ValueError: a damaged index, or one of more than `largest` bytes; a file elsewhere, missing
            or damaged; the index and the files disagree.
    """
    places = read_object(index, largest=largest).get("weight_map")
    suffix = ".bin" if index.name.endswith(".bin.index.json") else ".safetensors"
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: no 'weight_map' from names to files")
    for name, file in places.items():
        # a plain name: no other folder, no drive, nothing hidden
        plain = isinstance(file, str) and file == Path(file).name and "\\" not in file
        if not plain or file.startswith(".") or not file.endswith(suffix):
            raise ValueError(
                f"{index}: {name:.80} is in {str(file)[:80]!r}; expected the name of a {suffix} "
                "file in the same directory"
            )
    paths = [index.parent / file for file in dict.fromkeys(places.values())]
    reader = Reader(paths, mmap=mmap, kept=kept, verify=verify)
    found = {name: path.name for name, path in reader.file_of.items()}
    if places == found:
        return reader
    reader.close()
    for name, file in found.items():
        if places.get(name) != file:
            raise ValueError(
                f"{index.parent / file}: {name:.80} is in this file; {index.name} does not say so"
            )
    lost = sorted(places.keys() - found.keys())
    raise ValueError(
        f"{index}: {lost[0]:.80} is not in {places[lost[0]]} ({len(lost)} names in all, of "
        f"{len({places[name] for name in lost})} files)"
    )


def _opened(path: Path, mmap: bool, kept: bool) -> tuple[Any, dict[str, str], dict[str, Spec]]:
    """The file, what its header holds, and dtype and shape of each tensor."""
    from safetensors import SafetensorError, safe_open

    if path.suffix in pickled.SUFFIXES:
        other = pickled.PickledFile(path)
        return other, other.metadata, other.specs
    try:
        if kept or not mmap:
            plain = MappedFile(path) if kept else UnmappedFile(path)
            return plain, plain.metadata, plain.specs
        file: Any = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        if unknown := [name for name, (dtype, _) in found.items() if dtype not in DTYPES]:
            raise ValueError(
                f"{unknown[0]} has dtype {found[unknown[0]][0]}, which is not supported"
            )
        return file, file.metadata() or {}, {n: (DTYPES[d], s) for n, (d, s) in found.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
