"""The names of a model's adapters: a label on each layer, which this file alone reads.

A layer without a label belongs to the adapter "default".  Adapters over the same module stack, the
newest outermost.
"""

from collections.abc import Iterable

from torch import nn

from minipeft.adapters.protocol import Adapter, is_adapter
from minipeft.adapters.targets import visible_modules

DEFAULT = "default"
_LABEL = "_minipeft_name"  # in the __dict__ of a layer


def stacks(model: nn.Module) -> dict[str, list[Adapter]]:
    """The adapters over each module, outermost first, by the module's name in the plain model.

    A module that the model holds under several names comes once, under the first.
    """
    found: dict[str, list[Adapter]] = {}
    seen: set[int] = set()
    for name, module in {"": model, **visible_modules(model)}.items():
        stack = []
        while is_adapter(module) and id(module) not in seen:
            seen.add(id(module))
            stack.append(module)
            module = getattr(module, "base", None)  # type: ignore[assignment]
        if stack:
            found[name] = stack
    return found


def named(model: nn.Module) -> dict[str, dict[str, list[Adapter]]]:
    """{adapter name: {plain module name: its layers over that module, outermost first}}."""
    found: dict[str, dict[str, list[Adapter]]] = {}
    for place, stack in stacks(model).items():
        for adapter in stack:
            if getattr(adapter, "nameless", False):
                continue
            name = vars(adapter).get(_LABEL, DEFAULT)
            found.setdefault(name, {}).setdefault(place, []).append(adapter)
    return found


def adapters_called(caller: str, model: nn.Module, name: str) -> dict[str, list[Adapter]]:
    """The layers of one adapter by the names of their modules in the plain model.

    Raises:
        ValueError: no adapter has this name.
    """
    everything = named(model)
    if name not in everything:
        raise ValueError(
            f"{caller}: the model has no adapter {name!r}; it has {sorted(everything) or 'none'}"
        )
    return everything[name]


def check_new_name(caller: str, model: nn.Module, name: object) -> None:
    """Raise ValueError unless this can be the name of a further adapter."""
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(
            f"{caller}: {name!r} cannot name an adapter; use letters, digits, '-' and '_' (it "
            "becomes the name of a folder)"
        )
    if name in named(model):
        raise ValueError(
            f"{caller}: the model has an adapter {name!r} already; choose another name, or call "
            f"minipeft.remove(model, name={name!r}) first"
        )


def give_name(name: str, layers: Iterable[nn.Module]) -> None:
    """Call these adapters `name`."""
    for layer in layers:
        vars(layer)[_LABEL] = name
