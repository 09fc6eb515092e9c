"""Parameters of which each process holds a part: torch's DTensor, as `fully_shard` makes them.

    gathered(shard)               the whole tensor; every process must call it
    like(value, shard)            a whole tensor, cut as `shard` is; no process is asked
    with agreed(caller, meshes)   every process gets through, or every one raises

A mesh is torch's name for the processes that share a tensor: a grid, whose axes are groups.  One
model can have several, where its layers are cut in different ways: of a model that is cut by layers
over `mesh["tp"]` and sharded over `mesh["dp"]`, what both cut is on the whole grid, and the rest is
on `mesh["dp"]` alone.  torch.distributed is not imported here while nobody else did.
"""

import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Meshes = tuple[Any, ...]
_TOLD = "_minipeft_told"  # an attribute of an error that all processes know of
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


def resharded(model: object) -> Meshes | None:
    """The meshes over which the model's parameters are cut; None: each process has all of each.

    Puts the shards back first: after a forward fully_shard leaves the whole parameters of the
    outermost module in their place, and what is written into those is lost.
    """
    if not isinstance(model, nn.Module):
        return None
    for module in model.modules():
        if is_sharded_module(module):
            module.reshard()  # type: ignore[operator]
    meshes: list[Any] = []
    for parameter in model.parameters():
        if is_shard(parameter) and parameter.device_mesh not in meshes:  # type: ignore[attr-defined]
            meshes.append(parameter.device_mesh)  # type: ignore[attr-defined]
    return tuple(meshes) or None


def is_first(meshes: Meshes) -> bool:
    """Whether this process is the one that writes files: of all that share the model, exactly one.

    It is the one of the lowest rank.  Every process must call this.
    """
    return bool(_groups(meshes)) and min(exchange(meshes, None)) == _rank()


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def _groups(meshes: Meshes) -> list[Any]:
    """The groups of processes that this process is in: one for each axis of the meshes."""
    import torch.distributed as dist

    found: dict[tuple[int, ...], Any] = {}
    for mesh in meshes:
        for axis in range(mesh.ndim if mesh.get_coordinate() is not None else 0):
            group = mesh.get_group(axis)
            found.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    return list(found.values())


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
    with _among_all():
        whole: Tensor = shard.full_tensor()
    return whole.to(own)


def gathered_all(
    caller: str, meshes: Meshes | None, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The whole tensors, detached; tensors that are whole come back themselves.

    Every process must call it.  What can fail in one process alone comes first: all must have the
    same tensors, and memory for all that is gathered is taken.  If that fails in one, all raise.

    Raises:
        ValueError: processes have other names, shapes or dtypes; another process raised.
    """
    if meshes is None:
        return {name: gathered(tensor) for name, tensor in tensors.items()}
    with agreed(caller, meshes):
        shards = {n: t for n, t in tensors.items() if is_shard(t) and not t.is_meta}
        rooms = {n: torch.empty(t.shape, dtype=t.dtype, device=t.device) for n, t in shards.items()}
    marks = {name: (tuple(room.shape), str(room.dtype)) for name, room in rooms.items()}
    _check_same(f"{caller}: processes {{}} and {{}} have models with different parameters ({{}}); "
                "build the same model in all of them", meshes, marks)  # fmt: skip
    for name, room in rooms.items():
        room.copy_(gathered(shards[name]))
    return {n: rooms[n] if n in rooms else tensor.detach() for n, tensor in tensors.items()}


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


def exchange(meshes: Meshes, said: object) -> dict[int, Any]:
    """What every process of the meshes says, by its rank; every process must call it."""
    import torch.distributed as dist

    heard: dict[int, Any] = {dist.get_rank(): said}
    for group in _groups(meshes):  # the axes of a grid: after the last one each has heard of all
        found: list[Any] = [None] * dist.get_world_size(group)
        with _among_all():
            dist.all_gather_object(found, heard, group=group)
        heard = {rank: words for part in found for rank, words in part.items()}
    return heard


@contextmanager
def _among_all() -> Iterator[None]:
    """Around a call that waits for the others: whoever fails in it cannot tell them by another."""
    try:
        yield
    except Exception as error:
        setattr(error, _TOLD, True)
        raise


@contextmanager
def agreed(caller: str, meshes: Meshes | None) -> Iterator[None]:
    """Every process of the meshes gets through this context, or every one raises.

    So none goes on alone into a call that waits for the others.  Each must enter it; without meshes
    a process is by itself.  Contexts may be nested: an error is told once, by the innermost.  Where
    the body has a call that waits for the others, what comes before it needs a context of its own.
    An error inside such a call (a connection that broke) is not told: the others are in it too, and
    torch.distributed ends them when this process ends or its time limit is over.

    Raises:
        ValueError, OSError: another process raised; the message has its words.
    """
    if meshes is None:
        yield
        return
    try:
        yield
    except Exception as error:
        if not hasattr(error, _TOLD):
            setattr(error, _TOLD, True)
            exchange(meshes, (isinstance(error, OSError), f"{type(error).__name__}: {error}"))
        raise
    heard = {rank: words for rank, words in exchange(meshes, None).items() if words is not None}
    if heard:
        rank, (of_the_system, why) = min(heard.items())
        kind = OSError if of_the_system else ValueError
        told = kind(f"{caller}: process {rank} raised, so all processes stop here: {why}")
        setattr(told, _TOLD, True)
        raise told


def check_equal(caller: str, meshes: Meshes | None, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError in every process unless all were given the same tensors.

    Compared are names, shapes, dtypes and a checksum of the values of tensors that are whole.
    """
    if meshes is None:
        return
    with agreed(caller, meshes):
        marks = {key: _mark(value) for key, value in tensors.items()}
    _check_same(f"{caller}: processes {{}} and {{}} were given different tensors ({{}}); give "
                "every process the same. Nothing has been copied", meshes, marks)  # fmt: skip


def _check_same(text: str, meshes: Meshes, marks: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ValueError in every process, of this text, unless all have the same marks by name."""
    heard = sorted(exchange(meshes, dict(marks)).items())
    first, mine = heard[0]
    for rank, other in heard[1:]:
        names: Iterable[str] = dict.fromkeys([*mine, *other])
        for key in names:
            if (one := mine.get(key)) != (two := other.get(key)):
                shown = "other values" if one and two and one[:2] == two[:2] else f"{one} and {two}"
                told = ValueError(text.format(first, rank, f"{key}: {shown}"))
                setattr(told, _TOLD, True)
                raise told


def _mark(value: Tensor) -> tuple[tuple[int, ...], str, int]:
    shape, dtype = tuple(value.shape), str(value.dtype)
    if is_shard(value):
        return shape, dtype, 0
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return shape, dtype, zlib.crc32(data.data)
