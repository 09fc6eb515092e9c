"""Derivatives of the operators that multiply by a 4-bit weight, in every mode that PyTorch has.

Each is linear in what it differentiates: y = x W^T + b.  So its derivatives are the operators
again, and nothing dense is kept:

    backward       dx = dy W                   W is decoded again; the input is not saved
    forward mode   ty = tx W^T + tb            dual numbers, torch.func.jvp, jacfwd
    vmap           rows of the batch are rows of x: one product; batched codes go one by one

torch.library.register_autograd knows backward alone: a tangent would be dropped without a word,
and torch.func refused.  So the operators get an implementation for autograd of their own, below.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from minipeft.ops import LIBRARY, SCHEMAS

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Rules:
    """How one operator is differentiated.

    `inputs` are the places of the arguments that may have a derivative.  `save` keeps on a context
    what the two others need; both get None for a derivative that is not there.
    """

    inputs: tuple[int, ...]
    save: Callable[[Any, Arguments], None]
    backward: Callable[[Any, Tensor], dict[int, Tensor]]  # place: gradient
    tangent: Callable[[Any, Arguments], Tensor]


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)  # references: it costs no memory


def _linear_save(ctx: Any, inputs: Arguments) -> None:
    x, packed, absmax, scale, offset, _bias, out_features, block_size, codebook = inputs
    _keep(ctx, packed, absmax, scale, offset, codebook)
    ctx.rows, ctx.in_features = x.shape[:-1], x.shape[-1]
    ctx.out_features, ctx.block_size = out_features, block_size


def _linear_backward(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
    *state, codebook = ctx.saved_tensors
    found = {}
    if ctx.needs_input_grad[0]:
        found[0] = call(
            "nf4_linear_input_gradient", grad, *state, ctx.in_features, ctx.block_size, codebook
        )
    if ctx.needs_input_grad[5]:
        found[5] = grad.reshape(-1, grad.shape[-1]).sum(0)
    return found


def _linear_tangent(ctx: Any, tangents: Arguments) -> Tensor:
    *state, codebook = ctx.saved_tensors
    of_x, of_bias = tangents[0], tangents[5]
    if of_x is None:
        return of_bias.expand(*ctx.rows, -1).clone()  # type: ignore[no-any-return]
    out: Tensor = call(
        "nf4_linear", of_x, *state, of_bias, ctx.out_features, ctx.block_size, codebook
    )
    return out


def _input_gradient_save(ctx: Any, inputs: Arguments) -> None:
    grad, packed, absmax, scale, offset, in_features, block_size, codebook = inputs
    _keep(ctx, packed, absmax, scale, offset, codebook)
    ctx.in_features, ctx.out_features, ctx.block_size = in_features, grad.shape[-1], block_size


def _input_gradient_backward(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
    *state, codebook = ctx.saved_tensors
    return {0: call("nf4_linear", grad, *state, None, ctx.out_features, ctx.block_size, codebook)}


def _input_gradient_tangent(ctx: Any, tangents: Arguments) -> Tensor:
    *state, codebook = ctx.saved_tensors
    out: Tensor = call(
        "nf4_linear_input_gradient", tangents[0], *state, ctx.in_features, ctx.block_size, codebook
    )
    return out


# y[t] = W[expert[t]] x[t]; its gradient is the same operator with the transposed weights.
def _experts_save(ctx: Any, inputs: Arguments) -> None:
    _x, expert, packed, absmax, scale, offset, shape, transposed, block_size, codebook = inputs
    _keep(ctx, expert, packed, absmax, scale, offset, codebook)
    ctx.shape, ctx.transposed, ctx.block_size = shape, transposed, block_size


def _experts(ctx: Any, x: Tensor, transposed: bool) -> Tensor:
    expert, *state, codebook = ctx.saved_tensors
    out: Tensor = call(
        "nf4_experts", x, expert, *state, ctx.shape, transposed, ctx.block_size, codebook
    )
    return out


def _experts_backward(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
    return {0: _experts(ctx, grad, not ctx.transposed)}


def _experts_tangent(ctx: Any, tangents: Arguments) -> Tensor:
    return _experts(ctx, tangents[0], ctx.transposed)


RULES = {
    "nf4_linear": Rules((0, 5), _linear_save, _linear_backward, _linear_tangent),
    "nf4_linear_input_gradient": Rules(
        (0,), _input_gradient_save, _input_gradient_backward, _input_gradient_tangent
    ),
    "nf4_experts": Rules((0,), _experts_save, _experts_backward, _experts_tangent),
}


# how many arguments have a leading axis of rows, so that a batch of them is more rows
LEADING_ROWS = {
    "nf4_linear": 1,
    "nf4_linear_input_gradient": 1,
    "nf4_embedding": 1,
    "nf4_experts": 2,
}


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


_everywhere: dict[str, Any] = {}


def _functions(operator: Any, rules: Rules, vmap_rule: Callable[..., Any]) -> tuple[Any, Any]:
    """Two autograd functions that compute the operator: by backward alone, and in every mode.

    The first is what training uses.  The second has the form that torch.func asks for, which takes
    30 microseconds longer to call (a tenth of a layer of 64 x 64).
    """
    n_arguments = len(operator._schema.arguments)

    def gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        found = rules.backward(ctx, grad)
        return [found.get(place) for place in range(n_arguments)]

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            rules.save(ctx, tuple(inputs))
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
            rules.save(ctx, inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return tuple(gradients(ctx, grad))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return rules.tangent(ctx, tangents)

        vmap = staticmethod(vmap_rule)

    return Backward, Everywhere


def _register(name: str) -> None:
    operator = getattr(torch.ops.minipeft, name).default
    vmap_rule = _batched(name, LEADING_ROWS.get(name, 0))
    torch.library.register_vmap(f"minipeft::{name}", vmap_rule, lib=LIBRARY)
    rules = RULES.get(name)
    if rules is None:
        return
    backward, everywhere = _functions(operator, rules, vmap_rule)
    inputs, n_arguments = rules.inputs, len(operator._schema.arguments)

    def autograd(keyset: Any, *args: Any) -> Any:
        given = [x for place in inputs if (x := args[place]) is not None]
        filled = (*args, *[None] * (n_arguments - len(args)))  # torch leaves defaults out
        if any(unpack_dual(x).tangent is not None for x in given):  # type: ignore[no-untyped-call]
            return everywhere.apply(*filled)
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            return backward.apply(*filled, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    _everywhere[name] = everywhere


for _name in SCHEMAS:
    _register(_name)


def call(name: str, *args: Any) -> Tensor:
    """The operator on all its arguments, also within torch.func.

    torch.func takes autograd functions and no operators; torch.compile the other way round.
    """
    function = None
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        function = _everywhere.get(name)
    run = getattr(torch.ops.minipeft, name) if function is None else function.apply
    out: Tensor = run(*args)
    return out
