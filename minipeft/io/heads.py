"""Heads that train with a prefix or prompt: their tensors, by module and by parameter."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from minipeft.adapters.names import adapters_called
from minipeft.adapters.protocol import innermost, is_adapter
from minipeft.io.files import check_values
from minipeft.layers.trained import TrainedModule

Heads = dict[str, dict[str, Tensor]]  # module name: its state


def head_tensors(model: nn.Module, name: str) -> Heads:
    """The states of the modules that train whole with the adapter."""
    found: Heads = {}
    for place, stack in adapters_called("save", model, name).items():
        for layer in stack:
            if isinstance(layer, TrainedModule):
                found[place] = _state(layer.copy)
    return found


def task_heads(model: nn.Module, endings: Iterable[str]) -> Heads:
    """The states of the model's own modules with these endings of names, as they compute now."""
    found: Heads = {}
    for place, module in model.named_children():
        if place.endswith(tuple(endings)):
            on = isinstance(module, TrainedModule) and module.enabled
            found[place] = _state(module.copy if on else innermost(module))  # type: ignore[arg-type]
    return found


def _state(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict(keep_vars=True)
    return {key: value.detach() for key, value in state.items()}


def by_module(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> Heads:
    """Tensors by their modules: those of `modules` that their names begin with, or the parents."""
    names = sorted(modules, key=len, reverse=True)
    grouped: Heads = {}
    for key, value in tensors.items():
        place = next((n for n in names if key.startswith(f"{n}.")), key.rpartition(".")[0])
        grouped.setdefault(place, {})[key[len(place) + 1 :]] = value
    return grouped


def check_heads(caller: str, model: nn.Module, heads: Heads) -> list[str]:
    """Check tensors against the modules that they are for; returns the modules' names.

    Raises:
        ValueError: a module that the model lacks, that trains already or that holds layers; other
            names, shapes or kinds of numbers; NaN or Inf; two values for one shared parameter.
    """
    for place, own in heads.items():
        module = _module(caller, model, place)
        state, where = module.state_dict(), f"{caller}: head {place!r}"
        check_values(where, own, state)
        shared: dict[int, str] = {}
        for key, value in own.items():
            first = shared.setdefault(state[key].data_ptr(), key)
            if first != key and not torch.equal(own[first], value):
                raise ValueError(f"{where}: {first} and {key} are one, and differ")
    return list(heads)


def _module(caller: str, model: nn.Module, place: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    module = modules.get(place) if place else None
    if module is None or any(is_adapter(part) for part in module.modules()):
        raise ValueError(
            f"{caller}: the file has a trained head {place!r:.80}, which the model lacks or trains "
            f"already; it is a {type(model).__name__}"
        )
    # a file must not train or overwrite the base, whose layers are in a ModuleList
    if any(isinstance(part, nn.ModuleList) for part in module.modules()):
        raise ValueError(f"{caller}: {place!r:.80} is no head: it holds layers of the model")
    return module


def fill_heads(model: nn.Module, name: str, heads: Heads) -> None:
    """Copy tensors that check_heads has accepted into the modules that train."""
    if not heads:
        return
    adapters = adapters_called("load", model, name)
    for place, own in heads.items():
        layer = next(a for a in adapters[place] if isinstance(a, TrainedModule))
        state = layer.copy.state_dict()
        with torch.no_grad():
            for key, value in own.items():
                state[key].copy_(value)
