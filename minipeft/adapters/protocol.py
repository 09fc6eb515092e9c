"""What an adapter layer offers, so that whole-model functions need to know no class.

`state.py`, `model/merge.py`, `model/memory.py` and `io` use these names alone, so a layer of your
own that has them takes part.  A module with a method `adapter_parameters` is an adapter; if it
wraps a module, that is its `base`, and if it has `merge`, it can be merged.

Also here: what a linear layer is and in which layout it keeps its weight, the question whether a
module may be replaced or folded into, and the check of a size that a caller gives.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Adapter(Protocol):
    """Something trainable added to a model: the parameters it owns, on or off, and how strongly."""

    enabled: bool  # False: the module computes as if the adapter were not there
    scale: float  # multiplies what the adapter adds; 1.0 is as trained

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this adapter owns, by their name within the module."""
        ...


@runtime_checkable
class AdapterLayer(Adapter, Protocol):
    """An adapter that wraps one module, its `base`, and can fold into that module's parameters.

    The class in wrapper.py has all of this but `exact_parameters`.
    """

    base: nn.Module  # may be an adapter layer itself: layers stack
    merged_module: nn.Module | None  # set while merged: what forward calls

    def exact_parameters(self) -> dict[str, Tensor]:
        """The parameters of the innermost module that the layers change, not rounded."""
        ...

    def effective_parameters(self) -> dict[str, Tensor]:
        """The same, rounded once to the dtypes of the innermost module's."""
        ...

    def merge(self) -> None:
        """Compute with one plain module, kept beside the untouched base."""
        ...

    def unmerge(self) -> None:
        """Drop that module."""
        ...

    def merged(self, *, requantize: bool = False) -> nn.Module:
        """A plain module that computes what this layer and those below compute."""
        ...

    def fold(self, *, requantize: bool = False) -> nn.Module:
        """The same; a dense innermost module gets the parameters itself."""
        ...


@runtime_checkable
class PackedLayer(Protocol):
    """A layer whose weights are stored as codes: how many weights the codes stand for."""

    def logical_parameters(self) -> int:
        """The number of weights that the packed tensors stand for, without the bias."""
        ...

    def packed_parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that hold codes and scales, by their name within the module."""
        ...

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the codes stand for; (out_features, in_features) of a linear layer."""
        ...

    def dense(self, weight: Tensor | None = None) -> nn.Module | nn.Parameter:
        """The plain module (or parameter) that this stands for, with its weight or another one."""
        ...

    def requantized(self, weight: Tensor) -> nn.Module:
        """A layer of the same kind and settings with the codes of another dense weight."""
        ...


def is_adapter(module: object) -> TypeGuard[Adapter]:
    """Whether the module's class has `adapter_parameters`.

    Looked up on the class: `isinstance` with a runtime protocol would read every attribute, and
    reading an adapter's `weight` computes a dense matrix.
    """
    return callable(getattr(type(module), "adapter_parameters", None))


def is_adapter_layer(module: object) -> TypeGuard[AdapterLayer]:
    """Whether the module is an adapter that wraps a base and can be merged."""
    return is_adapter(module) and callable(getattr(type(module), "merge", None))


def wraps_module(module: object) -> bool:
    """Whether the module is an adapter with a `base`: what stands there without it."""
    return is_adapter(module) and isinstance(getattr(module, "base", None), nn.Module)


def innermost(module: nn.Module) -> nn.Module:
    """The model's own module, below all adapters."""
    while wraps_module(module):
        module = module.base  # type: ignore[assignment]
    return module


def is_packed(module: object) -> TypeGuard[PackedLayer]:
    """Whether the module stores its weights as codes."""
    return callable(getattr(type(module), "logical_parameters", None))


class LinearShape(NamedTuple):
    """Sizes of a linear layer; `transposed`: its weight is (in_features, out_features)."""

    in_features: int
    out_features: int
    transposed: bool


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, GPT-2's linear layer with an (in, out) weight."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def linear_shape(module: nn.Module) -> LinearShape | None:
    """Sizes of a linear-like module, None for anything else.

    Linear-like are nn.Linear and its subclasses, transformers' Conv1D, packed layers, and any
    module with `in_features`, `out_features` and a weight (out_features, in_features).
    """
    if is_conv1d(module):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return LinearShape(int(rows), int(columns), transposed=True)
    in_features = getattr(module, "in_features", None)
    out_features = getattr(module, "out_features", None)
    if not isinstance(in_features, int) or not isinstance(out_features, int):
        return None
    if is_packed(module) or is_adapter(module):  # their `weight` is computed on read
        transposed = bool(getattr(module, "transposed", False))
        return LinearShape(in_features, out_features, transposed)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (out_features, in_features):
        return None
    return LinearShape(in_features, out_features, transposed=False)


def has_stored_weight(module: nn.Module) -> bool:
    """Whether the weight is a parameter or packed, and not computed (weight norm, ...)."""
    return is_packed(module) or module._parameters.get("weight") is not None


def keeps_statistics(module: nn.Module) -> bool:
    """Whether the module itself has running statistics, as torch's normalisations name them."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return any(module._buffers.get(name) is not None for name in names)


def expect(owner: str, name: str, value: object, fits: object, expected: str) -> None:
    """Raise a ValueError that names the owner, the value and what was expected, unless it fits."""
    if not fits:
        raise ValueError(f"{owner}: {name}={value!r}; expected {expected}")


def whole(owner: str, name: str, value: object, *, least: int = 1) -> int:
    """The value, if it is a whole number of at least `least`, and neither True nor False.

    Raises:
        ValueError: it is something else; the message names the owner and the value.
    """
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    expect(owner, name, value, fits, f"a whole number of at least {least}")
    return value  # type: ignore[return-value]


# linearity.py, which tries modules, adds its functions when the package is imported
trials: dict[str, Callable[[nn.Module], str | None]] = {}


def why_not(what: str, module: nn.Module) -> str | None:
    """Why this module must not be changed in this way; None if it may be.  The module is tried.

    `what` is "replace" (a 4-bit layer takes its place) or "fold" (its weight is added to).
    """
    return trials[what](module)
