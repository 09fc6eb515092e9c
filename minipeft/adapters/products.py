"""Matrix products, and the dtype in which they are computed.

Under autocast a product has autocast's dtype.  A CPU with AVX2 alone multiplies neither bfloat16
nor float16: torch then takes a plain loop, which at 128 rows needs 16 to 290 times the time of
float32.  On such a CPU the products here convert to float32, multiply, and round the result once:
the numbers are those of other machines, up to the order of sums.  Backward then keeps float32
copies of what it multiplies.  Elsewhere they are torch's own products.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _multiplied_by(name: str) -> bool:
    """Whether oneDNN multiplies this dtype on this CPU; False if this build of torch cannot say."""
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except (AttributeError, RuntimeError):
        return False


# asked once, at import: a compiled forward reads it, and could not trace the question
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SLOW_ON_CPU = frozenset(kind for kind, name in _NAMES.items() if not _multiplied_by(name))
_warned = False


class SlowProductsWarning(UserWarning):
    """A model computes in 16 bits on a CPU that has no 16-bit products."""


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies matrices of this dtype on this device by a plain loop."""
    return dtype in SLOW_ON_CPU and device.type == "cpu"


# asked once: a layer's forward is short
_HAS_AUTOCAST = {kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "meta")}


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast would cast inputs of operations on this device."""
    kind = device.type
    known = _HAS_AUTOCAST.get(kind)
    if known is None:
        known = torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: x's own, or autocast's where that is on (not for float64)."""
    if x.dtype == torch.float64 or not autocast_is_on(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which autocast casts nothing; it costs nothing where autocast is off."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which is not called where it would give x itself: it takes a microsecond."""
    return x if x.dtype == dtype else x.to(dtype)


# these ask `is_slow` only for a dtype that may be: each call counts in a layer's short forward
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias) of tensors of one dtype."""
    if x.dtype not in SLOW_ON_CPU or not is_slow(x.dtype, x.device):
        return F.linear(x, weight, bias)
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


def addmm(out: Tensor, x: Tensor, y: Tensor, scaling: float) -> Tensor:
    """out + scaling * x y, rounded once: torch.addmm of tensors of one dtype."""
    if out.dtype not in SLOW_ON_CPU or not is_slow(out.dtype, out.device):
        return torch.addmm(out, x, y, alpha=scaling)
    return torch.addmm(out.float(), x.float(), y.float(), alpha=scaling).to(out.dtype)


callers: dict[str, Callable[..., Any]] = {}  # fast/dense.py adds its own, when it is imported


def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """layer(...); where products of 16 bits are slow, a frozen linear layer by fast/dense.py."""
    weight = layer._parameters.get("weight") if SLOW_ON_CPU else None
    if weight is None or weight.dtype not in SLOW_ON_CPU or torch.compiler.is_compiling():
        return layer(*args, **kwargs)
    return callers["dense"](layer, *args, **kwargs)


def warn_of_dense(layer: nn.Module) -> None:
    """Warn, once in a process, if a model with this layer has products that are slow and stay so.

    There is no warning of an embedding, which multiplies nothing, of codes, whose products are
    computed here, and where there is an accelerator, to which the model may be about to move.
    """
    global _warned
    weight = next(layer.parameters())
    if _warned or isinstance(layer, nn.Embedding) or not is_slow(weight.dtype, weight.device):
        return
    if torch.accelerator.is_available():
        return
    _warned = True
    kind = str(weight.dtype).removeprefix("torch.")
    warnings.warn(
        f"minipeft: this CPU has no products of {kind}.  Below adapters a frozen nn.Linear is "
        "multiplied in float32; all else (the head, attention) takes torch's loops, with tens of "
        "times that time, above all in backward.  Load the model in float32 (model.float())",
        SlowProductsWarning, stacklevel=2,
    )  # fmt: skip
