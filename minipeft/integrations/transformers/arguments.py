"""The arguments of a forward, by name, whether they came by position or by keyword."""

import inspect
from typing import Any

from torch import nn


class Arguments:
    """`given["position_ids"]` reads an argument (None if absent); assigning changes the call."""

    def __init__(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs, self._names = args, dict(kwargs), names

    def __getitem__(self, name: str) -> Any:
        if name in self._names[: len(self.args)]:
            return self.args[self._names.index(name)]
        return self.kwargs.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._names[: len(self.args)]:
            index = self._names.index(name)
            self.args = (*self.args[:index], value, *self.args[index + 1 :])
        else:
            self.kwargs[name] = value


def names_of(module: nn.Module) -> list[str]:
    """The names of the parameters of `module.forward`, in their order."""
    return list(inspect.signature(module.forward).parameters)
