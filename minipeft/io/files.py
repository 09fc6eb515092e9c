"""safetensors files that fit into memory: written whole or not at all, with checksums."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minipeft.io.header import digest, metadata_with
from minipeft.io.replace import write_file
from minipeft.io.shards import Reader


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
    with Reader([path]) as reader:
        return {name: reader.view(name) for name in reader.specs}, reader.metadata[path]
