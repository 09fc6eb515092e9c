"""The operators: schema, shapes, and the table of implementations.

An operator is a name with a schema, registered with torch so that torch.compile and torch.export
know its shapes and treat it as one node; fast/derivatives.py tells autograd.  What it computes is
chosen from a table:

    operator          name      when (device, dtype, shape)   where
    dequantize_nf4    triton    a CUDA or ROCm device         minipeft_kernels.triton.nf4
    dequantize_nf4    pytorch   always                        minipeft.double_quant, minipeft.nf4

Rows are tried from the top; the PyTorch one is the last of each operator and takes everything.
A row names a module and a function; the module is imported when the row is first needed, inside
the operator's body, never when minipeft is imported.  An import that fails strikes the row out,
and `backend()` tells the reason.

Read next: kernels/README.md, how to add a row.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from minipeft.fast import flops
from minipeft.fast.products import is_slow

F = TypeVar("F", bound=Callable[..., Any])
Predicate = Callable[[torch.device, torch.dtype, tuple[int, ...]], bool]

LIBRARY: Any = torch.library.Library("minipeft", "DEF")  # type: ignore[no-untyped-call]

# torch's registration helper `custom_op` imports dynamo at its first call (about a second);
# define and impl do not.
SCHEMAS = {
    "quantize_nf4": "(Tensor w, int block_size) -> (Tensor, Tensor)",
    "dequantize_nf4": "(Tensor packed, Tensor absmax, Tensor? scale, Tensor? offset, "
    "SymInt[] shape, int block_size, ScalarType dtype, Tensor? codebook=None) -> Tensor",
    "quantize_absmax": "(Tensor absmax, int block_size) -> (Tensor, Tensor, Tensor)",
    "dequantize_absmax": "(Tensor code, Tensor scale, Tensor offset, int block_size) -> Tensor",
    "nf4_linear": "(Tensor x, Tensor packed, Tensor absmax, Tensor? scale, Tensor? offset, "
    "Tensor? bias, SymInt out_features, int block_size, Tensor? codebook=None) -> Tensor",
    "nf4_linear_input_gradient": "(Tensor grad, Tensor packed, Tensor absmax, Tensor? scale, "
    "Tensor? offset, SymInt in_features, int block_size, Tensor? codebook=None) -> Tensor",
    "nf4_embedding": "(Tensor rows, Tensor packed, Tensor absmax, Tensor? scale, Tensor? offset, "
    "SymInt table_rows, SymInt dim, int block_size, ScalarType dtype, Tensor? codebook=None) "
    "-> Tensor",
    "nf4_experts": "(Tensor x, Tensor expert, Tensor packed, Tensor absmax, Tensor? scale, "
    "Tensor? offset, SymInt[] shape, bool transposed, int block_size, Tensor? codebook=None) "
    "-> Tensor",
}

MULTIPLIES = ("nf4_linear", "nf4_linear_input_gradient", "nf4_experts")


@dataclass(frozen=True)
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


def _on_gpu(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return device.type == "cuda" and dtype in (torch.float32, torch.float16, torch.bfloat16)


KERNELS = (
    Implementation(
        "dequantize_nf4", "triton", _on_gpu, "minipeft_kernels.triton.nf4", "dequantize"
    ),
)  # fmt: skip

_table: dict[str, list[Implementation]] = {
    name: [row for row in KERNELS if row.operator == name] for name in SCHEMAS
}
_loaded: dict[Implementation, Callable[..., Any] | str] = {}  # the function, or why there is none
_kernels_enabled: ContextVar[bool] = ContextVar(
    "minipeft_kernels_enabled", default=os.environ.get("MINIPEFT_KERNELS", "1") != "0"
)


def add_implementation(row: Implementation) -> None:
    """Put a row before those that `row.operator` already has, so that the newest is tried first.

    Raises:
        ValueError: the operator does not exist.
    """
    if row.operator not in _table:
        raise ValueError(
            f"add_implementation: no operator {row.operator!r}; there are {sorted(_table)}"
        )
    _table[row.operator].insert(0, row)


def remove_implementation(row: Implementation) -> None:
    """Take a row out of the table again (a test's or an experiment's kernel)."""
    _table[row.operator].remove(row)
    _loaded.pop(row, None)


def implements(operator: str) -> Callable[[F], F]:
    """Decorator: this PyTorch function is what `operator` falls back on, for any input."""

    def register(function: F) -> F:
        row = Implementation(
            operator, "pytorch", lambda *_: True, function.__module__, function.__name__
        )
        _table[operator].append(row)
        _loaded[row] = function
        return function

    return register


def _load(row: Implementation) -> Callable[..., Any] | str:
    if row not in _loaded:
        try:
            _loaded[row] = getattr(importlib.import_module(row.module), row.function)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            _loaded[row] = f"{type(error).__name__}: {error}"
    return _loaded[row]


def choose(
    operator: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[Callable[..., Any], list[str]]:
    """The function that computes `operator` on such an input, and why each row before it does not.

    The last entry of the list names the row that was chosen.
    """
    reasons = []
    for row in _table[operator]:
        if row.name != "pytorch" and not _kernels_enabled.get():
            reasons.append(f"{row.name}: kernels are off")
        elif not row.when(device, dtype, shape):
            reasons.append(f"{row.name}: not for {dtype} {shape} on {device.type}")
        elif isinstance(function := _load(row), str):
            reasons.append(f"{row.name}: {function}")
        else:
            return function, [*reasons, row.name]
    raise RuntimeError(f"minipeft::{operator} has no implementation; tried {reasons}")


@contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """Within this context, let operators use optional kernels, or only PyTorch.

    The environment variable MINIPEFT_KERNELS=0 does the same for a whole process.
    """
    token = _kernels_enabled.set(enabled)
    try:
        yield
    finally:
        _kernels_enabled.reset(token)


def backend(
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, ...] = (4096, 4096),
) -> dict[str, str]:
    """What each operator would use for such a first argument, and why not what comes before it.

    Says too where products of this dtype are computed in float32 (fast/products.py).

    >>> backend(dtype=torch.float32)["nf4_linear"]
    'pytorch'
    """
    device = torch.device(device)
    report = {}
    for operator in SCHEMAS:
        _, reasons = choose(operator, device, dtype, shape)
        rejected = "; ".join(reasons[:-1])
        report[operator] = reasons[-1] + (f" (not {rejected})" if rejected else "")
        if operator in MULTIPLIES and reasons[-1] == "pytorch" and is_slow(dtype, device):
            kind = str(dtype).removeprefix("torch.")
            report[operator] += f", products in float32 (this CPU has none of {kind})"
    return report


# asked once: a layer's forward is short
_HAS_AUTOCAST = {kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "meta")}


@contextmanager
def _autocast_off(device_type: str) -> Iterator[None]:
    with torch.autocast(device_type, enabled=False):
        yield


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast would cast inputs of operations on this device."""
    kind = device.type
    known = _HAS_AUTOCAST.get(kind)
    if known is None:
        known = torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which autocast casts nothing; it costs nothing where autocast is off."""
    return _autocast_off(device.type) if autocast_is_on(device) else nullcontext()


def _body(operator: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        first = args[0]
        dtype = next((a for a in args if isinstance(a, torch.dtype)), first.dtype)
        function, _ = choose(operator, first.device, dtype, tuple(first.shape))
        with without_autocast(first.device):  # the caller has settled every dtype
            return function(*args)

    return run


def _ceil_div(n: Any, d: int) -> Any:  # n may be a symbolic integer
    return (n + d - 1) // d


def _fake_quantize_nf4(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = w.numel()
    absmax = w.new_empty((_ceil_div(n, block_size),), dtype=torch.float32)
    return w.new_empty((_ceil_div(n, 2),), dtype=torch.uint8), absmax


def _fake_dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _fake_quantize_absmax(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = _ceil_div(absmax.numel(), block_size)
    code = torch.empty_like(absmax, dtype=torch.uint8, memory_format=torch.contiguous_format)
    return code, absmax.new_empty((groups,)), absmax.new_empty((1,))


def _fake_dequantize_absmax(code: Tensor, scale: Tensor, offset: Tensor, block_size: int) -> Tensor:
    return torch.empty_like(code, dtype=torch.float32, memory_format=torch.contiguous_format)


def _fake_nf4_linear(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], args[5]))


def _fake_nf4_linear_input_gradient(grad: Tensor, *args: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], args[4]))


def _fake_nf4_embedding(rows: Tensor, packed: Tensor, *args: Any) -> Tensor:
    return packed.new_empty((*rows.shape, args[4]), dtype=args[6])


def _fake_nf4_experts(x: Tensor, *args: Any) -> Tensor:
    shape, transposed = args[5], args[6]
    return x.new_empty((x.shape[0], shape[2] if transposed else shape[1]))


_FAKES: dict[str, Callable[..., Any]] = {
    "quantize_nf4": _fake_quantize_nf4,
    "dequantize_nf4": _fake_dequantize_nf4,
    "quantize_absmax": _fake_quantize_absmax,
    "dequantize_absmax": _fake_dequantize_absmax,
    "nf4_linear": _fake_nf4_linear,
    "nf4_linear_input_gradient": _fake_nf4_linear_input_gradient,
    "nf4_embedding": _fake_nf4_embedding,
    "nf4_experts": _fake_nf4_experts,
}
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, _body(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"minipeft::{_name}", _FAKES[_name], lib=LIBRARY)
flops.count_products()
