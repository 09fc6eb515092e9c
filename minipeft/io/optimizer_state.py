"""An optimiser's state as JSON beside tensors, by names of parameters: written, checked, taken.

    {"class": "torch.optim.adamw.AdamW",
     "groups": [{"parameters": [["0.lora_a", "float32 [4, 64]"], ...], "options": {...}}, ...],
     "state": moments by the names of parameters, "more": what else its state_dict has}

Before an optimiser takes such a state, its options are compared with those that it has, and its
moments with those that a copy of it makes in one step on the meta device.
"""

import contextlib
import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from minipeft.io import fields
from minipeft.io.values import pack, unpack

Groups = Sequence[Mapping[str, Tensor]]  # the parameters of each group, by name
_OF_GROUP = ("params", "param_names")  # what stands for the parameters in a group
_OF_SCHEDULERS = {  # what schedulers add to a group's options
    "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr",
}  # fmt: skip
_BESIDE = ("state", "param_groups")
_TRIED = ("torch", "transformers")  # whose step() may be called: it does nothing but a step
_PACKED = fields.Kind("an object", lambda value: isinstance(value, dict))
_PAIRS = fields.list_of(
    fields.Kind("a name and a form", lambda pair: fields.NAMES.fits(pair) and len(pair) == 2)  # type: ignore[arg-type]
)
_TABLE = {
    "class": fields.TEXT, "state": _PACKED, "more": _PACKED,
    "groups": fields.list_of(fields.Kind("a group", lambda v: isinstance(v, dict)
                             and _PAIRS.fits(v.get("parameters")) and "options" in v)),
}  # fmt: skip


def kind_of(value: object) -> str:
    """The full name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def form(tensor: Tensor) -> str:
    """Dtype and shape, as in "float32 [4, 64]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def same_names(what: str, there: Set[Any], here: Set[Any]) -> None:
    """Raise ValueError unless a file has the names that are here."""
    if wrong := sorted(there ^ here, key=str):
        side = "are in the file alone" if wrong[0] in there else "are not in the file"
        raise ValueError(
            f"{what} have other names: {wrong[:3]} {side} ({len(wrong)} in all); is it the state "
            "of another adapter or optimiser?"
        )


def unpack_dict(what: str, found: object, tensors: dict[str, Tensor]) -> dict[Any, Any]:
    """A dict that `pack` wrote; its tensors are taken out of `tensors`.

    Raises:
        ValueError: it is something else.
    """
    value = unpack(found, tensors)
    if type(value) is not dict:
        raise ValueError(f"{what} is {str(value)[:60]}; expected a dict")
    return value


def described(optimizer: Optimizer, groups: Groups, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An optimiser as JSON, with names in the place of numbers; its tensors go into `tensors`."""
    found = optimizer.state_dict()
    numbered: dict[object, str] = {}
    written: list[dict[str, Any]] = []
    for group, named in zip(found["param_groups"], groups, strict=True):
        numbered |= dict(zip(group["params"], named, strict=True))
        options = {key: value for key, value in group.items() if key not in _OF_GROUP}
        written.append({
            "parameters": [[name, form(p)] for name, p in named.items()],
            "options": pack(options, f"groups/{len(written)}", tensors),
        })  # fmt: skip
    state = {numbered[number]: value for number, value in found["state"].items()}
    more = {key: value for key, value in found.items() if key not in _BESIDE}
    return {
        "class": kind_of(optimizer), "groups": written,
        "state": pack(state, "optimizer", tensors), "more": pack(more, "more", tensors),
    }  # fmt: skip


def checked(
    saved: Mapping[str, Any],
    tensors: dict[str, Tensor],
    optimizer: Optimizer,
    groups: Groups,
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """The state dict that `take` takes, with this optimiser's numbers of its parameters.

    `found` is this optimiser's own state dict.  Moments of an optimiser that is neither torch's nor
    transformers' have no check: its step may do more than step.

    Raises:
        ValueError: another class, other groups, parameters or options, other moments than this
            optimiser makes.
    """
    fields.check("optimizer", saved, _TABLE, needed=_TABLE)
    if saved["class"] != (here := kind_of(optimizer)):
        raise ValueError(f"the state of a {saved['class']}; this optimiser is a {here}")
    if len(saved["groups"]) != len(groups):
        raise ValueError(
            f"the optimiser had {len(saved['groups'])} groups of parameters; this one has "
            f"{len(groups)}"
        )
    state = unpack_dict("the optimiser's state", saved["state"], tensors)
    more = unpack_dict("the rest of the optimiser", saved["more"], tensors)
    same_names("entries of the optimiser", more.keys(), found.keys() - set(_BESIDE))
    numbered: dict[str, object] = {}
    options: list[dict[str, Any]] = []
    for index, (group, named) in enumerate(zip(saved["groups"], groups, strict=True)):
        what, mine = f"group {index} of the optimiser", found["param_groups"][index]
        _check_parameters(what, group["parameters"], named)
        numbered |= dict(zip(named, mine["params"], strict=True))
        options.append(unpack_dict(f"options in {what}", group["options"], tensors))
        _check_options(f"options in {what}", options[-1], mine)
    if strange := state.keys() - numbered.keys():
        raise ValueError(f"the state of {sorted(strange, key=str)[0]}, which is in no group")
    expected = _after_a_step(optimizer, groups, options)
    for name, moments in state.items():
        _check_moments(name, moments, expected.get(name))
    return {
        **more, "state": {numbered[name]: moments for name, moments in state.items()},
        "param_groups": [
            {**its, **{key: mine[key] for key in _OF_GROUP if key in mine}}
            for its, mine in zip(options, found["param_groups"], strict=True)
        ],
    }  # fmt: skip


def take(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict in every bit: torch casts moments to the dtype of their parameter."""
    optimizer.load_state_dict(state)
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(group["params"], own["params"], strict=True):
            if number in state["state"]:
                loaded = optimizer.state[parameter]
                optimizer.state[parameter] = _as_saved(loaded, state["state"][number])


def _as_saved(loaded: Any, saved: Any) -> Any:
    """What was loaded, where its dtype is the saved one; on the device to which it was loaded."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(saved, dict):
        loaded.update({k: _as_saved(loaded[k], v) for k, v in saved.items() if k in loaded})
    elif (
        type(loaded) in (list, tuple) and type(loaded) is type(saved) and len(loaded) == len(saved)
    ):
        return type(loaded)(map(_as_saved, loaded, saved))
    return loaded


def _check_parameters(what: str, pairs: list[list[str]], named: Mapping[str, Tensor]) -> None:
    forms = dict(pairs)  # lists of two, by the table
    same_names(what, forms.keys(), named.keys())
    if len(forms) != len(pairs):
        raise ValueError(f"{what} has a parameter twice")
    for name, parameter in named.items():
        if forms[name] != (here := form(parameter)):
            raise ValueError(f"{name} was {forms[name]}, and is {here} here")


def _check_options(what: str, there: Mapping[Any, Any], group: Mapping[str, Any]) -> None:
    """Raise ValueError unless a group's options are those that it has here, of the same kinds."""
    here = {key: value for key, value in group.items() if key not in _OF_GROUP}
    same_names(what, there.keys() - _OF_SCHEDULERS, here.keys() - _OF_SCHEDULERS)
    for key in there.keys() & here.keys():
        if not _alike(there[key], here[key]):
            raise ValueError(
                f"{what}: {key} is {there[key]!r:.60} there, and {here[key]!r:.60} here; expected "
                "a value of the same kind"
            )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) or (isinstance(value, Tensor) and value.numel() == 1)


def _alike(there: Any, here: Any) -> bool:
    """Whether an option may have become `there` where it is `here`; None is not chosen yet."""
    if here is None:
        return there is None or isinstance(there, bool) or _is_number(there)
    if there is None:
        return isinstance(here, bool)  # foreach, fused
    if type(here) in (list, tuple):
        fits = type(there) is type(here) and len(there) == len(here)
        return fits and all(map(_alike, there, here))
    return type(there) is type(here) or (_is_number(there) and _is_number(here))


def _after_a_step(
    optimizer: Optimizer, groups: Groups, options: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The moments that the optimiser makes of each parameter, by name, where that can be tried.

    A copy of it makes a step with these options on the meta device, where tensors have no bytes.
    Some cannot finish it there (they read a number); moments that they made before count.
    """
    if type(optimizer).step.__module__.split(".")[0] not in _TRIED:
        return {}
    stands: dict[str, Tensor] = {}
    memo: dict[int, Any] = {id(optimizer.state): defaultdict(dict)}  # its own moments stay out
    made = memo[id(optimizer.state)]
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for named in groups:
            for name, parameter in named.items():
                stand = torch.empty_like(parameter.detach(), device="meta")
                stand.grad = torch.empty_like(stand)
                stands[name] = memo[id(parameter)] = stand
        trial = copy.deepcopy(optimizer, memo)
        for group, its in zip(trial.param_groups, options, strict=True):
            group.update(its)
            group.update({k: False for k in ("foreach", "fused", "capturable") if k in its})
        trial.step()
    return {name: made[stand] for name, stand in stands.items() if stand in made}


def _check_moments(name: str, moments: Any, expected: Mapping[str, Any] | None) -> None:
    """Raise ValueError unless a parameter's moments are those that the optimiser makes."""
    if not isinstance(moments, dict):
        raise ValueError(f"the moments of {name} are {str(moments)[:60]}; expected a dict")
    if expected is None:
        return
    same_names(f"the moments of {name}", moments.keys(), expected.keys())
    for key, mine in expected.items():
        value = moments[key]
        if isinstance(mine, Tensor) and mine.dim():
            fits = isinstance(value, Tensor) and value.shape == mine.shape
            fits = fits and value.is_floating_point() == mine.is_floating_point()
        else:
            fits = _is_number(value) or not _is_number(mine)
        if not fits:
            found, own = (form(v) if isinstance(v, Tensor) else f"{v!r:.60}" for v in (value, mine))
            raise ValueError(f"{key} of {name} is {found}; this optimiser's is {own}")
