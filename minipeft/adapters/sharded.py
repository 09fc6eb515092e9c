"""Parameters of which each process holds a part: torch's DTensor, as `fully_shard` makes them.

    gathered(shard)             the whole tensor; every process must call it
    like(value, shard)          a whole tensor, cut as `shard` is; no process is asked
    with agreed(caller, mesh)   every process gets through, or every one raises

A mesh is torch's name for the processes that share a tensor.  torch.distributed is not imported
here while nobody else did.
"""

import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_FSDP = ("torch.distributed.fsdp", "FSDPModule")  # what fully_shard makes of a module


def is_shard(tensor: object) -> bool:
    """Whether this is a DTensor: each process has a part of it, or a copy."""
    return _is_a(tensor, "torch.distributed.tensor", "DTensor")


def is_sharded_module(module: object) -> bool:
    """Whether fully_shard was called on this very module."""
    return _is_a(module, *_FSDP)


def _is_a(thing: object, module: str, name: str) -> bool:
    """Whether this is of a class of torch.distributed: it cannot be while that is not imported."""
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(thing, kind)


def own_class(module: object) -> type:
    """The module's class; LoRALinear where fully_shard has made an FSDPLoRALinear of it."""
    kind = type(module)
    if not is_sharded_module(module):
        return kind
    return kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]


def resharded(model: object) -> Any:
    """The processes that share the model's parameters; None: each process has the whole of each.

    Puts the shards back first: after a forward fully_shard leaves the whole parameters of the
    outermost module in their place, and what is written into those is lost.
    """
    if not isinstance(model, nn.Module):
        return None
    for module in model.modules():
        if is_sharded_module(module):
            module.reshard()  # type: ignore[operator]
    shards: Iterator[Any] = (parameter for parameter in model.parameters() if is_shard(parameter))
    return next((shard.device_mesh for shard in shards), None)


def is_first(mesh: Any) -> bool:
    """Whether this process is the one of the mesh that writes files."""
    coordinate = mesh.get_coordinate()
    return coordinate is not None and not any(coordinate)


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; a tensor that is whole comes back itself.

    A collective call on shards: it waits until every process of the mesh has called it.
    """
    if not is_shard(tensor) or tensor.is_meta:
        return tensor.detach()
    shard: Any = tensor.detach()
    own, wanted = shard.device, shard.device_mesh.device_type
    if own.type != wanted:  # offloaded to the CPU, where these processes cannot talk
        shard = shard.to(wanted)
    whole: Tensor = shard.full_tensor()
    return whole.to(own)


def like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor cut as `own` is, in its dtype; as it is where `own` is whole, or it is cut.

    Nothing is sent: each process takes its part of the value that it was given.
    """
    if not is_shard(own) or is_shard(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    shard: Any = own
    value = value.detach().to(own.dtype)
    return distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None)


def why_unlike(value: Any, own: Any) -> str | None:
    """Why a tensor cannot be copied into one that is cut otherwise; None if it can."""
    if not is_shard(value):
        return None
    if not is_shard(own):
        return "is a shard (DTensor), and the model's is whole; give value.full_tensor()"
    if value.device_mesh == own.device_mesh and value.placements == own.placements:
        return None
    return (
        f"is cut as {value.placements} over {value.device_mesh}, the model's as {own.placements} "
        f"over {own.device_mesh}; give value.full_tensor()"
    )


def refuse_shards(caller: str, model: nn.Module, advice: str) -> None:
    """Raise ValueError if parameters are shards; `advice` says what to do instead."""
    for name, module in model.named_modules():
        stored = module._parameters.values()
        if is_sharded_module(module) or any(is_shard(parameter) for parameter in stored):
            raise ValueError(
                f"{caller}: the parameters of {name or 'the model'} are shards (DTensor), of which "
                f"each process has a part; {advice}"
            )


def exchange(mesh: Any, said: object) -> dict[int, Any]:
    """What every process of the mesh says, by its rank; every process must call it."""
    import torch.distributed as dist

    heard: dict[int, Any] = {dist.get_rank(): said}
    for axis in range(mesh.ndim):
        group = mesh.get_group(axis)
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, heard, group=group)
        heard = {rank: words for part in found for rank, words in part.items()}
    return heard


@contextmanager
def agreed(caller: str, mesh: Any) -> Iterator[None]:
    """Every process of the mesh gets through this context, or every one raises.

    So none goes on alone into a call that waits for the others.  Each must enter it; a mesh of None
    is a process by itself.

    Raises:
        ValueError, OSError: another process raised; the message has its words.
    """
    if mesh is None:
        yield
        return
    try:
        yield
    except Exception as error:
        exchange(mesh, (isinstance(error, OSError), f"{type(error).__name__}: {error}"))
        raise
    heard = {rank: words for rank, words in exchange(mesh, None).items() if words is not None}
    if heard:
        rank, (of_the_system, why) = min(heard.items())
        kind = OSError if of_the_system else ValueError
        raise kind(f"{caller}: process {rank} raised, so all processes stop here: {why}")


def check_equal(caller: str, mesh: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError in every process unless all were given the same tensors.

    Compared are names, shapes, dtypes and a checksum of the values of tensors that are whole.
    """
    if mesh is None:
        return
    heard = sorted(exchange(mesh, {key: _mark(value) for key, value in tensors.items()}).items())
    first, mine = heard[0]
    for rank, other in heard[1:]:
        names: Iterable[str] = dict.fromkeys([*mine, *other])
        for key in names:
            if (one := mine.get(key)) != (two := other.get(key)):
                shown = "other values" if one and two and one[:2] == two[:2] else f"{one} and {two}"
                raise ValueError(
                    f"{caller}: processes {first} and {rank} were given different tensors "
                    f"({key}: {shown}); give every process the same. Nothing has been copied"
                )


def _mark(value: Tensor) -> tuple[tuple[int, ...], str, int]:
    shape, dtype = tuple(value.shape), str(value.dtype)
    if is_shard(value):
        return shape, dtype, 0
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return shape, dtype, zlib.crc32(data.data)
