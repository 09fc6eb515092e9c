"""How a plain loop becomes a function that any thread can run.

A loop is written for one piece of its work: `loop(address, piece)`.  numba compiles it to a C
function and keeps the machine code in its cache.  `address` is where the arguments are: 64-bit
integers, which are sizes and the addresses of tensors.  No array of Python goes in, so a call costs
what a C call costs, and threads that know nothing of Python can run it (threads.py).

Rules that a loop must keep to be fast:

    each loop does one thing          a loop that looks up and multiplies is not vectorised
    unsigned and 32-bit steps         numba widens to 64 bits unless each step is cast
    no branch inside                  LLVM makes compares of vectors from counts
    no fast-math, but for sums        numba then fuses and reorders nothing: bits are exact

Helper functions have names of their own, and are no lambdas: machine code from the cache is linked
by the names of functions, and two with one name can be taken for each other.
"""

import ctypes
import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic
from torch import Tensor

_I64, _I32 = ir.IntType(64), ir.IntType(32)
_HEADER = ("next_piece", "pieces", "loop")  # what every loop's arguments begin with


def arguments_of(names: str) -> tuple[Any, Any]:
    """The C structure with these names, and the type that loops read it with.

    Both begin with the header that threads.py reads.
    """
    fields = [*_HEADER, *names.split()]
    record = np.dtype([(name, np.int64) for name in fields])
    body = {"_fields_": [(name, ctypes.c_int64) for name in fields]}
    return type("Arguments", (ctypes.Structure,), body), record


@functools.cache
def _version() -> str:
    """A name for the sources of all loops: numba's cache asks about a loop's own file alone."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


@functools.cache
def _warn_of_no_cache() -> None:
    warnings.warn(
        "minipeft: numba finds no folder for its cache, so each process compiles the loops for "
        "CPUs again, which takes seconds. Set NUMBA_CACHE_DIR to a folder that can be written",
        stacklevel=2,
    )


def compiled(*parameters: Any) -> Callable[[Callable[..., None]], Any]:
    """Decorator: the C function of a loop, which takes these types and returns nothing.

    Its machine code comes from numba's cache, or goes there.  Where no folder can be written, it
    is compiled in each process, and a warning says so.
    """

    def compile_(loop: Callable[..., None]) -> Any:
        loop.__qualname__ += f"_{_version()}"  # names the files in the cache
        make = cfunc(types.void(*parameters), cache=True, error_model="numpy")
        try:
            return make(loop)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            _warn_of_no_cache()
            return cfunc(types.void(*parameters), error_model="numpy")(loop)

    return compile_


def address_of(tensor: Tensor | None) -> int:
    """Where a tensor's numbers begin; 0 for None.

    A tensor that was left behind by a transform of torch.func has no memory itself.

    Raises:
        RuntimeError: the tensor is not on the CPU.
    """
    if tensor is None:
        return 0
    if not tensor.is_cpu:
        raise RuntimeError(f"expected all tensors on the CPU, found one on {tensor.device}")
    at: int = torch._C._functorch.unwrap_if_dead(tensor).data_ptr()
    return at


LOOP = (types.int64, types.int64, types.int64)  # addresses of arguments and scratch, and the piece


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """An address as what `carray` takes."""

    def make(context: Any, build: Any, signature: Any, given: Any) -> Any:
        return build.inttoptr(given[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), make


@intrinsic
def take_piece(context: Any, address: Any) -> Any:
    """Read the integer at this address and add one to it, as one step that no thread can part."""

    def make(context: Any, build: Any, signature: Any, given: Any) -> Any:
        place = build.inttoptr(given[0], _I64.as_pointer())
        return build.atomic_rmw("add", place, ir.Constant(_I64, 1), "seq_cst")

    return types.int64(types.int64), make


@intrinsic
def call_loop(context: Any, loop: Any, address: Any, piece: Any, scratch: Any) -> Any:
    """Call the loop at the address `loop`."""

    def make(context: Any, build: Any, signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, _I64])
        build.call(build.inttoptr(given[0], kind.as_pointer()), given[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), make


def _conversion(result: Any, argument: Any, steps: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic of one argument."""

    def convert(context: Any, x: Any) -> Any:
        def make(context: Any, build: Any, signature: Any, given: Any) -> Any:
            return steps(build, given[0])

        return result(argument), make

    return intrinsic(convert)


_F32 = ir.FloatType()
# the bits of a float32, and back
to_bits = _conversion(types.uint32, types.float32, lambda b, x: b.bitcast(x, _I32))
from_bits = _conversion(types.float32, types.uint32, lambda b, x: b.bitcast(x, _F32))


@numba.njit(inline="always")
def array(address, size, dtype):
    """The numbers at this address."""
    return carray(pointer(address), size, dtype)
