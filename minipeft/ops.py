"""The operators' table: which function computes what, on which device, and why not another.

An operator is a name with a schema, registered with torch so that torch.compile and torch.export
know its shapes and treat it as one node.  `operator` defines it, with its shapes and gradients,
over the plain function that computes it: in nf4.py, double_quant.py, qlora.py and quantized/.  The
other functions that compute it are rows of a table:

    operator          name      when (device, dtype, shape)   where
    dequantize_nf4    triton    a CUDA or ROCm device         minipeft_kernels.triton.nf4
    dequantize_nf4    pytorch   always                        minipeft.fast.nf4
    dequantize_nf4    plain     always                        minipeft.double_quant

Rows are tried from the top; the plain one is the last of each operator.  A row names a module and a
function; the module is imported when the row is first needed, inside the operator's body, never
when minipeft is imported.  An import that fails strikes the row out, and `backend()` tells the
reason.

Read next: kernels/README.md, how to add a row.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from minipeft.fast.products import is_slow

F = TypeVar("F", bound=Callable[..., Any])
Gradient = Callable[[Tensor, Any], Tensor]
Predicate = Callable[[torch.device, torch.dtype, tuple[int, ...]], bool]

LIBRARY: Any = torch.library.Library("minipeft", "DEF")  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)  # compared by identity: fast, and each row is made once
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


@dataclass(frozen=True)
class Operator:
    """What torch has to know of an operator beside what it computes; see `operator`."""

    arguments: tuple[str, ...]
    gradients: dict[str, Gradient]
    row_arguments: int

    def named(self, args: Sequence[Any]) -> SimpleNamespace:
        """The arguments by their names in the schema; None for defaults, which torch leaves out."""
        return SimpleNamespace(**dict(zip_longest(self.arguments, args)))


def _always(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return True


def _on_gpu(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return device.type == "cuda" and dtype in (torch.float32, torch.float16, torch.bfloat16)


def _on_cpu(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return device.type == "cpu" and dtype.is_floating_point


KERNELS = (
    Implementation(
        "dequantize_nf4", "triton", _on_gpu, "minipeft_kernels.triton.nf4", "dequantize"
    ),
)  # fmt: skip

FAST = (
    Implementation("quantize_nf4", "pytorch", _always, "minipeft.fast.nf4", "quantize"),
    Implementation("dequantize_nf4", "pytorch", _always, "minipeft.fast.nf4", "dequantize"),
    Implementation("nf4_linear", "pytorch", _always, "minipeft.fast.linear", "linear"),
    Implementation(
        "nf4_linear_input_gradient", "pytorch", _always, "minipeft.fast.linear", "input_gradient"
    ),
    Implementation("prefix_attention", "pytorch", _on_cpu, "minipeft.fast.prefix", "attention"),
)

OPERATORS: dict[str, Operator] = {}
_table: dict[str, list[Implementation]] = {}
_loaded: dict[Implementation, Callable[..., Any] | str] = {}  # the function, or why there is none
IN_TRANSFORMS: dict[str, Callable[..., Any]] = {}  # see `call`

Kernels = bool | Literal["plain"]
_SETTINGS: dict[str, Kernels] = {"1": True, "0": False, "plain": "plain"}


_wanted = os.environ.get("MINIPEFT_KERNELS") or "1"
if _wanted not in _SETTINGS:
    raise ValueError(f"MINIPEFT_KERNELS={_wanted!r}; expected one of {list(_SETTINGS)}")
_kernels: ContextVar[Kernels] = ContextVar("minipeft_kernels", default=_SETTINGS[_wanted])


def add_implementation(row: Implementation) -> None:
    """Put a row before those that `row.operator` already has, so that the newest is tried first.

    Raises:
        ValueError: the operator does not exist.
    """
    if row.operator not in OPERATORS:
        raise ValueError(
            f"add_implementation: no operator {row.operator!r}; there are {sorted(OPERATORS)}"
        )
    _table[row.operator].insert(0, row)


def remove_implementation(row: Implementation) -> None:
    """Take a row out of the table again (a test's or an experiment's kernel)."""
    _table[row.operator].remove(row)
    _loaded.pop(row, None)


def plain_row(name: str) -> Callable[[F], F]:
    """Decorator: this is the last row of `name`, which need not be an operator of torch."""

    def register(plain: F) -> F:
        last = Implementation(name, "plain", _always, plain.__module__, plain.__name__)
        _table[name] = [row for row in (*KERNELS, *FAST) if row.operator == name] + [last]
        _loaded[last] = plain
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

    `shapes` gives empty tensors of the result's shapes.  `gradients` has a function for each
    argument in which the operator is linear: it takes the result's gradient too.  Both get the
    operator's arguments as attributes, by the names in the schema; in a gradient the linear ones
    are shapes, since nothing of their size is kept for backward.  The first `row_arguments`
    arguments have a leading axis of rows: a batch of them is more rows (torch.func.vmap).
    """

    def register(plain: F) -> F:
        plain_row(name)(plain)
        # torch's helper `custom_op` imports dynamo at its first call (a second); these do not
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, _body(name), "CompositeExplicitAutograd")
        arguments = getattr(torch.ops.minipeft, name).default._schema.arguments
        names = tuple(argument.name for argument in arguments)
        made = OPERATORS[name] = Operator(names, gradients or {}, row_arguments)
        fake = lambda *args: shapes(made.named(args))  # noqa: E731
        torch.library.register_fake(f"minipeft::{name}", fake, lib=LIBRARY)
        return plain

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
    reasons, setting = [], _kernels.get()
    for row in _table[operator]:
        if setting == "plain" and row.name != "plain":
            reasons.append(f"{row.name}: only plain rows are on")
        elif not setting and row.name not in ("pytorch", "plain"):
            reasons.append(f"{row.name}: kernels are off")
        elif not row.when(device, dtype, shape):
            reasons.append(f"{row.name}: not for {dtype} {shape} on {device.type}")
        elif isinstance(function := _load(row), str):
            reasons.append(f"{row.name}: {function}")
        else:
            return function, [*reasons, row.name]
    raise RuntimeError(f"minipeft::{operator} has no implementation; tried {reasons}")


@contextmanager
def use_kernels(which: Kernels) -> Iterator[None]:
    """Within this context, which rows of the table operators may use.

    True: all of them.  False: PyTorch's, no optional kernels.  "plain": the plain functions of the
    numbered files, which are slow and take more memory.  The environment variable MINIPEFT_KERNELS
    (1, 0 or plain) does the same for a whole process.

    Raises:
        ValueError: none of the three.
    """
    if which not in (True, False, "plain"):
        raise ValueError(f'use_kernels: {which!r}; expected True, False or "plain"')
    token = _kernels.set(which)
    try:
        yield
    finally:
        _kernels.reset(token)


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
    for name in _table:
        _, reasons = choose(name, device, dtype, shape)
        rejected = "; ".join(reasons[:-1])
        report[name] = reasons[-1] + (f" (not {rejected})" if rejected else "")
        products = name in OPERATORS and OPERATORS[name].gradients
        if products and reasons[-1] == "pytorch" and is_slow(dtype, device):
            kind = str(dtype).removeprefix("torch.")
            report[name] += f", products in float32 (this CPU has none of {kind})"
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


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: x's own, or autocast's where that is on (not for float64)."""
    if x.dtype == torch.float64 or not autocast_is_on(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


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


def call(name: str, *args: Any) -> Tensor:
    """The operator on all its arguments, also within torch.func.

    torch.func takes autograd functions and no operators; torch.compile the other way round.
    fast/derivatives.py makes these functions.
    """
    function = None
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        function = IN_TRANSFORMS.get(name)
    run = getattr(torch.ops.minipeft, name) if function is None else function
    out: Tensor = run(*args)
    return out


def ceil_div(n: Any, d: int) -> Any:
    """n / d, rounded up; `n` may be a symbolic integer."""
    return (n + d - 1) // d
