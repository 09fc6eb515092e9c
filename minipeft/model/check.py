"""After the first backward: does every adapter learn?"""

from torch import nn

from minipeft.adapters.protocol import Adapter
from minipeft.adapters.state import require_adapters
from minipeft.layers.by_row import ByRow
from minipeft.model.buffers import changed_buffers, complaint


def _reason(model: nn.Module, adapter: Adapter) -> str:
    if getattr(adapter, "merged_module", None) is not None:
        return "the layer is merged (unmerge)"
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return (
            "activation checkpointing passes no gradients on where no input asks for one: use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or "
            "model.enable_input_require_grads()"
        )
    return (
        "the layer was not called, or what it computed did not reach the loss (an unused branch, "
        "torch.no_grad, a detach, a module that reads weights instead of calling the layer)"
    )


def _used_by_rows(model: nn.Module) -> tuple[set[int], set[int]]:
    """ids of the layers that rows may use, and of those that some row uses."""
    groups = [m.groups for m in model.modules() if isinstance(m, ByRow) and m.groups is not None]
    all_of_them = {id(placed.layer) for own in groups for placed in own.placed}
    return all_of_them, {id(layer) for own in groups for layer in own.used()}


def check_gradients(model: nn.Module) -> int:
    """Raise unless, after a backward, every parameter that should learn has a gradient.

    Those are the trainable parameters of the adapters that are on; where rows of a batch use
    different ones, of those that a row uses.  Call it once after the first
    `loss.backward()`.  Returns how many parameters have a gradient.  One of zeros counts: lora_a's
    is zero as long as lora_b is.

    Raises:
        ValueError: parameters without a gradient (named, with the usual reason), a gradient that
            is not finite, nothing trainable or everything off, or no backward at all; a buffer of
            the frozen base that forward has changed.
    """
    adapters = require_adapters("check_gradients", model)
    trainable = {
        f"{name}.{own}" if name else own: (adapter, parameter)
        for name, adapter in adapters.items()
        for own, parameter in adapter.adapter_parameters().items()
        if parameter.requires_grad
    }
    if not trainable:
        raise ValueError(
            "check_gradients: no adapter parameter is trainable; set requires_grad on "
            "minipeft.adapter_parameters(model)"
        )
    by_row, used = _used_by_rows(model)
    trainable = {
        n: (a, p) for n, (a, p) in trainable.items()
        if (id(a) in used if id(a) in by_row else a.enabled)
    }  # fmt: skip
    if not trainable:
        raise ValueError(
            "check_gradients: every adapter that trains is off; see use_adapters and "
            "disable_adapters"
        )
    missing = {n: a for n, (a, p) in trainable.items() if p.grad is None}
    if len(missing) == len(trainable):
        where = _reason(model, next(iter(missing.values())))
        raise ValueError(
            f"check_gradients: none of {len(trainable)} adapter parameters has a gradient; call it "
            f"after loss.backward(), before zero_grad().  If that was done: {where}"
        )
    if missing:
        by_reason: dict[str, list[str]] = {}
        for name, adapter in missing.items():
            by_reason.setdefault(_reason(model, adapter), []).append(name)
        lines = [
            f"{', '.join(names[:3])} ({len(names)} in all): {why}"
            for why, names in by_reason.items()
        ]
        raise ValueError(
            f"check_gradients: {len(missing)} of {len(trainable)} adapter parameters got no "
            "gradient; " + "; ".join(lines)
        )
    wrong = [n for n, (_, p) in trainable.items() if not bool(p.grad.isfinite().all())]  # type: ignore[union-attr]
    if wrong:
        raise ValueError(f"check_gradients: NaN or Inf in the gradients of {wrong[:5]}")
    if changed := changed_buffers(model):
        raise ValueError(f"check_gradients: {complaint(changed)}")
    return len(trainable)
