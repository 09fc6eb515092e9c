"""float32 numbers as bfloat16 and float16, and float16 as float32, in whole numbers.

A number is rounded to nearest, ties to even, as everywhere in PyTorch.  Not every processor has
instructions for these two dtypes, and LLVM would call functions that numba does not have; these
few operations are vectorised on all.
"""

import numpy as np
from numba import njit

from minipeft_kernels.cpu.compiled import from_bits, to_bits

_SMALLEST = np.float32(2.0**-14)  # the smallest normal float16


@njit(inline="always")
def rounded_to_bfloat16(x):
    """The bits of the nearest bfloat16: the upper half of a float32, after rounding."""
    bits = to_bits(x)
    tie = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    near = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + tie) >> np.uint32(16)
    is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint32(0x7FC0) if is_nan else np.uint32(near)


@njit(inline="always")
def rounded_to_float16(x):
    """The bits of the nearest float16, which has 10 bits of 23, and an exponent 112 lower."""
    bits = to_bits(x)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    sign = np.uint32(np.uint32(bits ^ size) >> np.uint32(16))
    tie = np.uint32((size >> np.uint32(13)) & np.uint32(1))
    cut = np.uint32(np.uint32(np.uint32(size + np.uint32(0xFFF)) + tie) >> np.uint32(13))
    normal = np.uint32(cut - np.uint32(112 << 10))
    # below 2**-14 float16 counts in steps of 2**-24, which is the last place of numbers near 0.5
    steps = np.uint32(to_bits(np.float32(from_bits(size) + np.float32(0.5))) - 0x3F000000)
    near = steps if size < np.uint32(0x38800000) else normal
    large = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else np.uint32(0x7C00)
    near = large if size >= np.uint32(0x47800000) else near  # 2**16
    return np.uint16(np.uint32(near | sign))


@njit(inline="always")
def from_float16(half):
    """The float32 of a float16's bits, exactly."""
    bits = np.uint32(half)
    size = np.uint32(np.uint32(bits & np.uint32(0x7FFF)) << np.uint32(13))
    sign = np.uint32(np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))
    # its steps of 2**-24 are the last place of numbers from 2**-14: no float32 here is subnormal
    steps = np.float32(from_bits(np.uint32(size | np.uint32(0x38800000))) - _SMALLEST)
    is_subnormal = size < np.uint32(0x0400 << 13)
    near = to_bits(steps) if is_subnormal else np.uint32(size + np.uint32(112 << 23))
    is_rare = size >= np.uint32(0x7C00 << 13)  # infinite, or no number
    near = np.uint32(size | np.uint32(0x7F800000)) if is_rare else near
    return from_bits(np.uint32(near | sign))
