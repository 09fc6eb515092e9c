"""Names of modules as the plain model has them, whatever torch has wrapped around its parts.

    torch.compile(model)                _orig_mod.layers.0.up
    DataParallel, DDP, AveragedModel    module.layers.0.up
    FSDP of version 1                   _fsdp_wrapped_module.layers.0._fsdp_wrapped_module.up
    checkpoint_wrapper                  layers.0._checkpoint_wrapped_module.up

All of these are `layers.0.up`, as state dicts and files say.  A module of your own may be called
`module`, so this word counts as a wrapper's only where the wrapper is torch's; in the names of a
file, where no wrapper can be asked, the model's own spelling decides.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from minipeft.adapters.protocol import is_adapter
from minipeft.adapters.sharded import own_class

T = TypeVar("T")
# nobody else calls a module so; whether "module" is a wrapper's depends on the model's spelling
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

        A wrapper and its content have the same plain name: an adapter wins, then the outer one.
        """
        result: dict[str, T] = {}
        for name, value in found.items():
            plain = self.plain(name)
            if plain not in result or (is_adapter(value) and not is_adapter(result[plain])):
                result[plain] = value
        return result


def _is_a_wrapper_of_torch(module: nn.Module) -> bool:
    return any(cls.__module__.startswith(_HOMES) for cls in own_class(module).__mro__)


class Spellings:
    """Finds the plain name that a file's spelling means."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._loose: dict[str, str | None] = {}  # None: more than one name has this spelling
        for name in self._names:
            loose = without(name, _POSSIBLE)
            self._loose[loose] = name if loose not in self._loose else None

    def find(self, name: str) -> str | None:
        """The plain name that this means: first the very same name; None if no name fits."""
        certain = without(name, _CERTAIN)
        loose = without(name, _POSSIBLE)
        for candidate in (name, certain, loose):
            if candidate in self._names:
                return candidate
        return self._loose.get(loose)


def without(name: str, parts: frozenset[str] = _CERTAIN) -> str:
    """The name without these parts: by default those that only wrappers have."""
    return ".".join(part for part in name.split(".") if part not in parts)


def without_outer_wrappers(key: str, prefix: str) -> str:
    """The key without wrappers' parts in front of `prefix`; the key itself if it has no prefix."""
    rest = key
    while (first := rest.partition("."))[0] in _POSSIBLE:
        rest = first[2]
    return rest if rest != key and rest.startswith(prefix) else key
