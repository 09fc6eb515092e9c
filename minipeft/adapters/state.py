"""The adapters of a model: their parameters and state, on or off, and how strongly.

These functions find adapters through protocol.py alone, so a layer of your own takes part.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import adapters_called, named
from minipeft.adapters.plain_names import PlainNames, Spellings
from minipeft.adapters.protocol import Adapter, is_adapter
from minipeft.adapters.sharded import (
    agreed,
    check_equal,
    gathered_all,
    is_shard,
    like,
    resharded,
    why_unlike,
)


def named_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter of the model by its module name; one under several names comes once.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if is_adapter(module)}


def require_adapters(caller: str, model: nn.Module) -> dict[str, Adapter]:
    """named_adapters, or a ValueError if there is none."""
    found = named_adapters(model)
    if not found:
        raise ValueError(f"{caller}: the model has no adapter; inject one first")
    return found


def named_tensors(
    caller: str, model: nn.Module, name: str | None
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters and statistics of one adapter by its name; None: of all adapters.

    Under the modules' names in the plain model, and with no part that torch wraps around modules
    (torch.compile, DDP).  Few adapters have statistics: those with a method `adapter_buffers`.

    Raises:
        ValueError: no such adapter, or an adapter with two layers over one module (stacked by
            hand), whose parameters would have one name.
    """
    if name is None:
        every = named_adapters(model)
        banks = [place for place, a in every.items() if getattr(a, "nameless", False)]
        adapters = [(_without_banks(place, banks), adapter) for place, adapter in every.items()]
    else:
        called = adapters_called(caller, model, name)
        adapters = [(place, adapter) for place, stack in called.items() for adapter in stack]
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    names = PlainNames(model)
    for place, adapter in adapters:
        inner = PlainNames(adapter)  # type: ignore[arg-type]  # a head saved whole may hold some
        path = f"{plain}." if (plain := names.plain(place)) else ""
        for own, parameter in adapter.adapter_parameters().items():
            key = path + inner.plain(own)
            if key in parameters:
                raise ValueError(
                    f"{caller}: adapter {name!r} has two layers over {place!r}; give the second "
                    "a name of its own: inject_lora(..., name=)"
                )
            parameters[key] = parameter
        if own_buffers := getattr(type(adapter), "adapter_buffers", None):
            buffers |= {path + inner.plain(own): b for own, b in own_buffers(adapter).items()}
    return parameters, buffers


def _without_banks(place: str, banks: list[str]) -> str:
    """The name that a layer has while no bank lies over it."""
    for bank in banks:
        inside = f"{bank}.base" if bank else "base"
        if place == inside or place.startswith(f"{inside}."):
            return f"{bank}{place[len(inside) :]}".lstrip(".")
    return place


def adapter_parameters(model: nn.Module, *, name: str | None = None) -> Iterator[nn.Parameter]:
    """The parameters that adapters own, or the adapter called `name`: what an optimiser gets.

    Each comes once, also one that two layers share (copies of tied modules).  For adapters that
    train side by side, a group for each: [{"params": list(adapter_parameters(model, name=name)),
    "lr": rate} for name, rate in rates.items()].
    """
    found, _ = named_tensors("adapter_parameters", model, name)
    yield from {id(parameter): parameter for parameter in found.values()}.values()


def adapter_state_dict(model: nn.Module, *, name: str | None = None) -> dict[str, Tensor]:
    """The adapters' parameters, detached and not copied: '<module name>.lora_a', and so on.

    Running statistics of modules that train as a whole are there too.  With `name`, the parameters
    of that adapter under its modules' names in the plain model: they fit a model that has no other
    adapter.  Without `name`, the parameters of all adapters under the names of their layers.

    Of a model that `fully_shard` has cut it gathers the whole tensors: every process must call it,
    and gets them all.  Where one leaves the call out, the others wait for it until the time limit
    of torch.distributed ends them (`timeout` of init_process_group).
    """
    caller, meshes = "adapter_state_dict", resharded(model)
    with agreed(caller, meshes):
        parameters, buffers = named_tensors(caller, model, name)
    return gathered_all(caller, meshes, {**parameters, **buffers})


def refuse_merged(caller: str, adapters: Mapping[str, Adapter]) -> None:
    """Raise ValueError if an adapter is merged: its precomputed weight would not follow."""
    merged = [n for n, a in adapters.items() if getattr(a, "merged_module", None) is not None]
    if merged:
        raise ValueError(f"{caller}: {merged[0]!r} is merged; call minipeft.unmerge(model) first")


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True, name: str | None = None
) -> tuple[list[str], list[str]]:
    """Copy adapter tensors into the model's adapters; all are checked before the first is copied.

    `name` chooses one adapter, as in `adapter_state_dict`.  Names may have the parts that torch's
    wrappers add (`_orig_mod.`, `module.`).  Returns (missing, unexpected) keys, which are empty if
    `strict`.  Running statistics may be missing.  NaN and Inf are loaded, so that a run that
    diverged can be looked at, and a RuntimeWarning names the tensors; `load_peft` refuses them.

    Into a model that `fully_shard` has cut every process must load, and give the same whole tensors
    (as `adapter_state_dict` returns them) or shards that are cut as the model's are; each takes its
    part, and nothing is sent but checksums.

    Raises:
        ValueError: a missing or unexpected name (if strict), another shape, no floating-point
            values, or a merged adapter; in any process that shares the model: then all raise.
            Nothing has been copied then.
    """
    caller, mesh = "load_adapter_state_dict", resharded(model)
    with agreed(caller, mesh):
        refuse_merged(caller, require_adapters(caller, model))
        parameters, buffers = named_tensors(caller, model, name)
        own = {**parameters, **buffers}
        state = understood(caller, state, own)
        missing = [key for key in parameters if key not in state]
        chosen, unexpected = checked_state(caller, own, state, missing, strict=strict)
        if bad := [key for key, value in chosen.items() if not _finite(value, own[key].dtype)]:
            warnings.warn(
                f"{caller}: {bad[:5]} ({len(bad)} in all) hold NaN or Inf, or what is so in the "
                "model's dtype, and are loaded all the same; is it the state of a training that "
                "diverged? An older one may be finite",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
    copy_state(caller, mesh, own, chosen)
    return missing, unexpected


def _finite(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether no number is NaN or infinite in `dtype`; of a shard, in this process's part."""
    part: Any = value.detach()
    if is_shard(value):
        part = part.to_local()
    return not dtype.is_floating_point or bool(part.to(dtype).isfinite().all())


def checked_state(
    caller: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], missing: list[str],
    *, strict: bool,
) -> tuple[dict[str, Tensor], list[str]]:  # fmt: skip
    """Check given tensors beside the model's own: those to copy, and the names the model lacks.

    With `strict`, no name may be missing or unexpected.

    Raises:
        ValueError: such a name, no tensor, another shape or kind of numbers, the meta device, two
            values for one tensor, a shard that is cut otherwise.
    """
    unexpected = [key for key in given if key not in own]
    if strict and (missing or unexpected):
        raise ValueError(
            f"{caller}: missing {missing[:5]} ({len(missing)} in all), unexpected {unexpected[:5]} "
            f"({len(unexpected)} in all); is it the state of another model?"
        )
    chosen = {key: value for key, value in given.items() if key in own}
    first: dict[int, str] = {}
    for key, value in chosen.items():
        mine = own[key]
        if not isinstance(value, Tensor) or not isinstance(mine, Tensor):
            raise ValueError(
                f"{caller}: {key} is a {type(value).__name__}, the model's a "
                f"{type(mine).__name__}; expected tensors (load other state before you inject)"
            )
        if mine.is_meta or value.is_meta:
            raise ValueError(f"{caller}: {key} is on the meta device and has no values")
        if value.shape != mine.shape:
            raise ValueError(
                f"{caller}: {key} has shape {tuple(value.shape)}, the model's is "
                f"{tuple(mine.shape)}"
            )
        floats = value.is_floating_point() and mine.is_floating_point()
        if value.dtype != mine.dtype and not floats:
            raise ValueError(f"{caller}: {key} is {value.dtype}, the model's is {mine.dtype}")
        if (why := why_unlike(value, mine)) is not None:
            raise ValueError(f"{caller}: {key} {why}")
        other = first.setdefault(id(mine), key)
        if other != key and not torch.equal(given[other], value):
            raise ValueError(f"{caller}: {other} and {key} are one tensor, and their values differ")
    return chosen, unexpected


def copy_state(
    caller: str, mesh: Any, own: Mapping[str, Tensor], chosen: Mapping[str, Tensor]
) -> None:
    """Copy tensors that `checked_state` has accepted; of a whole one each process takes its shard.

    Raises:
        ValueError: processes of the mesh that share the model were given different tensors.
            Nothing has been copied then.
    """
    check_equal(caller, mesh, chosen)
    with torch.no_grad():
        for key, value in chosen.items():
            own[key].copy_(like(value, own[key]))


def understood(
    caller: str, state: Mapping[str, Tensor], own: Mapping[str, object]
) -> dict[str, Tensor]:
    """The state under the model's `own` plain names; a name that fits none of these is kept.

    Raises:
        ValueError: two names in the state mean the same tensor.
    """
    spellings, found = Spellings(own), {}
    for key, value in state.items():
        plain = spellings.find(key) or key
        if plain in found:
            raise ValueError(f"{caller}: {key!r} is in the state twice, in two spellings")
        found[plain] = value
    return found


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes as its base does, merged or not.

    Contexts may be nested; each puts back what was on and off, also after an exception.

    Raises:
        ValueError: the model has no adapter.
    """
    before = [(a, a.enabled) for a in require_adapters("disable_adapters", model).values()]
    try:
        for adapter, _ in before:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in before:
            adapter.enabled = enabled


def scale_adapters(model: nn.Module, factor: float, *, name: str | None = None) -> list[str]:
    """Multiply what every adapter adds by `factor`, or what the adapter called `name` adds.

    The factor is absolute, not cumulative: 1.0 is as trained.  Returns the names of the layers.

    Raises:
        ValueError: no adapter, a merged adapter, one that cannot be scaled (a prefix), or a factor
            that is not finite; every adapter keeps its strength then.
    """
    adapters = require_adapters("scale_adapters", model)
    refuse_merged("scale_adapters", adapters)
    if name is not None:
        called = adapters_called("scale_adapters", model, name)
        chosen = {id(adapter) for stack in called.values() for adapter in stack}
        adapters = {n: adapter for n, adapter in adapters.items() if id(adapter) in chosen}
    if not isinstance(factor, int | float) or not -float("inf") < factor < float("inf"):
        raise ValueError(f"scale_adapters: factor={factor!r}; expected a finite number")
    before = [(adapter, adapter.scale) for adapter in adapters.values()]
    try:
        for adapter, _ in before:
            adapter.scale = float(factor)
    except ValueError as error:
        for adapter, scale in before:
            adapter.scale = scale
        raise ValueError(
            f"scale_adapters: {error}; name= scales one adapter alone, of {sorted(named(model))}"
        ) from error
    return list(adapters)
