"""FLOPs of the 4-bit products for torch.utils.flop_counter: those of the dense ones.

torch's counter has a formula for each operator, and counts nothing where it has none.  It is not
imported here, since it imports triton; the formulas are added when somebody else imports it.
"""

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from minipeft.ops import OPERATORS

COUNTER = "torch.utils.flop_counter"


def product_flops(x: Sequence[int], *_: object, out_shape: Sequence[int], **__: object) -> int:
    """A multiplication and an addition for each element of `x` and column of the result."""
    return 2 * math.prod(x) * out_shape[-1]


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
