"""Heads that train with a prefix or prompt: their tensors, by module and parameter."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minipeft.layers.trained import TrainedModule
from minipeft.protocol import is_adapter
from minipeft.registry import adapters_called


def head_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of the modules that train whole with the adapter: '<module>.<parameter>'."""
    found: dict[str, Tensor] = {}
    for place, stack in adapters_called("save", model, name).items():
        for layer in stack:
            if isinstance(layer, TrainedModule):
                own = layer.copy.state_dict()
                found |= {f"{place}.{key}": value.detach() for key, value in own.items()}
    return found


def _by_module(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors grouped by the outermost module of the model that they are in."""
    roots: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        root = key.split(".")[0]
        roots.setdefault(root, {})[key[len(root) + 1 :]] = value
    return roots


def check_heads(caller: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the modules these tensors are of.

    Raises:
        ValueError: a module that the model lacks or that trains already, or other shapes.
    """
    grouped = _by_module(model, tensors)
    for place, own in grouped.items():
        module = getattr(model, place, None)
        if not isinstance(module, nn.Module) or is_adapter(module):
            raise ValueError(
                f"{caller}: the file has a trained head {place!r}, which the model lacks or trains "
                f"already; it is a {type(model).__name__}"
            )
        state = module.state_dict()
        wrong = {k for k in state.keys() | own.keys()
                 if k not in state or k not in own or state[k].shape != own[k].shape}  # fmt: skip
        if wrong:
            key = sorted(wrong)[0]
            found = [tuple(s[key].shape) if key in s else None for s in (own, state)]
            raise ValueError(f"{caller}: {place}.{key} is {found[0]}; the model's is {found[1]}")
        if not all(bool(v.isfinite().all()) for v in own.values() if v.is_floating_point()):
            raise ValueError(f"{caller}: {place} holds NaN or Inf")
    return list(grouped)


def fill_heads(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors, which check_heads has seen, into the modules that train."""
    adapters = adapters_called("load", model, name)
    for place, own in _by_module(model, tensors).items():
        layer = next(a for a in adapters[place] if isinstance(a, TrainedModule))
        state = layer.copy.state_dict()
        with torch.no_grad():
            for key, value in own.items():
                state[key].copy_(value)
