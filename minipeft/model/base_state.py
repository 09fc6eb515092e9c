"""The base's own tensors of a model that has adapters: out of it, and into it.

    state = base_state_dict(model)          names as the plain model had them
    load_base_state_dict(model, state)      a checkpoint of the plain model into the wrapped one

Adapter layers move a base's tensors to other names (`0.base.weight`), so torch's own
`load_state_dict(strict=False)` finds none of a plain checkpoint's names and says nothing.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from minipeft.adapters.plain_names import PlainNames
from minipeft.adapters.protocol import innermost, is_adapter, is_packed
from minipeft.adapters.sharded import agreed, resharded
from minipeft.adapters.state import (
    checked_state,
    copy_state,
    named_adapters,
    refuse_merged,
    understood,
)


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the adapters, under the names that the plain model had.

    Detached and not copied; shards of `fully_shard` stay shards, as in `state_dict`.
    """
    return {key: value.detach() if isinstance(value, Tensor) else value
            for key, value in _own_state(model).items()}  # fmt: skip


def load_base_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True
) -> tuple[list[str], list[str]]:
    """Copy a plain model's state dict into the bases of a model with adapters.

    The inverse of `base_state_dict`.  Names are those of the plain model; they may have the parts
    that torch's wrappers add (`_orig_mod.`, `module.`).  Everything is checked before the first
    tensor is copied.  Floating-point values take the model's dtype.  A tensor that the model has
    under two names (tied embeddings) may be given under one.  Returns (missing, unexpected) keys,
    which are empty if `strict`.  Adapters stay as they are.

    Raises:
        ValueError: a missing or unexpected name (if strict), another shape or kind of numbers, two
            values for one tensor; a dense weight for a 4-bit layer, strict or not (load it before
            you quantise, or load the state of a model with the same 4-bit layers); a merged
            adapter, or a tensor on the meta device.  Nothing has been copied then.

    >>> import torch
    >>> from minipeft import inject_lora
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> plain = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    >>> inject_lora(model, ["0"], rank=2)
    ['0']
    >>> load_base_state_dict(model, plain)
    ([], [])
    """
    caller, mesh = "load_base_state_dict", resharded(model)
    with agreed(caller, mesh):
        refuse_merged(caller, named_adapters(model))
        own = _own_state(model)
        given = understood(caller, state, own)
        packed = {name for name, module in plain_modules(model).items() if is_packed(module)}
        for key in given:
            place, _, part = key.rpartition(".")
            if key not in own and place in packed and part == "weight":
                raise ValueError(
                    f"{caller}: {key} is a dense weight, and {place!r} holds 4-bit codes; load the "
                    "checkpoint before quantize_model, or give the state of a 4-bit model"
                )
        held = {id(own[key]) for key in given if key in own}
        missing = [key for key, value in own.items() if id(value) not in held]
        chosen, unexpected = checked_state(caller, own, given, missing, strict=strict)
    copy_state(caller, mesh, own, chosen)
    return missing, unexpected


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """The base's entries of the state dict themselves, by their plain names."""
    places = _Places(model)
    found = ((places.plain(key), value) for key, value in model.state_dict(keep_vars=True).items())
    return {key: value for key, value in found if key is not None}


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by the names that they have without adapters; "" is the model."""
    places, found = _Places(model), {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (plain := places.plain(name)) is not None:
            found[plain] = innermost(module)
    return found


class _Places:
    """From the names in a model with adapters to those in the plain one."""

    def __init__(self, model: nn.Module) -> None:
        self._names = PlainNames(model)
        self._wrappers: set[str] = set()  # adapters that have a base
        self._owned: set[str] = set()  # parameters of adapters
        for name, module in model.named_modules(remove_duplicate=False):
            if is_adapter(module):
                path = f"{name}." if name else ""
                self._owned |= {self._names.plain(path + n) for n in module.adapter_parameters()}
                if hasattr(module, "base"):
                    self._wrappers.add(self._names.plain(name))

    def plain(self, name: str) -> str | None:
        """The name in the plain model; None for what is an adapter's own.

        All that an adapter holds beside its base is its own.
        """
        name, path, kept = self._names.plain(name), "", []
        if name in self._owned:
            return None
        for part in name.split(".") if name else ():
            if path not in self._wrappers:
                kept.append(part)
            elif part != "base":
                return None
            path = f"{path}.{part}" if path else part
        return ".".join(kept)
