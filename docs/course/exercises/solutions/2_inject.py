"""Exercise 2, solved."""

from collections.abc import Callable

from torch import nn


def swap_linear(model: nn.Module, wrap: Callable[[nn.Linear], nn.Module]) -> list[str]:
    """Plan, build, apply: `wrap` may raise only before the first change."""
    every_name = model.named_modules(remove_duplicate=False)
    found = {name: module for name, module in every_name if isinstance(module, nn.Linear)}
    made: dict[int, nn.Module] = {}
    for linear in found.values():
        if id(linear) not in made:
            made[id(linear)] = wrap(linear)
    for name, linear in found.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made[id(linear)])
    return list(found)
