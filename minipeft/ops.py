"""The operators' table: which function computes what, on which device, and why not another.

An operator is a name with a schema, registered with torch so that torch.compile and torch.export
know its shapes and treat it as one node.  `operator` defines it, with its shapes and gradients,
over the plain function that computes it: in nf4.py, double_quant.py, qlora.py and quantized/.  The
other functions that compute it are rows of a table:

    operator          name      when (device, dtype, shape)   where
    dequantize_nf4    triton    a CUDA or ROCm device         minipeft_kernels.triton.nf4
    dequantize_nf4    numba     a CPU                         minipeft_kernels.cpu.decode
    dequantize_nf4    pytorch   always                        minipeft.fast.nf4
    dequantize_nf4    plain     always                        minipeft.double_quant

Rows are tried from the top; the plain one is the last of each operator.  A row's module is imported
when the row is first needed, inside the operator's body, never when minipeft is imported.  An
import that fails strikes the row out, and `backend()` (fast/backend.py) tells why.

Read next: kernels/README.md, how to add a row.
"""

import functools
import importlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import NoneType, SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from minipeft.adapters.products import autocast_is_on, is_slow, without_autocast

F = TypeVar("F", bound=Callable[..., Any])
Gradient = Callable[[Tensor, Any], Tensor]
Predicate = Callable[[torch.device, torch.dtype, tuple[int, ...]], bool]

LIBRARY: Any = torch.library.Library("minipeft", "DEF")  # type: ignore[no-untyped-call]


class Packed(NamedTuple):
    """One 4-bit weight as operators take it: codes, scales, and what the codes stand for.

    `absmax` has a scale for every `block_size` weights: float32, or 8-bit codes with their float32
    `scale` and `offset`.  `codebook` is sixteen float32 values, or None for NF4's.
    """

    packed: Tensor
    absmax: Tensor
    block_size: int
    scale: Tensor | None = None
    offset: Tensor | None = None
    codebook: Tensor | None = None


# torch's schemas have no tuples: the fields of a Packed are arguments that follow each other
_FIELDS = (
    "Tensor packed, Tensor absmax, int block_size, Tensor? scale, Tensor? offset, Tensor? codebook"
)


@dataclass(frozen=True, eq=False)  # found by identity, which is the quickest hash
class Implementation:
    """One row of the table: what computes `operator`, and when it may.

    `when` gets the first tensor's device, the dtype that decides (the input's, or the result's
    when the input is packed) and the first tensor's shape.
    """

    operator: str
    name: str
    when: Predicate
    module: str
    function: str


@dataclass
class Operator:
    """An operator's functions, and what torch has to know of it beside; see `operator`."""

    plain: Callable[..., Any]
    rows: list[Implementation]  # tried before it
    arguments: list[str] = field(default_factory=list)  # as functions take them, see `grouped`
    tensors: list[str] = field(default_factory=list)  # those of them that are a tensor or None
    gradients: dict[str, Gradient] = field(default_factory=dict)
    row_arguments: int = 0
    direct: Callable[..., Any] | None = None  # see `call`

    def __post_init__(self) -> None:
        places = {name: place for place, name in enumerate(self.arguments)}
        self.weight, self.dtype = places.get("weight"), places.get("dtype")

    def first(self, given: Sequence[Any]) -> Tensor:
        """The first tensor, by whose device and shape a row is chosen."""
        tensor: Tensor = given[0].packed if self.weight == 0 else given[0]
        return tensor

    def choose(
        self, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Callable[..., Any]:
        """The function of the first row that takes such an input."""
        setting = KERNELS.get()
        for row in self.rows:
            fits = allowed(row, setting) and row.when(device, dtype, shape)
            if fits and not isinstance(function := load(row), str):
                return function
        return self.plain

    def compute(self, given: Sequence[Any]) -> Any:
        """The result."""
        first = self.first(given)
        dtype = first.dtype if self.dtype is None else given[self.dtype]
        function = self.choose(first.device, dtype, first.shape)
        if not autocast_is_on(first.device):
            return function(*given)
        with without_autocast(first.device):  # the caller has settled every dtype
            return function(*given)

    def grouped(self, args: Sequence[Any]) -> Sequence[Any]:
        """torch's arguments as functions take them: those of a 4-bit weight are one Packed."""
        if (first := self.weight) is None:
            return args
        last = first + len(Packed._fields)
        return (*args[:first], Packed(*args[first:last]), *args[last:])

    def named(self, given: Sequence[Any]) -> SimpleNamespace:
        """Arguments by their names in the schema."""
        return SimpleNamespace(**dict(zip(self.arguments, given, strict=True)))


OPERATORS: dict[str, Operator] = {}
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _always(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return True


def _on_gpu(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return device.type == "cuda" and dtype in _KERNEL_DTYPES


def _few_rows_on_gpu(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return _on_gpu(device, dtype, shape) and 0 < math.prod(shape[:-1]) <= 64


def _on_cpu(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return device.type == "cpu" and dtype.is_floating_point


def _in_numba(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return device.type == "cpu" and dtype in _KERNEL_DTYPES


def _slow_on_cpu(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return is_slow(dtype, device)


def _triton(operator: str, module: str, function: str, when: Predicate = _on_gpu) -> Implementation:
    return Implementation(operator, "triton", when, f"minipeft_kernels.triton.{module}", function)


def _numba(operator: str, module: str, function: str) -> Implementation:
    return Implementation(operator, "numba", _in_numba, f"minipeft_kernels.cpu.{module}", function)


def _fast(operator: str, module: str, function: str, when: Predicate = _always) -> Implementation:
    return Implementation(operator, "pytorch", when, f"minipeft.fast.{module}", function)


ROWS = (
    _triton("dequantize_nf4", "nf4", "dequantize"),
    _triton("nf4_linear", "product", "linear", _few_rows_on_gpu),
    _triton("nf4_linear_input_gradient", "gradient", "input_gradient", _few_rows_on_gpu),
    _triton("quantize_nf4", "quantize", "quantize"),
    _triton("lora_rows", "rows", "add_rows"),
    _numba("quantize_nf4", "encode", "quantize"),
    _numba("quantize_absmax", "encode", "quantize_absmax"),
    _numba("dequantize_nf4", "decode", "dequantize"),
    _numba("nf4_linear", "product", "linear"),
    _numba("nf4_linear_input_gradient", "product", "input_gradient"),
    _fast("quantize_nf4", "nf4", "quantize"),
    _fast("dequantize_nf4", "nf4", "dequantize"),
    _fast("nf4_linear", "linear", "linear"),
    _fast("nf4_linear_input_gradient", "linear", "input_gradient"),
    _fast("nf4_embedding", "gathered", "embedding"),
    _fast("nf4_experts", "gathered", "experts"),
    _fast("prefix_attention", "prefix", "attention", _on_cpu),
    _fast("dense_linear", "dense", "linear", _slow_on_cpu),
)

Kernels = bool | Literal["plain"]  # see `use_kernels`
_SETTINGS: dict[str, Kernels] = {"1": True, "0": False, "plain": "plain"}
_wanted = os.environ.get("MINIPEFT_KERNELS") or "1"
if _wanted not in _SETTINGS:
    raise ValueError(f"MINIPEFT_KERNELS={_wanted!r}; expected one of {list(_SETTINGS)}")
KERNELS: ContextVar[Kernels] = ContextVar("minipeft_kernels", default=_SETTINGS[_wanted])


def plain_row(name: str) -> Callable[[F], F]:
    """Decorator: this is the plain row of `name`, a function that is not an operator of torch."""

    def register(plain: F) -> F:
        OPERATORS[name] = Operator(plain, [row for row in ROWS if row.operator == name])
        return plain

    return register


def operator(
    name: str,
    schema: str,
    *,
    shapes: Callable[[Any], Any],
    gradients: dict[str, Gradient] | None = None,
    row_arguments: int = 0,
) -> Callable[[F], F]:
    """Decorator: this function is the plain row of a new operator, for any input.

    `schema` is torch's, with `Packed weight` for a 4-bit weight.  `shapes` gives empty tensors of
    the result's shapes.  `gradients` has a function for each argument in which the operator is
    linear; it takes the result's gradient first.  Both get the operator's arguments as attributes,
    by the names in the schema; in a gradient a linear one has a shape only: its values are not
    kept for backward.  The first `row_arguments` arguments have a leading axis of rows: a batch
    of them is more rows (torch.func.vmap).
    """

    def register(plain: F) -> F:
        rows = [row for row in ROWS if row.operator == name]
        words = [argument.split() for argument in schema.strip("(").partition(")")[0].split(",")]
        arguments = [name for _, name in words]
        tensors = [name for kind, name in words if kind.startswith("Tensor")]
        made = Operator(plain, rows, arguments, tensors, gradients or {}, row_arguments)
        OPERATORS[name] = made

        def run(*args: Any) -> Any:
            return made.compute(made.grouped(args))

        # torch's `custom_op` first spends a second importing dynamo; these calls do not
        LIBRARY.define(name + schema.replace("Packed weight", _FIELDS))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        fake = lambda *args: shapes(made.named(made.grouped(args)))  # noqa: E731
        torch.library.register_fake(f"minipeft::{name}", fake, lib=LIBRARY)
        return plain

    return register


def call(name: str, *given: Any) -> Tensor:
    """The operator on all its arguments, a 4-bit weight as one Packed.

    torch.compile needs operators.  Elsewhere fast/derivatives.py has a way that knows torch.func,
    and is shorter where nobody listens.
    """
    if torch.compiler.is_compiling():
        out: Tensor = getattr(torch.ops.minipeft, name)(*flat(given))
    else:
        out = OPERATORS[name].direct(*given)  # type: ignore[misc]
    return out


_PLAIN = frozenset(
    {Tensor, nn.Parameter, Packed, NoneType, bool, int, float, list, torch.Size, torch.dtype}
)


def nobody_listens(first: Tensor, *given: Iterable[Any], profiled: bool = False) -> bool:
    """Whether a function may be called for its values alone, without torch's dispatcher.

    Not so under torch.func, dual numbers, torch.jit.trace, a profiler or a mode (fake tensors,
    counters, torch.export, a default device); with tensors of other classes (distributed ones), on
    the meta device, or `first` a negative view of its memory.  Autograd is the caller's business.
    An implementation that somebody else registers with torch is asked in these cases alone.
    """
    return (
        all(_PLAIN.issuperset(map(type, values)) for values in given)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and (profiled or not torch._C._autograd._profiler_enabled())
        and not (first.is_meta or first.is_neg())
    )


def flat(given: Sequence[Any]) -> list[Any]:
    """Arguments as torch's schemas have them: a Packed is several."""
    return [value for a in given for value in (a if isinstance(a, Packed) else (a,))]


def allowed(row: Implementation, setting: Kernels) -> bool:
    """Whether `use_kernels` leaves this row."""
    return setting is True or (setting is False and row.name == "pytorch")


@functools.cache
def load(row: Implementation) -> Callable[..., Any] | str:
    """The row's function, or why there is none; with a warning if its package is broken."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(row.module), row.function)
    except ModuleNotFoundError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # whatever a broken package raises: the next row does without it
        why = f"{type(error).__name__}: {str(error).strip()}"
        warnings.warn(f"minipeft goes without {row.name}: {why}", stacklevel=2)  # shown once
        return why
    return function
