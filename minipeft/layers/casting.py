"""A trained copy in another dtype than its original: inputs cast in, outputs cast back.

A 16-bit number moves only by steps of its last bit, which an optimiser's steps seldom reach, so
copies of 16-bit modules train in float32.  The model around them must not notice:

    x, bfloat16 -> float32 -> copy -> float32 -> bfloat16, as the original would give it

The dtype that the original would give is found by calling it, once for each combination of dtypes,
mode and autocast.  It is not called with arguments that a call may change (a cache of keys): what
the copy then gives in its own dtype is rounded to the original's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.products import autocast_is_on

Dtypes = tuple[torch.dtype, ...]
# a list or dictionary, the new one that was made of it, and the new one's first items
Made = list[tuple[Any, Any, Any]]


def mapped(change: Callable[[Tensor], Tensor], value: Any, made: Made | None = None) -> Any:
    """`value` with `change` of every floating-point tensor in it, however nested.

    Tensors are looked for in tuples, lists, mappings and data classes.  A value that holds none
    stays the same object, so that a module can go on filling a list that it was given.  `made`
    gets an entry for each new list or dictionary, for `written_back`.
    """
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if not _holds_tensors(value):
        return value
    if isinstance(value, tuple | list):
        parts = [mapped(change, part, made) for part in value]
        new: Any = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if made is not None and isinstance(value, list):
            made.append((value, new, list(new)))
        return new
    if isinstance(value, Mapping):
        items: Any = {key: mapped(change, part, made) for key, part in value.items()}
        # an output of a transformers model is a mapping and a data class
        new = type(value)(**items) if dataclasses.is_dataclass(value) else type(value)(items)  # type: ignore[call-arg]
        if made is not None:
            made.append((value, new, items))
        return new
    names = [field.name for field in dataclasses.fields(value) if field.init]
    return dataclasses.replace(
        value, **{name: mapped(change, getattr(value, name), made) for name in names}
    )


def written_back(made: Made) -> None:
    """Put into the lists and dictionaries that were given what a call put into the new ones."""
    for given, new, first in made:
        if isinstance(given, list):
            old = {id(item): before for item, before in zip(first, given, strict=True)}
            given[:] = [old.get(id(item), item) for item in new]
            continue
        for key in [key for key in given if key not in new]:
            del given[key]
        for key, item in new.items():
            if key not in first or item is not first[key]:
                given[key] = item


def is_plain(value: Any) -> bool:
    """Whether `value` holds tensors, numbers and strings alone, so that it can be copied."""
    if isinstance(value, tuple | list):
        return all(is_plain(part) for part in value)
    if isinstance(value, Mapping):
        return all(is_plain(part) for part in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(is_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init)
    kinds = Tensor | bool | int | float | complex | str | bytes | torch.dtype | torch.device
    return value is None or isinstance(value, kinds)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    if isinstance(value, tuple | list):
        return any(_holds_tensors(part) for part in value)
    if isinstance(value, Mapping):
        return any(_holds_tensors(part) for part in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return any(_holds_tensors(getattr(value, name)) for name in names)
    return False


def dtypes_in(value: Any) -> Dtypes:
    """The dtypes of the floating-point tensors in `value`, in the order of `mapped`."""
    found: list[torch.dtype] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.dtype)
        return tensor

    mapped(note, value)
    return tuple(found)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it has 16 bits; others as they are."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rounded_like(module: nn.Module, original: nn.Module) -> nn.Module:
    """The module, whose parameters and buffers now have the dtypes of the original's."""
    for mine, its in (*zip(module.parameters(), original.parameters(), strict=True),
                      *zip(module.buffers(), original.buffers(), strict=True)):  # fmt: skip
        if mine.dtype != its.dtype:
            mine.data = mine.data.to(its.dtype)
    return module


class CastCall:
    """Calls a copy with inputs and outputs in the original's dtypes, and remembers these.

    A copy that has the original's dtypes itself is called directly.
    """

    def __init__(self) -> None:
        self.given: dict[Any, Dtypes] = {}

    def __call__(
        self, copy: nn.Module, original: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """What `copy(*args, **kwargs)` computes, in the dtypes of `original(*args, **kwargs)`."""
        pairs = zip(original.parameters(), copy.parameters(), strict=True)
        changed = {its.dtype: mine.dtype for its, mine in pairs if its.dtype != mine.dtype}
        if not changed:
            return copy(*args, **kwargs)
        known = is_plain((args, kwargs))
        wanted = self._outputs(original, tuple(changed.items()), args, kwargs) if known else ()

        def cast_in(tensor: Tensor) -> Tensor:
            return tensor.to(changed.get(tensor.dtype, tensor.dtype))

        made: Made = []
        own, (args, kwargs) = kwargs, mapped(cast_in, (args, kwargs), made)
        out = copy(*args, **kwargs)
        if made and not torch.compiler.is_compiling():
            written_back([entry for entry in made if entry[0] is not own])
        left = list(wanted)
        if not known or len(left) != len(dtypes_in(out)):  # a random number of outputs, say
            back = {mine: its for its, mine in changed.items()}
            return mapped(lambda tensor: tensor.to(back.get(tensor.dtype, tensor.dtype)), out)
        return mapped(lambda tensor: tensor.to(left.pop(0)), out)

    def _outputs(
        self, original: nn.Module, changed: Any, args: Any, kwargs: dict[str, Any]
    ) -> Dtypes:
        device = next(original.parameters()).device
        if torch.compiler.is_compiling():  # the graph keeps only the dtypes of this call
            return _dtypes_of_call(original, args, kwargs)
        autocast = torch.get_autocast_dtype(device.type) if autocast_is_on(device) else None
        key = (changed, dtypes_in((args, kwargs)), autocast, original.training)
        if key not in self.given:
            with _random_numbers_kept(device):
                self.given[key] = _dtypes_of_call(original, args, kwargs)
        return self.given[key]


def _random_numbers_kept(device: torch.device) -> Any:
    """A context that leaves random generators as they were: later dropout draws the same."""
    on_gpu = device.type in ("cuda", "xpu")
    kind = device.type if on_gpu else "cuda"
    return torch.random.fork_rng([device.index or 0] if on_gpu else [], device_type=kind)


def _dtypes_of_call(original: nn.Module, args: Any, kwargs: dict[str, Any]) -> Dtypes:
    """The dtypes of what the original returns; its buffers and the arguments do not change."""
    buffers = {name: buffer.clone() for name, buffer in original.named_buffers()}
    args, kwargs = mapped(lambda tensor: tensor.detach().clone(), (args, kwargs))
    if not torch.compiler.is_compiling():
        args, kwargs = deepcopy((args, kwargs))  # lists without tensors are not copied yet
    with torch.no_grad():
        if buffers:
            return dtypes_in(torch.func.functional_call(original, buffers, args, kwargs))
        return dtypes_in(original(*args, **kwargs))
