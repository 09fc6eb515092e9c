"""Whether a module computes the formula of its kind: each module at hand is tried once.

A weight can be folded, or rounded to 4 bits, only where the module's forward is

    linear layer      x W^T + b
    Conv1D            x W + b, transformers' layout
    embedding         rows of the table, times `embed_scale` where it has one
    convolution       torch's own, by the module's settings
    attention         nn.MultiheadAttention's
    other modules     something to which the bias is added, if only the bias changes

A module of torch's own class, without hooks, needs no trial: its code is the formula.  Any other
module is copied, and the copy computes one small batch in eval mode, in float64 (or in float32, if
it does not take float64).  The copy gets another weight and bias: a mask or a bound that changes
nothing for the present weight shows then.  All else that the module holds keeps its values.
"""

import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapters.products import without_autocast
from minipeft.adapters.protocol import has_stored_weight, is_conv1d, is_packed, linear_shape, trials
from minipeft.adapters.trial_copy import copy_for_trial

_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TOLERANCE = 1e-5  # of the largest value in a row: float32 inside is allowed, 16 or 8 bits are not
# as they are when this is imported: somebody may put others into the classes later
_CALL = tuple(getattr(nn.Module, name) for name in ("__call__", "_call_impl", "__getattr__"))
_LINEAR, _EMBEDDING = nn.Linear.forward, nn.Embedding.forward
_ATTENTION = nn.MultiheadAttention.forward
_CONVOLVE = {kind: (kind.forward, kind._conv_forward) for kind in _CONVOLUTIONS}
_NORMS = (nn.LayerNorm.forward, nn.GroupNorm.forward, nn.BatchNorm1d.forward,
          nn.InstanceNorm1d.forward)  # fmt: skip


class _Trial(NamedTuple):
    """How a kind of module is tried."""

    formula: str  # in words
    inputs: list[tuple[int, ...]]  # shapes of inputs, the next where one raises; () for row numbers
    expected: Callable[[Any, Tensor], Tensor]  # of the copy and its input
    row_axis: int  # from this axis on, an output belongs to one row of the input
    own: bool  # the class computes the formula by torch's own code


def why_not_formula(
    module: nn.Module, *, hooks: bool = True, scaled: bool = True, bias_only: bool = False
) -> str | None:
    """Why the module does not compute the formula of its kind; None if it does.

    With `hooks` the call of the module is compared, without them its forward alone.  With `scaled`
    False an embedding must not scale its rows.  `bias_only` asks of a module of no known kind
    whether it adds its bias at the end.
    """
    trial = _trial(module, scaled) or (_bias_trial(module) if bias_only else None)
    if trial is None:
        return f"{type(module).__name__} is none of the kinds whose formula is known"
    if trial.own and _is_called_plainly(module, hooks):
        return None
    found = _tried(module, trial, hooks)
    return None if found is None else f"{_named(module, trial.own, hooks)} {found}"


def why_not_foldable(module: nn.Module) -> str | None:
    """Why no adapter can be folded into this module (below all adapters); None if one can.

    A module that holds packed codes is believed, unless hooks may change its output.
    """
    if getattr(module, "original", None) is not None:  # ours, around a parameter
        return None
    holds_codes = is_packed(module)
    if holds_codes:
        touched = _has_hooks(module) or "forward" in vars(module)
        return why_not_formula(module) if touched and _trial(module, True) else None
    if _trial(module, True) is None:
        has_bias = isinstance(module._parameters.get("bias"), Tensor)
        return why_not_formula(module, bias_only=True) if has_bias else None
    if not isinstance(module, nn.MultiheadAttention):
        if not has_stored_weight(module):
            return (
                f"{type(module).__name__} computes its weight (weight norm, a parametrisation); "
                "take that off first, with torch.nn.utils.parametrize.remove_parametrizations or "
                "torch.nn.utils.remove_weight_norm"
            )
        if reason := _why_no_weight(module):
            return reason
    return why_not_formula(module)


def check_own_weight(caller: str, module: nn.Module) -> None:
    """Raise unless this module (below all adapters) computes its formula with the weight it shows.

    For layers that call the module, and read its weight too in every forward.

    Raises:
        ValueError: the module computes something else, or its weight holds no floats.
    """
    reason = _why_no_weight(module)
    if reason is None and (_has_hooks(module) or not is_packed(module)):
        reason = why_not_formula(module)
    if reason:
        raise ValueError(
            f"{caller}: {reason}; the lengths of its weight would not be those of what it "
            "computes: use LoRA, which only adds to that"
        )


def why_not_replaceable(module: nn.Module) -> str | None:
    """Why no 4-bit layer, which computes the formula from codes, can take this module's place.

    Hooks move to the new layer, so they do not count.  A forward on the instance would be lost, as
    would what the class does only in training, and arguments beside the input.
    """
    if not has_stored_weight(module):
        return f"{type(module).__name__} computes its weight (weight norm, a parametrisation)"
    if reason := _why_no_weight(module):
        return reason
    kind = type(module)
    if "forward" in vars(module):
        return f"the forward of this {kind.__name__} was replaced on the instance (offloading?)"
    takes = inspect.signature(kind.forward).parameters
    if kind.forward not in (_LINEAR, _EMBEDDING) and len(takes) > 2:
        return f"{kind.__name__} has a forward of its own, which takes {', '.join(takes)}"
    return why_not_formula(module, hooks=False, scaled=False)


def why_no_float(weight: Tensor) -> str | None:
    """What a weight is; None for a plain tensor of 16-, 32- or 64-bit floats."""
    if weight.dtype not in _FLOATS:
        return f"{weight.dtype}, no float of 16, 32 or 64 bits"
    kind = type(weight)
    plain = kind in (Tensor, nn.Parameter) or (
        kind.__torch_function__ == nn.Parameter.__torch_function__
        and kind.__torch_dispatch__ == Tensor.__torch_dispatch__
    )
    return None if plain else f"a {kind.__name__}, no plain tensor"


def _why_no_weight(module: nn.Module) -> str | None:
    stored = module._parameters.get("weight")
    reason = None if stored is None else why_no_float(stored)
    return None if reason is None else f"the weight of this {type(module).__name__} is {reason}"


def _trial(module: nn.Module, scaled: bool) -> _Trial | None:
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention):
        size = module.embed_dim
        return _Trial("nn.MultiheadAttention's", [(3, 2, size)],
                      lambda m, x: _ATTENTION(m, x, x, x)[0], 0,
                      kind.forward is _ATTENTION)  # fmt: skip
    for base in _CONVOLUTIONS:
        if isinstance(module, base):
            size = _smallest_input(module)
            own = (kind.forward, getattr(kind, "_conv_forward", None)) == _CONVOLVE[base]
            convolve = functools.partial(_convolution, base)
            return _Trial("torch's convolution with its settings",
                          [(8, module.in_channels, *size)], convolve, 1, own)  # fmt: skip
    if _is_table(module):
        scale = getattr(module, "embed_scale", None) if scaled else None
        words = "the rows of its table" + ("" if scale is None else " times embed_scale")
        rows = functools.partial(_rows, scaled=scaled)
        own = is_packed(module) or (kind.forward is _EMBEDDING and scale is None)
        return _Trial(words, [()], rows, 2, own)
    shape = linear_shape(module)
    if shape is None:
        return None
    of_library = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    known = getattr(of_library, "forward", None) if shape.transposed else _LINEAR
    words = "x W + b" if shape.transposed else "x W^T + b"
    inputs = [(2, 4, shape.in_features), (8, shape.in_features)]
    own = is_packed(module) or kind.forward is known
    return _Trial(words, inputs, _linear, -1, own)


def _bias_trial(module: nn.Module) -> _Trial | None:
    bias = module._parameters.get("bias")
    if bias is None:
        return None
    spatial = [(8, *bias.shape, *(5,) * axes) for axes in range(4)]
    if isinstance(module, nn.modules.conv._ConvNd):  # transposed
        spatial = [(8, module.in_channels, *(5,) * len(module.kernel_size))]
    own = type(module).forward in _NORMS
    return _Trial("something to which its bias is added", spatial, _with_bias, 1, own)


def _is_table(module: nn.Module) -> bool:
    sizes = (getattr(module, name, None) for name in ("num_embeddings", "embedding_dim"))
    return isinstance(module, nn.Embedding) or (
        is_packed(module) and all(isinstance(size, int) for size in sizes)
    )


def _smallest_input(module: Any) -> list[int]:
    """Sizes of an input that every kind of padding takes."""
    kernel = zip(module.kernel_size, module.dilation, module.stride, strict=True)
    padding = (0, *module._reversed_padding_repeated_twice)
    return [max(d * (k - 1), *padding) + s + 2 for k, d, s in kernel]


def _is_called_plainly(module: nn.Module, hooks: bool) -> bool:
    """Whether calling it runs the class's forward over stored tensors, and nothing else."""
    kind = type(module)
    shadowed = (inspect.getattr_static(kind, name, None) for name in ("weight", "bias"))
    stored = any(module._parameters.get(name) is not None for name in ("weight", "bias"))
    return (
        (kind.__call__, kind._call_impl, kind.__getattr__) == _CALL
        and kind.__getattribute__ is object.__getattribute__
        and "forward" not in vars(module)
        and all(value is None for value in shadowed)
        and (stored or isinstance(module, nn.MultiheadAttention) or is_packed(module))
        and not (hooks and _has_hooks(module))
        and all(why_no_float(p) is None for p in module._parameters.values() if p is not None)
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _named(module: nn.Module, own: bool, hooks: bool) -> str:
    name = type(module).__name__
    if "forward" in vars(module):
        return f"{name} has a forward that was replaced on the instance, which"
    if not own:
        return f"{name} has a forward of its own, which"
    return f"{name} has hooks, with which it" if hooks else f"{name}"


def _tried(module: nn.Module, trial: _Trial, hooks: bool) -> str | None:
    """How the trial differs from the formula; None if it does not."""
    error: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        for shape in trial.inputs:
            try:
                with (
                    torch.inference_mode(False), torch.no_grad(),
                    torch.random.fork_rng(devices=[]), without_autocast(_device(module)),
                ):  # fmt: skip
                    off = _difference(module, trial, shape, dtype, hooks, training=False)
                    if off is None and not hooks:  # it is to be replaced, in training too
                        off = _difference(module, trial, shape, dtype, hooks, training=True)
            except Exception as raised:  # whatever a forward of somebody's own raises
                error = raised
                continue
            return None if off is None else f"is not {trial.formula} ({off})"
    message = str(error).strip().split("\n")[0][:200]
    return (
        f"is not proved to be {trial.formula}: tried with a small batch, it raises "
        f"{type(error).__name__}: {message}"
    )


def _difference(
    module: nn.Module,
    trial: _Trial,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    hooks: bool,
    *,
    training: bool,
) -> str | None:
    device = _device(module)
    generator = torch.Generator().manual_seed(0)
    made = copy_for_trial(module, dtype, device, generator, whole=not _is_table(module))
    if not hooks:
        for part in made.modules():
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                vars(part)[name] = OrderedDict()
    made.train(training)
    x = _input(made, shape, dtype, generator).to(device)
    expected = trial.expected(made, x).clone()  # first: a forward may write to its weight
    inputs = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    out = made(*inputs)
    out = out[0] if isinstance(module, nn.MultiheadAttention) else out
    if not isinstance(out, Tensor) or out.shape != expected.shape:
        what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        return f"it gives {what} where that gives {tuple(expected.shape)}"
    axis = trial.row_axis % expected.dim()
    largest = expected.abs().flatten(axis).amax(-1).view(*expected.shape[:axis], *(1,) * (
        expected.dim() - axis))  # fmt: skip
    off = (out.to(dtype) - expected).abs()
    if bool((off <= _TOLERANCE * largest).all()):
        return None
    return f"off by {off.nan_to_num(torch.inf).max():.2g}, values up to {largest.max():.2g}"


def _device(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    device = next((t.device for t in tensors), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _input(
    module: Any, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Rows of several magnitudes, the first one zero, the last one with three values alone."""
    if not shape:
        count = module.num_embeddings
        return torch.tensor([[0, count - 1, count // 2, 1 % count], [2 % count, 0, count // 3, 0]])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if not isinstance(module, nn.MultiheadAttention):
        rows = x.view(8, -1)
        rows *= torch.tensor([0, 1e-4, 1e-2, 1, 1, 30, 1e4, 1], dtype=torch.float64)[:, None]
        rows[7, 3:] = 0
    return x.to(dtype)


def _stored(module: Any, name: str) -> Any:
    """The parameter that would be written to; where there is none, what the module computes."""
    stored = module._parameters.get(name)
    return getattr(module, name, None) if stored is None else stored


def _linear(module: Any, x: Tensor) -> Tensor:
    weight = module.dequantize(x.dtype) if is_packed(module) else _stored(module, "weight")
    weight = weight.T if is_conv1d(module) else weight
    bias = _stored(module, "bias")
    return F.linear(x, weight, bias if isinstance(bias, Tensor) else None)


def _rows(module: Any, ids: Tensor, *, scaled: bool) -> Tensor:
    table = module.dequantize() if is_packed(module) else _stored(module, "weight")
    out = F.embedding(ids, table)
    scale = getattr(module, "embed_scale", None) if scaled else None
    if scale is None:
        return out
    return out * (scale.to(out.dtype) if isinstance(scale, Tensor) else scale)


def _convolution(kind: Any, module: Any, x: Tensor) -> Tensor:
    out: Tensor = _CONVOLVE[kind][1](module, x, _stored(module, "weight"), _stored(module, "bias"))
    return out


def _with_bias(module: Any, x: Tensor) -> Tensor:
    """The module with a bias of zero, and its bias added where TrainedBias adds its delta."""
    bias = module._parameters["bias"]
    module._parameters["bias"] = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    out: Tensor = module(x)
    module._parameters["bias"] = bias
    first = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    first = first or isinstance(module, nn.modules.conv._ConvNd)
    added: Tensor = bias.view(*bias.shape, *(1,) * (out.dim() - 2)) if first else bias
    return out + added


trials.update(replace=why_not_replaceable, fold=why_not_foldable)
