"""What a case must do before and after training, so that its figures are given at all."""

import math
import zlib
from contextlib import nullcontext
from typing import Any

import torch

from minipeft.inject import freeze
from minipeft.measure.figures import is_4_bit
from minipeft.measure.loss import Loss, checked
from minipeft.measure.methods import Prepared


class GateError(Exception):
    """A case does not compute what it should; it gets no figures."""


def loss_of_the_base(loss: Loss, seed: int, model: Any, batch: Any) -> float:
    """The loss before anything is added; statistics stand still, as they do below adapters.

    Raises:
        LossError: it is not one finite number.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    freeze(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        found = float(checked(loss(model, batch)))
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return found


def _loss_now(loss: Loss, seed: int, model: Any, batch: Any) -> float:
    torch.manual_seed(seed)  # a model's own dropout draws the same each time
    with torch.no_grad():
        return float(loss(model, batch))


def gate_before(
    loss: Loss, seed: int, prepared: Prepared, batch: Any, untouched: float, *, starts_at_base: bool
) -> None:
    """Off, an adapter changes no bit of the loss; nor does it untrained, with B = 0.

    `untouched` is the loss of the base before; with 4-bit layers the base has changed.  A prefix
    does change the loss, untrained.  What cannot be switched off is not compared.
    """
    own = _loss_now(loss, seed, prepared.model, batch)
    with prepared.adapters_off():
        without = _loss_now(loss, seed, prepared.model, batch)
    rounded = any(map(is_4_bit, prepared.model.modules()))
    if prepared.adapters_off is not nullcontext and not rounded and without != untouched:
        raise GateError(f"loss {untouched} before, {without} with the adapter off")
    if not math.isfinite(own):
        raise GateError(f"loss {own} before training")
    if prepared.adapters_off is nullcontext:  # nothing to compare with
        return
    if starts_at_base != (own == without):
        raise GateError(
            f"loss {own} with an untrained adapter, {without} without; where it does not start at "
            "the base, give Method(..., starts_at_base=False)"
        )


def gate_gradients(model: Any) -> None:
    """After a backward: a finite gradient for everything that trains, none for the rest."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            if parameter.grad is not None:
                raise GateError(f"{name} is frozen and got a gradient")
        elif parameter.grad is None:
            raise GateError(
                f"{name} trains and got no gradient: the loss does not use it; freeze it"
            )
        elif not bool(parameter.grad.isfinite().all()):
            raise GateError(f"{name} got no finite gradient")


def checksum(model: Any) -> int:
    """crc32 over every frozen parameter."""
    value = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            value = zlib.crc32(data.numpy().data, value)
    return value
