"""FLOPs of the 4-bit products for torch.utils.flop_counter: those of the dense ones.

torch's counter has a formula for each operator, and counts nothing where it has none.  It is not
imported here, since it imports triton; the formulas are added when somebody else imports it.
Attention on a CPU is torch's own operator, so its formulas are not added to torch's counter for
everybody: who counts passes `attention_on_a_cpu()` as the counter's `custom_mapping`.
"""

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from minipeft.ops import OPERATORS

COUNTER = "torch.utils.flop_counter"


def product_flops(x: Sequence[int], *_: object, out_shape: Sequence[int], **__: object) -> int:
    """A multiplication and an addition for each element of `x` and column of the result."""
    return 2 * math.prod(x) * out_shape[-1]


def attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object,
                    **__: object) -> int:  # fmt: skip
    """q k^T, then its rows times v: 4 * batch * heads * queries * keys * head_dim.

    Of q (batch, heads, queries, head_dim), k and v (batch, key heads, keys, head_dim).  A causal
    mask does not halve it, in torch's formula for GPUs neither.
    """
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


def attention_backward_flops(grad: Sequence[int], q: Sequence[int], k: Sequence[int],
                             v: Sequence[int], *_: object, **__: object) -> int:  # fmt: skip
    """q k^T again, and four products for the gradients of the weights, of v, of q and of k.

    Five products where forward has two: 2.5 times forward's FLOPs where q and v are equally wide.
    """
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (3 * width + 2 * v[-1])


def attention_on_a_cpu() -> dict[object, Callable[..., int]]:
    """Formulas for FlopCounterMode(custom_mapping=...): attention on a CPU, and its backward.

    torch's counter has none for the operator that scaled_dot_product_attention calls on a CPU, and
    counts 0 there.  Where a later torch has its own, that one is taken.
    """
    from torch.utils.flop_counter import flop_registry

    ours: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": attention_flops,
        "_scaled_dot_product_flash_attention_for_cpu_backward": attention_backward_flops,
    }
    found = {getattr(torch.ops.aten, name): formula for name, formula in ours.items()}
    return {name: formula for name, formula in found.items() if name not in flop_registry}


def _add_formulas(counter: ModuleType) -> None:
    for name in (name for name, defined in OPERATORS.items() if defined.gradients):  # products
        counter.register_flop_formula(getattr(torch.ops.minipeft, name))(product_flops)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds the counter's module as other finders do, once, and has it add the formulas."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                _add_formulas(module)

            spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def count_products() -> None:
    """Give torch's counter the formulas: now if it is imported, else once it is."""
    if COUNTER in sys.modules:
        _add_formulas(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
