"""What of a checkpoint belongs to one process of several, for models sharded by fully_shard.

    with torch.device("meta"): model = ...           on every process
    inject_qlora(model, ...); fully_shard(...)       parameters are DTensors on the meta device
    load_quantized(model, path)                      each process reads its own rows' bytes

A parameter's rows are split over the processes as torch.chunk splits them: equal parts, and what
is left to the last.  `cut` takes the part of this process out of a tensor that is a view of the
mapped file, so that only its bytes are read, and makes the DTensor.  Before anything changes,
`agree` asks all processes whether each has what it needs: none waits for one that gave up.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.io.bitsandbytes.contents import Contents
from minipeft.io.bitsandbytes.plan import Plan
from minipeft.io.bitsandbytes.prepared import is_sharded
from minipeft.layers.dora import DoRA


def meshes_of(model: nn.Module) -> list[Any]:
    """The meshes of processes over which parameters are sharded, in the order of the model."""
    found: list[Any] = []
    for parameter in model.parameters():
        if is_sharded(parameter):
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            if all(mesh is not other for other in found):
                found.append(mesh)
    return found


def refuse_values(model: nn.Module) -> None:
    """Raise ValueError if sharded parameters have values.

    fully_shard keeps memory of its own for them, which would not follow.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) and not parameter.is_meta:
            raise ValueError(
                f"load_quantized: {name} is sharded and has values; shard the model while it is on "
                "the meta device (build it there, inject, fully_shard, then load_quantized)"
            )


def region(meta: Any) -> tuple[slice, ...]:
    """Which part of a whole tensor this process has, as a slice for each axis.

    Raises:
        ValueError: a placement that is neither a plain Shard nor Replicate.
    """
    starts, sizes = [0] * meta.dim(), list(meta.shape)
    for axis, placement in enumerate(meta.placements):
        kind = type(placement).__name__
        if kind == "Replicate":
            continue
        if kind != "Shard":
            raise ValueError(f"it is placed as {placement}; expected Shard or Replicate")
        dim, mesh = placement.dim % meta.dim(), meta.device_mesh
        part = -(-sizes[dim] // mesh.size(axis))  # of torch.chunk
        first = min(mesh.get_local_rank(axis) * part, sizes[dim])
        starts[dim], sizes[dim] = starts[dim] + first, min(part, sizes[dim] - first)
    own = tuple(meta.to_local().shape)
    if own != tuple(sizes) and math.prod(own) + math.prod(sizes):
        raise ValueError(f"this process has a part {own}; expected {tuple(sizes)}")
    return tuple(slice(first, first + size) for first, size in zip(starts, sizes, strict=True))


def cut(name: str, meta: Any, whole: Tensor, device: torch.device, *, keep: bool) -> nn.Parameter:
    """This process's part of a tensor, as the parameter that takes the place of the meta one.

    `keep` leaves the part where it is in a mapped file, if it lies there without gaps.

    Raises:
        ValueError: another shape; a placement as in `region`; scales that are not finite.
    """
    from torch.distributed.tensor import DTensor

    if tuple(whole.shape) != tuple(meta.shape):
        raise ValueError(f"{name}: {tuple(whole.shape)}; the model's is {tuple(meta.shape)}")
    try:
        part = whole[region(meta)]
    except ValueError as error:
        raise ValueError(f"load_quantized: {name}: {error}") from error
    if not (keep and part.is_contiguous() and device.type == "cpu"):
        part = part.to(device, copy=True, memory_format=torch.contiguous_format)
    shards = DTensor.from_local(
        part, meta.device_mesh, meta.placements, run_check=False, shape=meta.shape,
        stride=meta.stride(),
    )  # fmt: skip
    return nn.Parameter(shards, requires_grad=meta.requires_grad)


def device_of(meshes: Iterable[Any]) -> torch.device:
    """Where a process of these meshes computes."""
    kind: str = next(iter(meshes)).device_type
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


def fingerprint(*what: object) -> str:
    """A short text that is equal where these are; they must print as what they are."""
    return hashlib.sha256(repr(what).encode()).hexdigest()


def agree(meshes: Iterable[Any], error: Exception | None, print_of: str) -> None:
    """Ask all processes of these meshes whether each has read its part, of the same checkpoint.

    Raises:
        Exception: the error of this process.
        ValueError: another process has an error, or has read something else.
    """
    import torch.distributed as dist

    told = None if error is None else f"{type(error).__name__}: {error}"
    seen: list[tuple[int, str | None, str]] = [(dist.get_rank(), told, print_of)]
    for mesh in meshes:
        for axis in range(mesh.ndim):
            found: list[Any] = [None] * mesh.size(axis)
            dist.all_gather_object(found, seen, group=mesh.get_group(axis))
            seen = sorted({entry for part in found for entry in part}, key=lambda own: own[0])
    if error is not None:
        raise error
    for rank, said, _ in seen:
        if said is not None:
            raise ValueError(
                f"load_quantized: rank {rank} could not load, so no rank has changed its model; it "
                f"says: {said}"
            )
    others = [rank for rank, _, other in seen if other != print_of]
    if others:
        raise ValueError(
            f"load_quantized: ranks {others} have another checkpoint, model or version than rank "
            f"{dist.get_rank()}; give all of them the same"
        )


@contextlib.contextmanager
def same_numbers(meshes: Iterable[Any]) -> Iterator[None]:
    """A context in which every process draws the random numbers that the first would draw.

    A process whose generator was in another state has that state again afterwards.
    """
    import torch.distributed as dist

    own = torch.get_rng_state()
    first = own.clone()
    for mesh in meshes:
        state = first.to(device_of([mesh]))
        for axis in range(mesh.ndim):
            dist.broadcast(state, group=mesh.get_group(axis), group_src=0)
        first = state.cpu()
    if torch.equal(own, first):
        yield
        return
    torch.set_rng_state(first)
    try:
        yield
    finally:
        torch.set_rng_state(own)


def shares(meshes: Iterable[Any], names: list[str]) -> list[str]:
    """The names that this process takes, when all processes together take each name once."""
    every = list(meshes)
    if not every:
        return names
    import torch.distributed as dist

    ranks = every[0].mesh.flatten().tolist()
    return names[ranks.index(dist.get_rank()) :: len(ranks)]


def check_plan(plan: Plan, contents: Contents) -> None:
    """Raise ValueError where a sharded model cannot take what the checkpoint has.

    Nothing may be joined, and no adapter may need a whole weight for its start.
    """
    for join in plan.joined:
        raise ValueError(
            f"{contents.file(join.keys[0])}: {join.first} is made of {join.keys[0]} and the like, "
            "of which a process cannot read its part alone; load without fully_shard"
        )
    for name, layer in plan.model.model.named_modules():
        if isinstance(layer, DoRA) and layer.lora_a.is_meta:
            raise ValueError(
                f"load_quantized: {name} is DoRA, whose lengths are norms of the whole weight; "
                "load without fully_shard"
            )
