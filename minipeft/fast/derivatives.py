"""Derivatives of the operators that multiply by a 4-bit weight, in every mode that PyTorch has.

Each operator is linear in the arguments that have derivatives: y = x W^T + b.  So its derivatives
are operators again, and nothing dense is kept:

    backward       dx = dy W                   the gradients beside the plain function (qlora.py)
    forward mode   ty = tx W^T + tb            dual numbers, torch.func.jvp, jacfwd
    vmap           rows of the batch are rows of x: one product; batched codes go one by one

torch.library.register_autograd knows backward alone: it would drop a tangent without a word, and
torch.func would refuse the operator.  So the operators get an autograd implementation here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from minipeft.ops import LIBRARY, OPERATORS, call

Arguments = tuple[Any, ...]


class Forgotten(NamedTuple):
    """A tensor of which only the shape is kept for backward."""

    shape: torch.Size


def _keep(ctx: Any, linear: Arguments, args: Arguments) -> None:
    """Keep the arguments for backward; of the linear ones only their shapes."""
    tensors = [a if isinstance(a, Tensor) and i not in linear else None for i, a in enumerate(args)]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)  # references: it costs no memory
    ctx.rest = [
        (Forgotten(a.shape) if i in linear else None) if isinstance(a, Tensor) else a
        for i, a in enumerate(args)
    ]


def _kept(ctx: Any) -> list[Any]:
    """What `_keep` kept: the operator's arguments, linear ones as `Forgotten`."""
    pairs = zip(ctx.saved_tensors, ctx.rest, strict=True)
    return [rest if tensor is None else tensor for tensor, rest in pairs]


def _batched(name: str, count: int) -> Callable[..., tuple[Any, Any]]:
    """The vmap rule of the operator whose first `count` arguments have a leading axis of rows."""

    def one_by_one(size: int, dims: Arguments, args: Arguments) -> tuple[Any, Any]:
        outs: list[Any] = [
            call(name, *(a.select(d, i) if isinstance(d, int) else a
                       for a, d in zip(args, dims, strict=True)))
            for i in range(size)
        ]  # fmt: skip
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(torch.stack(part) for part in zip(*outs, strict=True)), (0,) * len(outs[0])

    def rule(info: Any, dims: Arguments, *args: Any) -> tuple[Any, Any]:
        if not count or any(isinstance(dim, int) for dim in dims[count:]):
            return one_by_one(info.batch_size, dims, args)
        rows = [
            a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
            for a, d in zip(args[:count], dims, strict=False)
        ]
        if count == 1:
            return call(name, *rows, *args[1:]), 0
        out = call(name, *(a.flatten(0, 1) for a in rows), *args[count:])  # one row, one expert
        return out.view(*rows[0].shape[:2], -1), 0

    return rule


def _functions(name: str, linear: dict[int, Any], vmap_rule: Any) -> tuple[Any, Any]:
    """Two autograd functions that compute the operator: one for backward, one for every mode.

    `linear` has the gradient of each place that may have one.  Training uses the first function.
    The second has the form that torch.func asks for, and takes 30 microseconds longer to call (a
    tenth of a layer of 64 x 64).
    """
    operator = getattr(torch.ops.minipeft, name).default
    places = tuple(linear)

    def gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        given = OPERATORS[name].named(_kept(ctx))
        return [
            linear[place](grad, given) if place in linear and needed else None
            for place, needed in enumerate(ctx.needs_input_grad[: len(ctx.rest)])
        ]

    def tangent(ctx: Any, tangents: Arguments) -> Tensor:
        args = _kept(ctx)
        shape = args[places[0]].shape
        for place in places:
            args[place] = tangents[place]
        if args[places[0]] is None:  # this one must be given
            other = next(tangents[place] for place in places if tangents[place] is not None)
            args[places[0]] = other.new_zeros(()).expand(shape)
        return call(name, *args)

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            _keep(ctx, places, tuple(inputs))
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return (*gradients(ctx, grad), None)

    class Everywhere(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return operator(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Arguments, output: Tensor) -> None:
            _keep(ctx, places, inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return tuple(gradients(ctx, grad))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return tangent(ctx, tangents)

        vmap = staticmethod(vmap_rule)

    return Backward, Everywhere


def _register(name: str) -> None:
    defined = OPERATORS[name]
    operator = getattr(torch.ops.minipeft, name).default
    vmap_rule = _batched(name, defined.row_arguments)
    torch.library.register_vmap(f"minipeft::{name}", vmap_rule, lib=LIBRARY)
    if not defined.gradients:
        return
    names = [argument.name for argument in operator._schema.arguments]
    linear = {names.index(argument): rule for argument, rule in defined.gradients.items()}
    backward, everywhere = _functions(name, linear, vmap_rule)

    def autograd(keyset: Any, *args: Any) -> Any:
        given = [x for place in linear if (x := args[place]) is not None]
        if any(unpack_dual(x).tangent is not None for x in given):  # type: ignore[no-untyped-call]
            return everywhere.apply(*args)
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            return backward.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    defined.in_transforms = everywhere.apply


def register() -> None:
    """Tell torch the derivatives of all operators; once, after all of them are defined."""
    for name in (name for name, defined in OPERATORS.items() if defined.arguments):
        _register(name)
