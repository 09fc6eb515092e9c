"""safetensors files that fit into memory: written whole or not at all, with checksums."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minipeft.adapters.sharded import is_shard
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
        if is_shard(tensor):
            raise ValueError(f"{name} is a shard (DTensor), of which each process has a part; "
                             "gather it before saving: tensor.full_tensor()")  # fmt: skip
        if tensor.numel() == 0 or tensor.device.type == "meta":
            raise ValueError(
                f"{name} has no values here ({tuple(tensor.shape)} on "
                f"{tensor.device}); gather sharded or offloaded parameters before saving"
            )


def check_finite(caller: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor to be saved holds NaN or Inf, which check_values refuses."""
    # the least and the greatest are NaN where one number is, and need no copy as isfinite does
    ends = {name: torch.stack(tensor.detach().aminmax()) for name, tensor in tensors.items()}
    if bad := [name for name, pair in ends.items() if not bool(pair.isfinite().all())]:
        raise ValueError(
            f"{caller}: {bad[0]} holds NaN or Inf ({len(bad)} such tensors in all); look for a "
            "diverged training"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; checksums are verified where it has them.

    Raises:
        ValueError: no such file, a damaged one, or a tensor whose checksum differs.
    """
    return read_all(path)[0]


def read_all(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, as read_tensors gives them, and the file's metadata.

    Raises:
        ValueError: as read_tensors.
    """
    with Reader([path]) as reader:
        return {name: reader.view(name) for name in reader.specs}, reader.metadata[path]


def check_values(where: object, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check a file's tensors against the tensors that they are to fill, before anything changes.

    Raises:
        ValueError: a name is missing or unexpected; another shape or kind of numbers, floats of 8
            bits, NaN or Inf, or a value that is so in the dtype of its place (float32 at least).
    """
    if wrong := sorted(found.keys() ^ own.keys()):
        how = "unexpected" if wrong[0] in found else "missing"
        raise ValueError(f"{where}: {wrong[0]:.80} is {how} ({len(wrong)} such names in all)")
    for name, value in found.items():
        place = own[name]
        floats = place.is_floating_point()
        fits = value.is_floating_point() == floats and not (floats and value.element_size() < 2)
        if not fits or value.shape != place.shape:
            raise ValueError(
                f"{where}: {name} is {value.dtype} of shape {tuple(value.shape)}; expected "
                f"{'floats of 16 bits or more' if floats else place.dtype} of shape "
                f"{tuple(place.shape)}"
            )
        wide = torch.promote_types(place.dtype, torch.float32) if floats else place.dtype
        if not bool(value.to(wide).isfinite().all()):
            raise ValueError(f"{where}: {name} holds NaN or Inf, or what is so in {wide}")
