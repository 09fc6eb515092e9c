"""Tensors that no file holds, of a model that was built on the meta device.

Rotary frequencies, causal masks and position numbers are computed in a constructor; on the meta
device that leaves no values.  Hugging Face models compute them again in `_init_weights(module)`, of
the module itself or of one around it.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn


def _initializations(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(who initialises, what): the module of this path, then those around it, inside out."""
    parts = path.split(".") if path else []
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]
    for number, module in enumerate(around):
        owner = next((m for m in around[number:] if callable(getattr(m, "_init_weights", None))),
                     None)  # fmt: skip
        if owner is not None:
            yield owner, module


def _computed(
    model: nn.Module, path: str, metas: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The values that the model computes for these tensors of one module; others are not there.

    Each is computed over two different fillings: values that are equal after both were computed.
    """
    module = model.get_submodule(path)
    found: dict[str, Tensor] = {}
    for owner, whole in _initializations(model, path):
        filled: list[dict[str, Tensor | None]] = []
        if whole is not module and not all(p.is_meta for p in model.parameters()):
            break  # it would initialise values that are there
        for filling in (0, 1):
            places = {own: module._parameters if own in module._parameters else module._buffers
                      for own in metas}  # fmt: skip
            try:
                for own, meta in metas.items():
                    value = torch.full_like(meta, filling, device=device, requires_grad=False)
                    given = nn.Parameter(value, False) if own in module._parameters else value
                    places[own][own] = given  # type: ignore[assignment]
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    owner._init_weights(whole)  # type: ignore[operator]
                filled.append({own: place[own] for own, place in places.items()})
            finally:
                for own, meta in metas.items():
                    places[own][own] = meta  # type: ignore[assignment]
        for own in metas:
            first, second = (values[own] for values in filled)
            there = own not in found and first is not None and second is not None
            if there and torch.equal(first, second):  # type: ignore[arg-type]
                found[own] = first.detach()  # type: ignore[union-attr]
        if len(found) == len(metas):
            break
    return found


def restore_buffers(
    model: nn.Module, device: torch.device, also: Collection[str] = ()
) -> dict[str, Tensor]:
    """Values for every meta buffer that no state dict holds; the model is not changed.

    `also` names tensors of the state dict that the model computes as well.

    Raises:
        ValueError: a tensor whose values nothing computes, or a tensor on the meta device that is
            neither parameter nor buffer.
    """
    for path, module in model.named_modules():
        loose = [n for n, v in vars(module).items() if isinstance(v, Tensor) and v.is_meta]
        if loose:
            raise ValueError(
                f"{path or type(model).__name__}: {loose} are on the meta device and no buffers; "
                "build the model with its buffers on a real device"
            )
    restored: dict[str, Tensor] = {}
    for path, module in list(model.named_modules()):
        before = f"{path}." if path else ""
        own = {**module._buffers, **module._parameters}
        wanted = [*sorted(module._non_persistent_buffers_set),
                  *(name for name in own if before + name in also)]  # fmt: skip
        metas = {n: v for n in wanted if (v := own.get(n)) is not None and v.is_meta}
        found = _computed(model, path, metas, device) if metas else {}
        for name in metas:
            if name not in found:
                raise ValueError(
                    f"{before}{name}: a buffer that no checkpoint holds and nothing computes "
                    "again; build the model with this buffer on a real device"
                )
            restored[before + name] = found[name]
    return restored
