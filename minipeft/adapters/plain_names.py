"""Names of modules as the plain model has them, whatever torch has wrapped around its parts.

    torch.compile(model)                _orig_mod.layers.0.up
    DataParallel, DDP, AveragedModel    module.layers.0.up
    FSDP of version 1                   _fsdp_wrapped_module.layers.0._fsdp_wrapped_module.up
    checkpoint_wrapper                  layers.0._checkpoint_wrapped_module.up

All of these are `layers.0.up`: that is what state dicts and files hold.  A module of one's own may
really be called `module`, so this word counts as a wrapper's only where the wrapper is torch's; in
the names of a file, which no wrapper comes with, the spelling that the model has decides.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from minipeft.adapters.protocol import is_adapter

T = TypeVar("T")
# no module of anyone's own has these names; "module" is for the spelling that exists to decide
_CERTAIN = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_POSSIBLE = _CERTAIN | {"module"}
_HOMES = ("torch.nn.parallel", "torch.distributed", "torch.optim")  # of classes that keep `module`


class PlainNames:
    """A model's own names for its parts, and the plain ones."""

    def __init__(self, model: nn.Module) -> None:
        self._inside = {  # the places of modules that a wrapper of torch's holds
            f"{name}.{own}" if name else own
            for name, module in model.named_modules(remove_duplicate=False)
            for own in module._modules
            if own in _CERTAIN or (own == "module" and _is_a_wrapper_of_torch(module))
        }

    def plain(self, name: str) -> str:
        """The name of a module or parameter of the model without the wrappers' parts."""
        if not self._inside:
            return name
        path, kept = "", []
        for part in name.split("."):
            path = f"{path}.{part}" if path else part
            if path not in self._inside:
                kept.append(part)
        return ".".join(kept)

    def by_plain(self, found: Mapping[str, T]) -> dict[str, T]:
        """The same under plain names.

        A wrapper and its content have one: an adapter comes first, then what is outermost.
        """
        result: dict[str, T] = {}
        for name, value in found.items():
            plain = self.plain(name)
            if plain not in result or (is_adapter(value) and not is_adapter(result[plain])):
                result[plain] = value
        return result


def _is_a_wrapper_of_torch(module: nn.Module) -> bool:
    return any(cls.__module__.startswith(_HOMES) for cls in type(module).__mro__)


class Spellings:
    """Finds plain names by how a file spells them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._loose: dict[str, str | None] = {}  # None: of more than one
        for name in self._names:
            loose = without(name, _POSSIBLE)
            self._loose[loose] = name if loose not in self._loose else None

    def find(self, name: str) -> str | None:
        """The plain name that this stands for: itself if there is such a one; None if none fits."""
        certain = without(name, _CERTAIN)
        loose = without(name, _POSSIBLE)
        for candidate in (name, certain, loose):
            if candidate in self._names:
                return candidate
        return self._loose.get(loose)


def without(name: str, parts: frozenset[str] = _CERTAIN) -> str:
    """The name without these parts of it; those that only wrappers have, if not told otherwise."""
    return ".".join(part for part in name.split(".") if part not in parts)


def without_outer_wrappers(key: str, prefix: str) -> str:
    """The key without wrappers' parts in front, if `prefix` comes after them."""
    rest = key
    while (first := rest.partition("."))[0] in _POSSIBLE:
        rest = first[2]
    return rest if rest != key and rest.startswith(prefix) else key
