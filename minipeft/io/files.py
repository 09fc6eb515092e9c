"""safetensors files: written whole or not at all, with a checksum for each tensor.

Format: https://github.com/huggingface/safetensors.  In the file's metadata, where other readers
ignore them:

    minipeft_sha256     JSON: the sha256 of each tensor's dtype, shape and bytes
    minipeft_format     "2": all of this must be there ("1", of older files: the line above)
    minipeft_metadata   the sha256 of all other metadata
    minipeft_config     the configuration that was saved with the file, see seal.py
    minipeft_training   what other readers need not know, see the writers of adapters
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minipeft.io.fields import parse_object
from minipeft.io.replace import current, write_file

CHECKSUMS, FORMAT, WHOLE = "minipeft_sha256", "minipeft_format", "minipeft_metadata"


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor: its dtype and shape, as in "float32 [2, 3]", then its bytes."""
    described = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    total = hashlib.sha256(described.encode())
    if tensor.numel():
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total.update(data.numpy().data)
    return total.hexdigest()


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
        raise ValueError(f"{path}: its metadata differs from its checksum; the file is damaged")
    return parse_object(metadata[CHECKSUMS].encode(), f"{path}: checksums")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, which must have elements, to one safetensors file with checksums.

    Raises:
        ValueError: a tensor is empty or on the meta device: its values are elsewhere (sharded,
            offloaded), and the file would hold none.
    """
    write_file(path, encoded(tensors))


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with checksums, and with this metadata too.

    Raises:
        ValueError: as write_tensors.
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
    data: bytes = save(plain, metadata=metadata_with(sums, metadata))
    return data


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
    return read_all(path)[0]


def read_all(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file as of read_tensors, and the file's metadata.

    Raises:
        ValueError: as read_tensors.
    """
    from safetensors import SafetensorError, safe_open

    place = current(path)
    if not place.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(place, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
    sums = checksums_in(path, metadata)
    for name, tensor in tensors.items():
        if sums is not None and sums.get(name) != digest(tensor):
            raise ValueError(f"{path}: {name} differs from its checksum; the file is damaged")
    if sums is not None and (lost := sums.keys() - tensors.keys()):
        raise ValueError(f"{path}: {sorted(lost)[0]:.80} is missing; the file is damaged")
    return tensors, metadata
