"""The copy of one module that a trial computes with, so that the trial changes nothing else.

The copy has tensors, dicts and lists of its own, and methods bound to the module are bound to the
copy.  Everything else (hooks, objects of any class) is shared, not copied.
"""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import is_packed


def different_values(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Different numbers from 0.01 to 100 in size, as a view of few: it takes no memory.

    Entry (i, j) is number 2 i + j, so no two rows or columns are the same, nor the transpose.
    """
    rows, columns = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())
    count = 2 * rows + columns
    numbers = torch.randn(count, generator=generator, dtype=torch.float64)
    numbers *= 10 ** (4 * torch.rand(count, generator=generator, dtype=torch.float64) - 2)
    made = numbers.to(device, dtype).as_strided((rows, columns), (2, 1))
    return made if len(shape) == 2 else made.reshape(shape)


def copy_for_trial(
    module: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    whole: bool = True,
) -> nn.Module:
    """The module's copy for the trial, in eval mode, with another weight and bias in `dtype`.

    `whole` False leaves the weight a view of few numbers: enough for a table whose rows are
    gathered.  No deep copy is made, since hooks and attributes may hold the whole model.
    """

    def convert(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.clone()
        if tensor.is_meta:
            return different_values(tensor.shape, dtype, device, generator)
        return tensor.detach().to(device, dtype, copy=True)

    replaced = () if is_packed(module) else ("weight", "bias")
    made = _shallow(module, convert, replaced)
    for name in replaced:
        present = module._parameters.get(name)
        if present is not None:
            values = different_values(present.shape, dtype, device, generator)
            if whole:
                values = values.contiguous()
            made._parameters[name] = nn.Parameter(values, requires_grad=False)
    if isinstance(getattr(made, "weight_dtype", None), torch.dtype):
        vars(made)["weight_dtype"] = dtype  # of codes
    return made


def _shallow(
    module: nn.Module, convert: Callable[[Tensor], Tensor], but: tuple[str, ...] = ()
) -> nn.Module:
    made: nn.Module = type(module).__new__(type(module))

    def bound(value: Any) -> Any:
        """What belongs to the module belongs to the copy: methods, containers, tensors."""
        if isinstance(value, MethodType) and value.__self__ is module:
            return MethodType(value.__func__, made)
        if isinstance(value, functools.partial) and any(a is module for a in value.args):
            arguments = (made if a is module else a for a in value.args)
            return functools.partial(value.func, *arguments, **value.keywords)
        if isinstance(value, Tensor):
            return convert(value)
        return copy.copy(value) if type(value) in (dict, OrderedDict, list, set) else value

    own = vars(made)
    own.update({name: bound(value) for name, value in vars(module).items()})
    own["_parameters"] = {
        name: value if value is None or name in but
        else nn.Parameter(convert(value), requires_grad=False)
        for name, value in module._parameters.items()
    }  # fmt: skip
    own["_buffers"] = {n: b if b is None else convert(b) for n, b in module._buffers.items()}
    own["_modules"] = {n: m if m is None else _shallow(m, convert)
                       for n, m in module._modules.items()}  # fmt: skip
    own["training"] = False
    own["_compiled_call_impl"] = None  # compiled for the original
    return made
