"""Derivatives of the operators that multiply by a 4-bit weight, in every mode that PyTorch has.

Each operator is linear in the arguments that have derivatives: y = x W^T + b.  So its derivatives
are operators again, and nothing dense is kept:

    backward       dx = dy W                   the gradients beside the plain function (qlora.py)
    forward mode   ty = tx W^T + tb            dual numbers, torch.func.jvp, jacfwd
    vmap           rows of the batch are rows of x: one product; batched codes go one by one

torch.library.register_autograd knows backward alone: it would drop a tangent without a word, and
torch.func would refuse the operator.  So the operators get an autograd implementation here, and
`direct`, what `ops.call` does outside of torch.compile.  A call through torch's dispatcher takes
as long as two of nn.Linear(64, 64); where nobody listens there (ops.nobody_listens), `direct` calls
a row of the table itself.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from minipeft.ops import LIBRARY, OPERATORS, Packed, call, flat, nobody_listens

Arguments = Sequence[Any]


class Forgotten(NamedTuple):
    """A tensor of which only the shape is kept for backward."""

    shape: torch.Size


def _keep(ctx: Any, linear: Arguments, args: Arguments) -> list[Tensor | None]:
    """Keep the arguments for backward; of the linear ones only their shapes."""
    tensors = [a if isinstance(a, Tensor) and i not in linear else None for i, a in enumerate(args)]
    ctx.save_for_backward(*tensors)
    ctx.rest = [
        (Forgotten(a.shape) if i in linear else None) if isinstance(a, Tensor) else a
        for i, a in enumerate(args)
    ]
    return tensors


def _kept(ctx: Any) -> list[Any]:
    """What `_keep` kept: the operator's arguments, linear ones as `Forgotten`."""
    pairs = zip(ctx.saved_tensors, ctx.rest, strict=True)
    return [rest if tensor is None else tensor for tensor, rest in pairs]


def _batched(name: str, count: int) -> Callable[..., tuple[Any, Any]]:
    """The vmap rule of the operator whose first `count` arguments have a leading axis of rows."""

    def one_by_one(size: int, dims: Arguments, args: Arguments) -> tuple[Any, Any]:
        outs: list[Any] = [
            call(name, *OPERATORS[name].grouped([a.select(d, i) if isinstance(d, int) else a
                                                for a, d in zip(args, dims, strict=True)]))
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
            return call(name, *OPERATORS[name].grouped([*rows, *args[1:]])), 0
        rows_ = [a.flatten(0, 1) for a in rows]  # one row, one expert
        out = call(name, *OPERATORS[name].grouped([*rows_, *args[count:]]))
        return out.view(*rows[0].shape[:2], -1), 0

    return rule


def _functions(name: str, vmap_rule: Any) -> tuple[Any, Any]:
    """Two autograd functions that compute the operator: one for backward, one for every mode.

    The first takes a 4-bit weight as one argument and calls a row of the table; training uses it.
    The second takes torch's arguments and has the form that torch.func asks for, which alone costs
    three and a half calls of nn.Linear(64, 64).
    """
    defined, operator = OPERATORS[name], getattr(torch.ops.minipeft, name).default
    rules, names = defined.gradients, [argument.name for argument in operator._schema.arguments]
    places = tuple(names.index(argument) for argument in rules)

    def gradients(ctx: Any, grad: Tensor, arguments: list[str], given: Arguments) -> Any:
        named = defined.named(given)
        return tuple([
            rules[argument](grad, named) if needed and argument in rules else None
            for argument, needed in zip(arguments, ctx.needs_input_grad, strict=True)
        ])  # fmt: skip

    def tangent(ctx: Any, tangents: Arguments) -> Tensor:
        args = _kept(ctx)
        shape = args[places[0]].shape
        for place in places:
            args[place] = tangents[place]
        if args[places[0]] is None:  # this one must be given
            other = next(tangents[place] for place in places if tangents[place] is not None)
            args[places[0]] = other.new_zeros(()).expand(shape)
        return call(name, *defined.grouped(args))

    at, linear = defined.arguments.index("weight"), [defined.arguments.index(n) for n in rules]
    others = [defined.arguments.index(n) for n in defined.tensors if n not in rules]

    def forward(ctx: Any, *given: Any) -> Any:
        rest, (packed, absmax, block_size, *scales) = list(given), given[at]
        ctx.save_for_backward(packed, absmax, *scales, *[given[place] for place in others])
        for place in linear:
            rest[place] = None if given[place] is None else Forgotten(given[place].shape)
        for place in others:
            rest[place] = None
        rest[at], ctx.rest = block_size, rest
        return defined.compute(given)

    def backward(ctx: Any, grad: Tensor) -> Any:
        given, (packed, absmax, scale, offset, codebook, *kept) = ctx.rest.copy(), ctx.saved_tensors
        given[at] = Packed(packed, absmax, given[at], scale, offset, codebook)
        for place, tensor in zip(others, kept, strict=True):
            given[place] = tensor
        return gradients(ctx, grad, defined.arguments, given)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = types.new_class(
        name, (torch.autograd.Function,), {}, lambda own: own.update(methods)
    )

    class Everywhere(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return operator(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Arguments, output: Tensor) -> None:
            tensors = _keep(ctx, places, inputs)
            ctx.save_for_forward(*tensors)  # references: it costs no memory

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return gradients(ctx, grad, names, defined.grouped(_kept(ctx)))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return tangent(ctx, tangents)

        vmap = staticmethod(vmap_rule)

    return function, Everywhere


def _register(name: str) -> None:
    defined = OPERATORS[name]
    operator = getattr(torch.ops.minipeft, name).default
    vmap_rule = _batched(name, defined.row_arguments)
    torch.library.register_vmap(f"minipeft::{name}", vmap_rule, lib=LIBRARY)
    in_transforms: Any = operator
    backward: Any = None
    linear = [defined.arguments.index(argument) for argument in defined.gradients]
    if linear:
        backward, everywhere = _functions(name, vmap_rule)
        in_transforms = everywhere.apply
        names = [argument.name for argument in operator._schema.arguments]
        places = [names.index(argument) for argument in defined.gradients]

        def autograd(keyset: Any, *args: Any) -> Any:
            given = [x for place in places if (x := args[place]) is not None]
            if any(unpack_dual(x).tangent is not None for x in given) or (  # type: ignore[no-untyped-call]
                torch.is_grad_enabled() and any(x.requires_grad for x in given)
            ):
                return everywhere.apply(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)

    def direct(*given: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return in_transforms(*flat(given))
        weight = () if defined.weight is None else given[defined.weight]
        if not nobody_listens(defined.first(given), given, weight):
            return operator(*flat(given))
        if not torch.is_grad_enabled():
            return defined.compute(given)
        for place in linear:
            if (x := given[place]) is not None and x.requires_grad:
                return backward.apply(*given)
        with torch.no_grad():  # no gradient goes through the decoding of a weight
            return defined.compute(given)

    defined.direct = direct


def register() -> None:
    """Tell torch the derivatives of all operators; once, after all of them are defined."""
    for name in (name for name, defined in OPERATORS.items() if defined.arguments):
        _register(name)
