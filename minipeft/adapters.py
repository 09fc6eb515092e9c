"""Whole-model functions on adapters: freeze, parameters, state, on and off, strength.

They find adapters through protocol.py alone, so a layer of your own takes part.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minipeft.protocol import Adapter, is_adapter


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


def _named_adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, adapter in named_adapters(model).items()
        for name, parameter in adapter.adapter_parameters().items()
    }


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that adapters own: what an optimiser gets."""
    yield from _named_adapter_parameters(model).values()


def freeze(model: nn.Module) -> None:
    """Freeze every parameter that no adapter owns; adapters keep their `requires_grad`."""
    owned = {id(parameter) for parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in owned:
            parameter.requires_grad_(False)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters, detached and not copied: '<module name>.lora_a', and so on."""
    return {name: value.detach() for name, value in _named_adapter_parameters(model).items()}


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the adapters, under the names that the plain model had."""
    modules = model.named_modules(remove_duplicate=False)  # a shared one under each of its names
    adapters = {name: module for name, module in modules if is_adapter(module)}
    owned = {
        f"{name}.{own}" if name else own
        for name, adapter in adapters.items()
        for own in adapter.adapter_parameters()
    }
    wrappers = sorted((name for name in adapters if hasattr(adapters[name], "base")), key=len)
    state = {}
    for key, value in model.state_dict().items():
        if key in owned:
            continue
        for name in wrappers:
            prefix = f"{name}.base." if name else "base."
            if key.startswith(prefix):
                key = f"{name}.{key[len(prefix) :]}" if name else key[len(prefix) :]
                break
        state[key] = value
    return state


def refuse_merged(caller: str, adapters: Mapping[str, Adapter]) -> None:
    """Raise ValueError if an adapter is merged: its precomputed weight would not follow."""
    merged = [n for n, a in adapters.items() if getattr(a, "merged_weight", None) is not None]
    if merged:
        raise ValueError(f"{caller}: {merged[0]!r} is merged; call minipeft.unmerge(model) first")


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True
) -> tuple[list[str], list[str]]:
    """Copy adapter tensors into the model's adapters; all are checked before the first is copied.

    Returns (missing, unexpected) names, which are empty if `strict`.

    Raises:
        ValueError: a missing or unexpected name (if strict), another shape, no floating-point
            values, or a merged adapter.  Nothing has been copied then.
    """
    adapters = require_adapters("load_adapter_state_dict", model)
    refuse_merged("load_adapter_state_dict", adapters)
    own = _named_adapter_parameters(model)
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    if strict and (missing or unexpected):
        raise ValueError(
            f"load_adapter_state_dict: missing {missing[:5]} ({len(missing)} in all), unexpected "
            f"{unexpected[:5]} ({len(unexpected)} in all); is it another model's adapter?"
        )
    for name in own.keys() & state.keys():
        if not isinstance(state[name], Tensor) or not state[name].is_floating_point():
            raise ValueError(f"load_adapter_state_dict: {name} is no floating-point tensor")
        if own[name].is_meta:
            raise ValueError(
                f"load_adapter_state_dict: {name} is on the meta device and cannot hold values; "
                "load the base model first"
            )
        if state[name].shape != own[name].shape:
            raise ValueError(
                f"load_adapter_state_dict: {name} has shape {tuple(state[name].shape)}, the model "
                f"expects {tuple(own[name].shape)}"
            )
    with torch.no_grad():
        for name in own.keys() & state.keys():
            own[name].copy_(state[name])
    return missing, unexpected


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes as its base does, merged or not.

    Nests, and restores each adapter's own state, also after an exception.

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


def scale_adapters(model: nn.Module, factor: float) -> list[str]:
    """Multiply what every adapter adds by `factor`; absolute: 1.0 is as trained.  Returns names.

    Raises:
        ValueError: no adapter, a merged one, one that cannot be scaled (a prefix), or a factor
            that is not finite; every adapter keeps its strength then.
    """
    adapters = require_adapters("scale_adapters", model)
    refuse_merged("scale_adapters", adapters)
    if not isinstance(factor, int | float) or not -float("inf") < factor < float("inf"):
        raise ValueError(f"scale_adapters: factor={factor!r}; expected a finite number")
    before = [(adapter, adapter.scale) for adapter in adapters.values()]
    try:
        for adapter in adapters.values():
            adapter.scale = float(factor)
    except ValueError:
        for adapter, scale in before:
            adapter.scale = scale
        raise
    return list(adapters)
