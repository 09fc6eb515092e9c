"""A frozen base keeps its buffers: running statistics stand still, other changes are reported.

A normalisation in train mode moves its running mean and variance.  So a base with frozen parameters
would change while an adapter trains, and no file would hold the base that the adapter fits.

    statistics of norms     their module stays in eval mode while the model has adapters
    any other buffer        `changed_buffers` names what a forward changed

`train_modules` trains a copy of a module, whose statistics are then part of the adapter.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import is_adapter, keeps_statistics
from minipeft.adapters.wrapper import HELD_MODE
from minipeft.inject import after_freeze, after_swap

_RECORD = "_minipeft_buffers"  # in the __dict__ of the model whose buffers were noted


def _train_held(module: nn.Module, mode: bool = True) -> nn.Module:
    """Takes the place of `module.train`: a module with frozen parameters stays in eval mode."""
    type(module).train(module, mode)
    vars(module)[HELD_MODE] = mode
    if not any(p.requires_grad for p in module.parameters(recurse=False)):
        module.training = False
    return module


def _let_go(module: nn.Module) -> None:
    if HELD_MODE in vars(module):
        vars(module).pop("train", None)
        module.training = vars(module).pop(HELD_MODE)


def _split(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that are the base's, and those that are part of an adapter."""
    parts: dict[int, nn.Module] = {}
    for holder in model.modules():
        if is_adapter(holder):
            module: nn.Module = holder  # type: ignore[assignment]
            base = getattr(module, "base", None)
            below = set(base.modules()) if isinstance(base, nn.Module) else set()
            parts |= {id(part): part for part in module.modules() if part not in below}
    return [m for m in model.modules() if id(m) not in parts], list(parts.values())


def hold(model: nn.Module) -> None:
    """If the model has adapters, let statistics of its base stand still, and note other buffers.

    Every `model.train()` sets the mode of norms, so their `train` is replaced on the instance.  A
    norm whose own parameters train follows the mode as usual.
    """
    base, parts = _split(model)
    for part in parts:
        _let_go(part)  # the copy of a held module
    if not parts:
        return
    for module in base:
        if keeps_statistics(module) and HELD_MODE not in vars(module):
            # a partial, not a bound method: pickle would look a bound method up by its name
            module.train = functools.partial(_train_held, module)  # type: ignore[method-assign]
            module.train(module.training)
    _note(model, base)


def release(model: nn.Module) -> None:
    """Give every norm its own mode back, if no adapter is left in the model."""
    if any(is_adapter(module) for module in model.modules()):
        return
    for module in model.modules():
        _let_go(module)
        vars(module).pop(_RECORD, None)


def _watched(base: list[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The base's buffers that files hold, without caches, which are made to change."""
    for module in base:
        for name, buffer in module._buffers.items():
            cache = "cache" in f"{type(module).__name__} {name}".lower()
            if buffer is not None and name not in module._non_persistent_buffers_set and not cache:
                yield module, name, buffer


def _evidence(base: list[nn.Module]) -> tuple[float, ...]:
    """The first values of some frozen parameters: others once weights were loaded or rounded.

    Shards are left out: reading one waits for the other processes, and one alone may be saving.
    """
    frozen = [p for m in base for p in m.parameters(recurse=False) if not p.requires_grad]
    frozen = [p for p in frozen if type(p) is nn.Parameter and p.numel() and not p.is_meta]
    step = max(1, len(frozen) // 32)
    return tuple(float(p.detach()[(0,) * p.dim()]) for p in frozen[::step])


def _summary(buffer: Tensor) -> tuple[float, float]:
    """Two sums over the values, to compare with later ones; on the CPU, which has float64."""
    buffer = torch.view_as_real(buffer) if buffer.is_complex() else buffer
    values = buffer.detach().cpu().double().nan_to_num().flatten()
    weights = torch.arange(1, values.numel() + 1, dtype=torch.float64)
    return float(values.sum()), float((values * weights.sqrt()).sum())


def _note(model: nn.Module, base: list[nn.Module]) -> None:
    """Note the buffers' values; a buffer noted before over the same base keeps its older note."""
    try:
        evidence = _evidence(base)
        then, noted = vars(model).get(_RECORD, (None, []))
        known = {(id(entry[0]), entry[1]): entry for entry in noted} if then == evidence else {}
        vars(model)[_RECORD] = (evidence, [
            known.get((id(module), name))
            or (module, name, buffer.shape, buffer.dtype, _summary(buffer))
            for module, name, buffer in _watched(base) if not buffer.is_meta
        ])  # fmt: skip
    except (RuntimeError, NotImplementedError, TypeError):  # shards and the like: no values here
        vars(model).pop(_RECORD, None)


def changed_buffers(model: nn.Module) -> list[str]:
    """The buffers of the base that a forward has changed since adapters were put in.

    After other weights were loaded, or for a buffer that was cast, the change counts as wanted.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for root in model.modules():
        evidence, noted = vars(root).get(_RECORD, (None, []))
        if not noted:
            continue
        base, _ = _split(root)
        if _evidence(base) != evidence:
            _note(root, base)
            continue
        for module, own, shape, dtype, summary in noted:
            now: Any = module._buffers.get(own)
            if now is None or now.is_meta or id(module) not in names:
                continue
            # not its _version: batch_norm moves means unseen
            if (now.shape, now.dtype) == (shape, dtype) and _summary(now) != summary:
                found.append(f"{names[id(module)]}.{own}".lstrip("."))
    return found


def complaint(names: list[str]) -> str:
    """The message about changed buffers: what is wrong, and what to do."""
    return (
        f"buffers of the frozen base changed in forward: {names[:3]} ({len(names)} in all); an "
        "adapter saved now fits a base that no file holds.  Name their module in train_modules, "
        "which makes them part of the adapter, or put that module in eval mode"
    )


after_swap.append(release)
after_freeze.append(hold)
