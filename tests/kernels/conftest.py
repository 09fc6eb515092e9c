"""Makes Triton's interpreter compute bfloat16; loaded where TRITON_INTERPRET=1 is set.

Up to 3.8 it cuts float32 off instead of rounding to nearest even (triton-lang/triton#11584), reads
subnormal bfloat16 as other numbers, and multiplies matrices of bfloat16 by their bits, as whole
numbers, so a kernel that is right on a GPU would look wrong.  `interpreted.py` has a test that
fails when this is no longer needed.  And a fixture that watches over what kernels write.
"""

import os
import sys

import numpy as np
import pytest
import torch

GUARD = 2048  # numbers before and behind each result


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the bfloat16 nearest to float32 values, ties to even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def read_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (np.asarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert_float(data, source, target, rounding):
        if source.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return round_to_bfloat16(np.asarray(data).view(np.float32))
        if source.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return read_bfloat16(data)
        return original(data, source, target, rounding)

    def widened(handle):
        """A tensor of bfloat16 as float32."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(read_bfloat16(handle.data), tl.float32)

    original_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *others):
        return original_dot(self, widened(a), widened(b), *others)

    if os.environ.get("MINIPEFT_NO_REPAIR") != "1":
        interpreter._convert_float = convert_float
        interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture
def allocations(monkeypatch):
    """What kernels allocate is NaN before it is written, and stands between NaN; the list of it."""
    made: list[tuple[torch.Tensor, int]] = []
    ordinary = torch.Tensor.new_empty

    def new_empty(self, *size, dtype=None, **others):
        if not sys._getframe(1).f_globals["__name__"].startswith("minipeft_kernels"):
            return ordinary(self, *size, dtype=dtype, **others)
        count = torch.Size(size).numel()
        around = torch.full((GUARD + count + GUARD,), float("nan"), dtype=dtype or self.dtype)
        made.append((around, count))
        return around[GUARD : GUARD + count].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield made
    for around, count in made:
        assert around[:GUARD].isnan().all() and around[GUARD + count :].isnan().all()
