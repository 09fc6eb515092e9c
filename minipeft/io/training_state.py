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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from minipeft.io.optimizer_state import (
    checked,
    described,
    form,
    kind_of,
    same_names,
    take,
    unpack_dict,
)
from minipeft.io.peft import CONFIG_NAME as OF_PEFT
from minipeft.io.replace import Replacement, read_whole
from minipeft.io.seal import read_sealed, stage
from minipeft.io.values import pack
from minipeft.model.trained_state import trained_state

CONFIG_NAME, WEIGHTS_NAME = "training_state.json", "training_state.safetensors"
_MODEL = "model/"  # before the names of the model's tensors in the file
_SAVE, _LOAD = "save_training_state", "load_training_state"
_NAMED = fields.Kind("an object", lambda value: isinstance(value, dict))
_TABLE = {
    "format": fields.one_of(1), "step": fields.whole(0), "adapters": _NAMED,
    "optimizer": _NAMED, "random": _NAMED, "scheduler": fields.optional(_NAMED),
}  # fmt: skip
_OF_SCHEDULER = {"class": fields.TEXT, "state": _NAMED}


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
            parameters, or parameters on the meta device; a state with keys like 1 and "1", whose
            tensors would have one name.  Nothing is written then.
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
        "optimizer": described(optimizer, own.groups, tensors),
        "scheduler": None if scheduler is None else {
            "class": kind_of(scheduler),
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
    as they are: in data-parallel training, where each process draws numbers of its own, the first
    one's generators would give all processes the same dropout masks, so pass it there, and let each
    process set its own.

    Raises:
        ValueError: no such state, a damaged one or one of two saves; other adapters or settings of
            them (scaling, dropout, scale, on or off), another shape or dtype; another optimiser,
            other groups, options or moments, another scheduler, one without the other; tensors
            that nothing names; random generators of other devices; merged or sharded adapters.
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

    before = optimizer.state_dict(), None if scheduler is None else scheduler.state_dict()
    with _of(where):
        config, tensors = read_whole(where, read)
        fields.check(CONFIG_NAME, config, _TABLE, needed=_TABLE)
        values = _checked_values(config["adapters"], tensors, own)
        moments = checked(config["optimizer"], tensors, optimizer, own.groups, before[0])
        rates = _checked_rates(config["scheduler"], tensors, scheduler, before[1])
        states = unpack_dict("random", config["random"], tensors)
        if tensors:  # what was used is out
            raise ValueError(
                f"{WEIGHTS_NAME} holds {sorted(tensors)[0]} ({len(tensors)} such in all), which "
                f"{CONFIG_NAME} does not name"
            )
        if generators:
            check_random_states(states)

    try:
        take(optimizer, moments)
        if scheduler is not None and rates is not None:
            scheduler.load_state_dict(rates)
    except BaseException:
        take(optimizer, before[0])
        if scheduler is not None and before[1] is not None:
            scheduler.load_state_dict(before[1])
        raise
    with torch.no_grad():
        for name, value in own.trained.items():
            value.copy_(values[name])
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
            plain(place): {
                **{key: vars(adapter)[key] for key in ("scaling", "dropout")
                   if isinstance(vars(adapter).get(key), float | int)},
                "scale": float(adapter.scale), "enabled": bool(adapter.enabled),
            }
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


@contextmanager
def _of(where: Path) -> Iterator[None]:
    """Let whatever a damaged file leads to be a ValueError that names the file."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(str(where)):
            raise
        raise ValueError(f"{where}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(
            f"{where}: {CONFIG_NAME} is damaged ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _checked_values(
    settings: Mapping[str, Any], tensors: dict[str, Tensor], own: _Own
) -> dict[str, Tensor]:
    """The trained tensors, taken out of `tensors`; they and the settings must be the model's."""
    names = [name for name in tensors if name.startswith(_MODEL)]
    saved = {name.removeprefix(_MODEL): tensors.pop(name) for name in names}
    same_names("the model's trained tensors", saved.keys(), own.trained.keys())
    for name, value in saved.items():
        if (there := form(value)) != (here := form(own.trained[name])):
            raise ValueError(f"{name} is {there} there, and {here} in the model")
    for place in sorted(settings.keys() | own.settings.keys()):
        if (was := settings.get(place)) != (mine := own.settings.get(place)):
            raise ValueError(
                f"adapter {place!r} has {was} there, and {mine} here{_remedy(was, mine)}"
            )
    return saved


def _remedy(there: Any, mine: Any) -> str:
    """The calls that let an adapter's settings be those of the file."""
    if not isinstance(there, dict) or mine is None:
        return ""
    calls = {
        "scaling": "inject it with the alpha that it had", "dropout": "and with its dropout",
        "scale": f"scale_adapters(model, {there.get('scale')}) sets its scale (name= that of one "
                 "adapter among several)",
        "enabled": "use_adapters(model, names) chooses the adapters that are on",
    }  # fmt: skip
    return "".join(f"; {call}" for key, call in calls.items() if there.get(key) != mine.get(key))


def _checked_rates(
    saved: Any, tensors: dict[str, Tensor], scheduler: Scheduler | None, own: Any
) -> dict[Any, Any] | None:
    """The scheduler's state dict; None if there is none.  `own` is this scheduler's."""
    if saved is not None:
        fields.check("scheduler", saved, _OF_SCHEDULER, needed=_OF_SCHEDULER)
    there = None if saved is None else saved["class"]
    here = None if scheduler is None else kind_of(scheduler)
    if there != here:
        raise ValueError(
            f"was saved with {there or 'no scheduler'}; here is {here or 'none'}: pass "
            "scheduler= as it was"
        )
    if saved is None:
        return None
    found = unpack_dict("the scheduler's state", saved["state"], tensors)
    _same_keys("entries of the scheduler", found, own)
    return found


def _same_keys(what: str, there: Any, here: Any) -> None:
    """Raise ValueError unless dicts have the same keys, and those of schedulers inside too.

    torch's schedulers take every key for an attribute, `step` and `optimizer` too.
    """
    if type(here) is dict:
        if type(there) is not dict:
            raise ValueError(f"{what}: {str(there)[:60]}; expected a dict")
        same_names(what, there.keys(), here.keys())
        for key, value in here.items():
            _same_keys(f"{what}: {key}", there[key], value)
    elif type(here) in (list, tuple) and any(type(value) is dict for value in here):
        if type(there) is not type(here) or len(there) != len(here):
            raise ValueError(f"{what}: {str(there)[:60]}; expected {len(here)} in a list")
        for index, value in enumerate(here):
            _same_keys(f"{what}: {index}", there[index], value)
