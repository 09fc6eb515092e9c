"""Which adapter of a model is called what: names live here, at the level of the model.

Layers know no names.  A model that has more than one adapter keeps a list of layers for each name;
what no list claims is called "default".  Adapters over the same module stack, the newest outermost.
"""

from collections.abc import Iterable

from torch import nn

from minipeft.adapters.protocol import Adapter, is_adapter
from minipeft.adapters.targets import visible_modules

DEFAULT = "default"
_ATTRIBUTE = "_minipeft_adapters"  # in the __dict__ of the model that the names were given to


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


def _lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Every list of the model and its parts: names may have been given to a part."""
    found: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        for name, layers in module.__dict__.get(_ATTRIBUTE, {}).items():
            found.setdefault(name, []).extend(layers)
    return found


def named(model: nn.Module) -> dict[str, dict[str, list[Adapter]]]:
    """{adapter name: {plain module name: its layers over that module, outermost first}}."""
    name_of = {id(layer): name for name, layers in _lists(model).items() for layer in layers}
    found: dict[str, dict[str, list[Adapter]]] = {}
    for place, stack in stacks(model).items():
        for adapter in stack:
            if getattr(adapter, "nameless", False):
                continue
            name = name_of.get(id(adapter), DEFAULT)
            found.setdefault(name, {}).setdefault(place, []).append(adapter)
    return found


def adapters_called(caller: str, model: nn.Module, name: str) -> dict[str, list[Adapter]]:
    """The layers of one adapter by the names of their modules in the plain model.

    Raises:
        ValueError: there is none of this name.
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
        raise ValueError(f"{caller}: the model has an adapter {name!r} already")


def give_name(model: nn.Module, name: str, layers: Iterable[nn.Module]) -> None:
    """Call these adapters `name`."""
    if name != DEFAULT:
        model.__dict__.setdefault(_ATTRIBUTE, {})[name] = list(layers)


def forget(model: nn.Module) -> None:
    """Drop layers that are no longer in the model from the lists."""
    present = {id(module) for module in model.modules()}
    for module in model.modules():
        lists = module.__dict__.get(_ATTRIBUTE, {})
        for name, layers in list(lists.items()):
            lists[name] = [layer for layer in layers if id(layer) in present]
            if not lists[name]:
                del lists[name]
