"""All that a training loop of one's own needs to go on: saved as one, loaded as one.

    folder/training_state.safetensors    adapters, moments, states of random generators
    folder/training_state.json           step, groups and rates, scheduler, and which tensor is what

Adapters are stored as they train (trained_state.py), not as other programs read them: `save_peft`
writes those files, into the same folder if you like.

Not torch.distributed.checkpoint: it writes its index with pickle and one file after the other, so
that a process that dies leaves a mixture; it copies tensor by tensor into the model, so that a
load that fails half-way leaves one too; and it keeps neither random generators nor the names that
an optimiser's moments belong to.  Where a model is sharded over processes it is the right tool, and
these functions say so.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minipeft.adapters.plain_names import PlainNames
from minipeft.adapters.protocol import whole
from minipeft.adapters.state import refuse_merged, require_adapters
from minipeft.io import fields
from minipeft.io.generators import check_random_states, random_states, set_random_states
from minipeft.io.peft import CONFIG_NAME as OF_PEFT
from minipeft.io.replace import Replacement, read_whole
from minipeft.io.seal import read_sealed, stage
from minipeft.io.values import pack, unpack
from minipeft.model.trained_state import trained_state

CONFIG_NAME, WEIGHTS_NAME = "training_state.json", "training_state.safetensors"
_MODEL = "model/"  # before the names of the model's tensors in the file
_OF_GROUP = ("params", "param_names")  # what stands for the parameters in a group
_SAVE, _LOAD = "save_training_state", "load_training_state"
_NAMED = fields.Kind("an object", lambda value: isinstance(value, dict))
_TABLE = {
    "format": fields.one_of(1), "step": fields.whole(0), "adapters": _NAMED,
    "optimizer": _NAMED, "random": _NAMED, "scheduler": fields.optional(_NAMED),
}  # fmt: skip
_OF_OPTIMIZER = {
    "class": fields.TEXT, "state": _NAMED, "more": _NAMED,
    "groups": fields.list_of(fields.Kind("a group", lambda v: isinstance(v, dict)
                             and isinstance(v.get("parameters"), list) and "options" in v)),
}  # fmt: skip


@runtime_checkable
class Scheduler(Protocol):
    """A scheduler of learning rates, torch's or anybody's: it can tell and take its state."""

    def state_dict(self) -> dict[str, Any]:
        """Its state: numbers, texts, tensors, and lists and dicts of them."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take such a state."""
        ...


def save_training_state(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    scheduler: Scheduler | None = None,
) -> None:
    """Save what training needs to go on after `step` steps, in every bit.

    Adapters, with all that trains beside them; the optimiser's moments and settings, each by the
    name of its parameter; the scheduler; the states of Python's, numpy's and torch's random
    generators.  Over an older state it is replaced as a whole: a process that dies at any moment
    leaves the old state or the new one.  For one process; in data-parallel training the first one
    saves, and each sets its generators itself.

    Raises:
        ValueError: no adapter; a parameter of the optimiser that the model does not have; sharded
            parameters, or parameters on the meta device.  Nothing is written then.
        TypeError: the scheduler or the optimiser keeps what JSON and tensors cannot hold.
        OSError: the disk is full, and the like; the old state is as it was.

    >>> import tempfile
    >>> from minipeft import adapter_parameters, inject_lora
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> inject_lora(model, ["0"], rank=2)
    ['0']
    >>> optimizer = torch.optim.AdamW(adapter_parameters(model))
    >>> folder = tempfile.mkdtemp()
    >>> save_training_state(folder, model, optimizer, step=7)
    >>> load_training_state(folder, model, optimizer)
    7
    """
    whole(_SAVE, "step", step, least=0)
    own = _Own(_SAVE, model, optimizer)
    tensors = {f"{_MODEL}{name}": value for name, value in own.trained.items()}
    config = {
        "format": 1, "step": step, "adapters": own.settings,
        "optimizer": _described(optimizer, own, tensors),
        "scheduler": None if scheduler is None else {
            "class": _kind(scheduler),
            "state": pack(scheduler.state_dict(), "scheduler", tensors),
        },
        "random": pack(random_states(), "random", tensors),
    }  # fmt: skip
    with Replacement(Path(folder)) as unit:
        stage(unit, (CONFIG_NAME, WEIGHTS_NAME), config, tensors)


def load_training_state(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    scheduler: Scheduler | None = None,
    generators: bool = True,
) -> int:
    """Take over a saved state; returns its step, after which training goes on.

    Model, optimiser and scheduler are made as they were for the run that was saved: the same
    adapters, the same class of optimiser over the same parameters in the same groups, in any order.
    Everything is checked before anything is set.  `generators=False` leaves the random generators
    as they are.

    Raises:
        ValueError: no such state, a damaged one or one of two saves; other adapters or settings of
            them, another shape or dtype; another optimiser, other groups, another scheduler, one
            without the other; random generators of other devices; merged or sharded adapters.
            Model, optimiser, scheduler and generators are then as they were.
    """
    where = Path(folder)
    own = _Own(_LOAD, model, optimizer)
    refuse_merged(_LOAD, require_adapters(_LOAD, model))

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = fields.read_config(where / CONFIG_NAME, _SAVE, OF_PEFT, "load_peft")
        found = read_sealed(where / WEIGHTS_NAME, config, CONFIG_NAME)[0]
        # memory of their own: the optimiser keeps some, and the file may be replaced
        return config, {name: tensor.clone() for name, tensor in found.items()}

    config, tensors = read_whole(where, read)
    fields.check(str(where / CONFIG_NAME), config, _TABLE, needed=_TABLE)
    _check_model(where, config["adapters"], tensors, own)
    moments = _moments(where, config["optimizer"], tensors, optimizer, own)
    rates = _rates(where, config.get("scheduler"), tensors, scheduler)
    states = unpack(config["random"], tensors)
    if generators:
        check_random_states(str(where), states)

    before = optimizer.state_dict(), None if scheduler is None else scheduler.state_dict()
    try:
        optimizer.load_state_dict(moments)
        if scheduler is not None and rates is not None:
            scheduler.load_state_dict(rates)
    except BaseException:
        optimizer.load_state_dict(before[0])
        if scheduler is not None and before[1] is not None:
            scheduler.load_state_dict(before[1])
        raise
    with torch.no_grad():
        for name, value in own.trained.items():
            value.copy_(tensors[f"{_MODEL}{name}"])
    if generators:
        set_random_states(states)
    step: int = config["step"]
    return step


class _Own:
    """A model's trained tensors and an optimiser's parameters, by the names of the plain model."""

    def __init__(self, caller: str, model: nn.Module, optimizer: Optimizer) -> None:
        adapters = require_adapters(caller, model)
        plain = PlainNames(model).plain
        self.trained = {plain(name): value for name, value in trained_state(model).items()}
        for name, value in self.trained.items():
            if value.is_meta or hasattr(value, "full_tensor"):
                raise ValueError(
                    f"{caller}: {name} is {'on the meta device' if value.is_meta else 'sharded'}; "
                    "torch.distributed.checkpoint saves and loads sharded models"
                )
        self.settings = {
            plain(place): {key: vars(adapter)[key] for key in ("scaling", "dropout")
                           if isinstance(vars(adapter).get(key), float | int)}
            for place, adapter in adapters.items()
        }  # fmt: skip
        names = {id(p): plain(name) for name, p in model.named_parameters(remove_duplicate=True)}
        self.groups: list[dict[str, Tensor]] = []  # of the optimiser
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise ValueError(
                        f"{caller}: the optimiser has a parameter of shape "
                        f"{tuple(parameter.shape)} that the model does not have; make the "
                        "optimiser after the adapters are in"
                    )
            self.groups.append({names[id(p)]: p for p in group["params"]})


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _described(optimizer: Optimizer, own: _Own, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An optimiser as JSON, with names in the place of numbers; its tensors go into `tensors`."""
    found = optimizer.state_dict()
    numbered: dict[object, str] = {}
    groups: list[dict[str, Any]] = []
    for group, named in zip(found["param_groups"], own.groups, strict=True):
        numbered |= dict(zip(group["params"], named, strict=True))
        options = {key: value for key, value in group.items() if key not in _OF_GROUP}
        groups.append({
            "parameters": [[name, _form(p)] for name, p in named.items()],
            "options": pack(options, f"groups/{len(groups)}", tensors),
        })  # fmt: skip
    state = {numbered[number]: value for number, value in found["state"].items()}
    more = {key: value for key, value in found.items() if key not in ("state", "param_groups")}
    return {
        "class": _kind(optimizer), "groups": groups,
        "state": pack(state, "optimizer", tensors), "more": pack(more, "more", tensors),
    }  # fmt: skip


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_model(
    where: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], own: _Own
) -> None:
    """Raise ValueError unless the file's adapters are the model's, in all but their values."""
    saved = {name.removeprefix(_MODEL): value for name, value in tensors.items()
             if name.startswith(_MODEL)}  # fmt: skip
    _same_names(where, "the model's trained tensors", saved.keys(), own.trained.keys())
    for name, value in saved.items():
        if (there := _form(value)) != (here := _form(own.trained[name])):
            raise ValueError(f"{where}: {name} is {there} there, and {here} in the model")
    for place in sorted(settings.keys() | own.settings.keys()):
        if (saved_as := settings.get(place)) != (mine := own.settings.get(place)):
            raise ValueError(f"{where}: adapter {place!r} has {saved_as} there, and {mine} here")


def _moments(
    where: Path,
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    optimizer: Optimizer,
    own: _Own,
) -> dict[str, Any]:
    """The optimiser's state dict, with this optimiser's numbers of its parameters."""
    fields.check(f"{where / CONFIG_NAME}: optimizer", saved, _OF_OPTIMIZER, needed=_OF_OPTIMIZER)
    if saved["class"] != (here := _kind(optimizer)):
        raise ValueError(f"{where}: the state of a {saved['class']}; this optimiser is a {here}")
    if len(saved["groups"]) != len(own.groups):
        raise ValueError(
            f"{where}: the optimiser had {len(saved['groups'])} groups of parameters; this one has "
            f"{len(own.groups)}"
        )
    found = optimizer.state_dict()
    state = unpack(saved["state"], tensors)
    numbered: dict[str, object] = {}
    groups: list[dict[str, Any]] = []
    for index, (group, named) in enumerate(zip(saved["groups"], own.groups, strict=True)):
        forms = dict(group["parameters"])
        _same_names(where, f"group {index} of the optimiser", forms.keys(), named.keys())
        for name, parameter in named.items():
            if forms[name] != (here := _form(parameter)):
                raise ValueError(f"{where}: {name} was {forms[name]}, and is {here} here")
        mine = found["param_groups"][index]
        numbered |= dict(zip(named, mine["params"], strict=True))
        keep = {key: mine[key] for key in _OF_GROUP if key in mine}
        groups.append({**unpack(group["options"], tensors), **keep})
    if strange := state.keys() - numbered.keys():
        raise ValueError(f"{where}: the state of {sorted(strange)[0]}, which is in no group")
    return {
        **unpack(saved["more"], tensors), "param_groups": groups,
        "state": {numbered[name]: value for name, value in state.items()},
    }  # fmt: skip


def _rates(
    where: Path, saved: Any, tensors: Mapping[str, Tensor], scheduler: Scheduler | None
) -> dict[str, Any] | None:
    """The scheduler's state dict; None if there is none."""
    there = None if saved is None else saved.get("class")
    here = None if scheduler is None else _kind(scheduler)
    if there != here:
        raise ValueError(
            f"{where}: was saved with {there or 'no scheduler'}; here is {here or 'none'}: pass "
            "scheduler= as it was"
        )
    found: dict[str, Any] | None = None if saved is None else unpack(saved["state"], tensors)
    return found


def _same_names(where: Path, what: str, there: Any, here: Any) -> None:
    if wrong := sorted(there ^ here):
        side = "are in the file alone" if wrong[0] in there else "are not in the file"
        raise ValueError(
            f"{where}: {what} have other names: {wrong[:3]} {side} ({len(wrong)} in all); is it "
            "the state of another adapter?"
        )
