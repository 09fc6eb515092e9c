"""Exercise 2: put layers into any model, or leave it as it was."""

from collections.abc import Callable

from torch import nn


def swap_linear(model: nn.Module, wrap: Callable[[nn.Linear], nn.Module]) -> list[str]:
    """Replace every nn.Linear below `model` by wrap(linear); returns their names.

    A module that stands under two names is wrapped once and put in under both.  If `wrap` raises,
    the model is as it was.
    """
    raise NotImplementedError
