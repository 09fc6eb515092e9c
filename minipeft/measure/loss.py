"""The loss of a batch: what a model is called with, and what a loss must be."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Any, Any], Tensor]


class LossError(Exception):
    """The loss cannot be trained on with any method; the message says why."""


def own_loss(model: Any, batch: Any) -> Tensor:
    """The loss that the model itself returns: `.loss`, or ["loss"], or a number."""
    out = called(model, batch)
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise LossError(
            f"the model returns {type(out).__name__}, and no loss; give benchmark a function "
            "loss=(model, batch) -> a tensor with one number"
        )
    return loss


def called(model: Any, batch: Any) -> Any:
    """model(**batch) of a mapping, model(*batch) of a tuple or list, else model(batch)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def checked(loss: Any) -> Tensor:
    """A loss that can be trained on: a tensor with one finite floating number.

    Raises:
        LossError: it is something else; says what.
    """
    if not isinstance(loss, Tensor):
        raise LossError(f"loss is a {type(loss).__name__}; return a tensor with one number")
    if loss.numel() != 1:
        raise LossError(
            f"loss has the shape {tuple(loss.shape)}; return one number, for example its mean()"
        )
    if not loss.is_floating_point():
        raise LossError(f"loss has the dtype {loss.dtype}; return a floating number")
    if not math.isfinite(float(loss.detach())):
        raise LossError(
            f"loss is {float(loss.detach())} for the untouched model on the first batch; look at "
            "make_model, make_batch and the dtype"
        )
    return loss
