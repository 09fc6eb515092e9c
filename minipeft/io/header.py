"""What a safetensors file says of itself, checked, and its tensors by plain reads of the file.

Format: https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, then
the tensors' bytes without gaps.  For disks where mapping a file is slow or unsafe: on a network
file system a page of a mapped file can be gone when it is touched, which ends the process.

In the metadata of files that minipeft writes, where other readers ignore them:

    minipeft_sha256     JSON: the sha256 of each tensor's dtype, shape and bytes
    minipeft_format     "2": all of this must be there ("1", of older files: the line above)
    minipeft_metadata   the sha256 of all other metadata
    minipeft_config     the configuration that was saved with the file, see seal.py
    minipeft_training   what other readers need not know, see the writers of adapters
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.io.fields import parse_object

CHECKSUMS, FORMAT, WHOLE = "minipeft_sha256", "minipeft_format", "minipeft_metadata"
Spec = tuple[torch.dtype, tuple[int, ...]]
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}
# what to do about a file that was changed on purpose
AS_PLAIN = (
    "write the weights again as plain tensors: safetensors.torch.save_file("
    'safetensors.torch.load_file(path), path, metadata={"format": "pt"})'
)
DAMAGED = (
    "the file is damaged, or was changed since: get it again; to load one that you changed as it "
    f"is, {AS_PLAIN}"
)
_LARGEST = 100_000_000  # bytes of a header, as in safetensors


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor with this dtype and shape."""
    return spec[0].itemsize * math.prod(spec[1])


class UnmappedFile:
    """A safetensors file whose tensors are read one at a time, into memory of their own.

    `metadata` are the header's strings, `specs` dtype and shape of each tensor by name.

    Raises:
        ValueError: sizes or offsets that do not fit the file or each other, a name that comes
            twice, a dtype that is not supported.
        OSError: the file cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by close)
        try:
            size = os.fstat(self._file.fileno()).st_size
            length = int.from_bytes(self._bytes(0, 8) if size >= 8 else b"", "little")
            if size < 8 or length > min(size - 8, _LARGEST):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            self._start = 8 + length
            text = bytes(self._bytes(8, length))
            if not text.startswith(b"{"):
                raise ValueError("its header is no JSON object")
            header: dict[str, Any] = parse_object(text, "its header")
            self.metadata = _metadata(header.pop("__metadata__", {}))
            self._places: dict[str, tuple[int, int]] = {}
            self.specs: dict[str, Spec] = {}
            for name, entry in header.items():
                self.specs[name], self._places[name] = _entry(name, entry)
            end = 0
            for name, (first, last) in sorted(self._places.items(), key=lambda item: item[1]):
                if first != end:
                    raise ValueError(f"{name} starts at byte {first}, the one before ends at {end}")
                end = last
            if end != size - self._start:
                raise ValueError(f"tensors of {end} bytes, {size - self._start} in the file")
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: the file has become shorter.
            OSError: it cannot be read.
        """
        first, last = self._places[name]
        dtype, shape = self.specs[name]
        data = torch.empty(last - first, dtype=torch.uint8, device="cpu")
        self._into(data.numpy().data, self._start + first)
        return data.view(dtype).reshape(shape)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _bytes(self, start: int, count: int) -> bytearray:
        found = bytearray(count)
        self._into(memoryview(found), start)
        return found

    def _into(self, room: memoryview, start: int) -> None:
        self._file.seek(start)
        while len(room):
            count = self._file.readinto(room)
            if not count:
                raise ValueError(f"it ends {len(room)} bytes too early")
            room = room[count:]


def _metadata(found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("__metadata__ holds more than strings")
    return found


def _entry(name: str, entry: object) -> tuple[Spec, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {str(dtype)[:20]}, which is not supported")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < 2**63 for n in numbers
        ):
            raise ValueError(f"{name} has a shape or offsets that are no sizes")
    spec = DTYPES[dtype], tuple(shape)
    if len(shape) > 64 or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes(spec):
        raise ValueError(f"{name} of {dtype} {shape[:8]} does not fit its offsets {offsets[:2]}")
    return spec, (offsets[0], offsets[1])


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor: its dtype and shape, as in "float32 [2, 3]", then its bytes."""
    total = digest_of((tensor.dtype, tuple(tensor.shape)))
    total.update(bytes_of(tensor.detach().cpu()))
    found: str = total.hexdigest()
    return found


def digest_of(spec: Spec) -> Any:
    """The hash that `digest` begins with; the tensor's bytes come next."""
    return hashlib.sha256(f"{str(spec[0]).removeprefix('torch.')} {list(spec[1])}".encode())


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row by row; no copy if they lie so already."""
    if not tensor.numel():
        return memoryview(b"")
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data


def metadata_with(sums: Mapping[str, str], more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The metadata of a file that minipeft writes; sums: a digest for each tensor."""
    found = {"format": "pt", CHECKSUMS: json.dumps(sums), FORMAT: "2", **(more or {})}
    return {**found, WHOLE: _digest_of(found)}


def _digest_of(metadata: Mapping[str, str]) -> str:
    own = {key: value for key, value in metadata.items() if key != WHOLE}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def checksums_in(path: Path, metadata: Mapping[str, str]) -> dict[str, object] | None:
    """The digests that a file's metadata holds; None if nobody wrote any.

    Raises:
        ValueError: they are damaged, or missing from a file that minipeft wrote; or other metadata
            is.
    """
    if not any(key.startswith("minipeft") for key in metadata):
        return None
    if CHECKSUMS not in metadata:
        raise ValueError(f"{path}: its checksums are missing; the file is damaged")
    form = metadata.get(FORMAT, "1")  # the first files had no such line
    if form not in ("1", "2"):
        raise ValueError(
            f"{path}: {FORMAT} is {form!r:.40}, expected '1' or '2'; the file is damaged, or of a "
            "newer version"
        )
    expected = metadata.get(WHOLE)
    if (form == "2" or expected is not None) and expected != _digest_of(metadata):
        raise ValueError(f"{path}: its metadata differs from its checksum; {DAMAGED}")
    return parse_object(metadata[CHECKSUMS].encode(), f"{path}: checksums")
