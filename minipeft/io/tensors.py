"""safetensors files: written whole or not at all, with a checksum for each tensor.

Format: https://github.com/huggingface/safetensors.  The checksums are sha256 of each tensor's
dtype, shape and bytes, as JSON under `minipeft_sha256` in the file's metadata, where other readers
ignore them; `minipeft_format` says that they must be there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

CHECKSUMS, FORMAT = "minipeft_sha256", "minipeft_format"


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor: its dtype and shape, as in "float32 [2, 3]", then its bytes."""
    described = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    total = hashlib.sha256(described.encode())
    if tensor.numel():
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total.update(data.numpy().data)
    return total.hexdigest()


def metadata_with(sums: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file that minipeft writes; sums: a digest for each tensor."""
    return {"format": "pt", CHECKSUMS: json.dumps(sums), FORMAT: "1"}


def checksums_in(path: Path, metadata: Mapping[str, str]) -> dict[str, object] | None:
    """The digests that a file's metadata holds; None if nobody wrote any.

    Raises:
        ValueError: they are damaged, or missing from a file that minipeft wrote.
    """
    if CHECKSUMS in metadata:
        return parse_object(metadata[CHECKSUMS].encode(), f"{path}: checksums")
    if any(key.startswith("minipeft") for key in metadata):
        raise ValueError(f"{path}: its checksums are missing; the file is damaged")
    return None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, which must have elements, to a safetensors file with checksums.

    Raises:
        ValueError: a tensor is empty or on the meta device: its values are elsewhere (sharded,
            offloaded), and the file would hold none.
    """
    from safetensors.torch import save

    check_writable(tensors)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():  # the format has no two names for one tensor
        if tensor.untyped_storage().data_ptr() in seen:
            plain[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    sums = {name: digest(tensor) for name, tensor in plain.items()}
    write_atomically(path, save(plain, metadata=metadata_with(sums)))


def check_writable(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor's values are elsewhere (sharded, offloaded)."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.device.type == "meta":
            raise ValueError(
                f"{name} has no values here ({tuple(tensor.shape)} on "
                f"{tensor.device}); gather sharded or offloaded parameters before saving"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; checksums are verified where it has them.

    Raises:
        ValueError: no such file, a damaged one, or a tensor whose checksum differs.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
    sums = checksums_in(path, metadata)
    for name, tensor in tensors.items():
        if sums is not None and sums.get(name) != digest(tensor):
            raise ValueError(f"{path}: {name} differs from its checksum; the file is damaged")
    return tensors


def parse_object(data: bytes, what: str) -> dict[str, object]:
    """A JSON object from bytes.

    Raises:
        ValueError: not JSON, not an object, or nested too deeply.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value
