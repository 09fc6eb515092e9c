"""Put a layer into any model, and leave the model as it was if that fails.

The part that matters is `put`: find the parent, set the attribute.  All new modules are built
before the first is put in; after an error, `restoring` puts everything back.  A module that the
model holds under several names is wrapped once, and the wrapper is put in under each name.

    names = inject(model, target, wrap)       wrap(module) takes the place of each module

This file knows no kind of layer: model/inject_lora.py chooses LoRA layers by the modules' kinds,
and model/quantize.py chooses 4-bit layers.  Read next: nf4.py.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from minipeft.adapters.protocol import is_adapter
from minipeft.adapters.ready import check_model
from minipeft.adapters.targets import (
    Head,
    Names,
    Target,
    adapter_targets,
    find,
    settled,
    survey,
    visible_modules,
)

Modules = dict[str, Any]  # modules, and 3-D parameters of experts
Made = TypeVar("Made")
Listener = Callable[[nn.Module], None]
# Other files add functions here; each is called with the whole model.
after_swap: list[Listener] = []  # after modules were swapped
after_freeze: list[Listener] = []  # after the base was frozen

_CONTAINERS = (dict, OrderedDict, list, set)


def put(model: nn.Module, replacements: Mapping[str, nn.Module | nn.Parameter]) -> None:
    """Set each module (or parameter) in its parent, under its name; all parents are found first."""
    places = {name: model.get_submodule(name.rpartition(".")[0]) for name in replacements}
    for name, value in replacements.items():
        own = name.rpartition(".")[2]
        places[name]._parameters.pop(own, None)  # torch puts no module where a parameter is
        setattr(places[name], own, value)


def tell(model: nn.Module) -> None:
    """Call every listener: modules of this model were swapped."""
    for listener in after_swap:
        listener(model)


def swap(model: nn.Module, replacements: Mapping[str, nn.Module | nn.Parameter]) -> None:
    """Put each module (or parameter) in the place of its name, and tell those who listen.

    Call it within `restoring`: a name without a parent, or a listener, may raise.
    """
    put(model, replacements)
    tell(model)


def swap_shared(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """`swap`, and each layer also under the other names that the model has for its module."""
    modules = visible_modules(model)
    of = {id(modules[name]): layer for name, layer in layers.items() if name in modules}
    swap(model, {**layers, **{n: of[id(m)] for n, m in modules.items() if id(m) in of}})


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """On an error in the `with` block, put the model's structure back.

    What comes back: each module's attributes and submodules, the contents of lists, dicts and sets
    among them, `requires_grad`, and the strengths of adapters.  The values of tensors are not
    noted: a caller that writes into tensors does that last.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [
        (module, dict(vars(module)), {n: v.copy() if v else () for n, v in vars(module).items()
                                      if type(v) in _CONTAINERS})
        for module in model.modules()
    ]  # fmt: skip
    try:
        yield
    except BaseException:
        for module, attributes, contents in before:
            for name, content in contents.items():
                container = attributes[name]
                container.clear()
                (container.extend if type(container) is list else container.update)(content)
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, _, _ in before:
            if is_adapter(module):  # sets the tensor that compiled code reads
                module.enabled = module.enabled
        raise


def freeze(model: nn.Module) -> None:
    """Freeze every parameter that no adapter owns; adapters keep their `requires_grad`.

    A listener freezes running statistics: while the model has adapters, its normalisations stay in
    eval mode despite `train()`, so the base does not change.  To let statistics follow new data,
    name their normalisations in `train_modules`.  Every function that adds an adapter calls this.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    adapters = [module for module in model.modules() if is_adapter(module)]
    owned = {id(p) for adapter in adapters for p in adapter.adapter_parameters().values()}
    for parameter in model.parameters():
        if id(parameter) not in owned:
            parameter.requires_grad_(False)
    for listener in after_freeze:
        listener(model)


def build(modules: Mapping[str, Any], make: Callable[[str, Any], Made]) -> dict[str, Made]:
    """make(name, module) for each; a module under several names is made once."""
    made: dict[int, Made] = {}
    result = {}
    for name, module in modules.items():
        if id(module) not in made:
            try:
                made[id(module)] = make(name, module)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from error
        result[name] = made[id(module)]
    return result


def inject(
    model: nn.Module,
    target: Target,
    wrap: Callable[[nn.Module], nn.Module],
    *,
    head: Head = None,
) -> Names:
    """Replace every module that `target` names by `wrap(module)`; any kind of module will do.

    Freezes every parameter that no adapter owns.  Returns the names; see adapters/targets.py for
    what a target may be ("all-linear" means linear layers here too).

    Raises:
        ValueError: nothing matches; `wrap` refused.  The model is then as it was.
        TypeError: `wrap` returned no module.
    """
    check_model("inject", model)
    places = survey(model, head)
    if isinstance(target, str) and target.lower() == "all-linear":
        found = adapter_targets(places, target)
    else:
        found = find(places, target)
    modules = settled("inject", places, found.chosen)

    def make(name: str, module: nn.Module) -> nn.Module:
        made = wrap(module)
        if not isinstance(made, nn.Module):
            raise TypeError(f"wrap returned {type(made).__name__}, expected a module")
        return made

    with restoring(model):
        swap(model, build(modules, make))
        freeze(model)
    return Names(modules, found.left_out, notes=found.notes)
