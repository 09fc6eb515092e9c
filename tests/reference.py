"""Slow, obvious, independent: NF4 and double quantisation in numpy, a loop over blocks.

Nothing of minipeft is imported.  float32 where the format says float32, float64 elsewhere.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# the published table (QLoRA, appendix E), as float32 in hexadecimal
_HEXADECIMAL = """
-0x1.0p+0      -0x1.6473620p-1 -0x1.0cd6600p-1 -0x1.9465400p-2
-0x1.23449a0p-2 -0x1.7a6a7e0p-3 -0x1.74f0e20p-4 0x0.0p+0
0x1.45f5fe0p-4  0x1.4995c60p-3  0x1.f809ba0p-3  0x1.5a06740p-2
0x1.c349700p-2  0x1.200f560p-1  0x1.7227660p-1  0x1.0p+0
"""
NF4 = np.array([float.fromhex(text) for text in _HEXADECIMAL.split()], dtype=np.float32)
SMALLEST_NORMAL = np.float32(2.0**-126)


def nf4_codes(x: Array) -> Array:
    """The code of each float32 in x: higher only if strictly above the float32 midpoint."""
    midpoints = ((NF4[1:] + NF4[:-1]) / np.float32(2)).astype(np.float32)
    codes = np.zeros(x.shape, dtype=np.uint8)
    for midpoint in midpoints:
        codes += (x > midpoint).astype(np.uint8)
    return codes


def quantize_nf4(w: Array, block_size: int) -> tuple[Array, Array]:
    """Packed bytes and float32 absmax of a float32 array, flattened."""
    flat = w.astype(np.float32).reshape(-1)
    codes, scales = [], []
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size]
        absmax = np.float32(np.abs(block).max())
        if absmax < SMALLEST_NORMAL:
            absmax = np.float32(0)
            scaled = np.zeros_like(block)
        else:
            scaled = block * (np.float32(1) / absmax)
        scales.append(absmax)
        codes.append(nf4_codes(scaled))
    code = np.concatenate([*codes, np.zeros(0, np.uint8)])
    if len(code) % 2:
        code = np.append(code, np.uint8(7))
    packed = ((code[0::2] << 4) | code[1::2]).astype(np.uint8)
    return packed, np.array(scales, dtype=np.float32)


def dequantize_nf4(packed: Array, absmax: Array, n: int, block_size: int) -> Array:
    """n float32 values: code * absmax, one float32 product each."""
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]
    return NF4[codes] * np.repeat(absmax.astype(np.float32), block_size)[:n]


def dynamic_map() -> Array:
    """The signed 8-bit dynamic map: per decade, the centres of evenly spaced intervals."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade
        for k in range(count):
            centre = 0.1 + 0.9 * (k + 0.5) / count
            values += [centre * 10.0 ** (decade - 6), -centre * 10.0 ** (decade - 6)]
    return np.array(sorted(values))


def quantize_absmax(absmax: Array, values: Array, block_size: int) -> tuple[Array, Array, Array]:
    """Codes, scales and offset, by trying all 256 values for each; ties to the lower."""
    # fsum is exact; a float64 sum in another order differs from it by less than a float32 ulp
    offset = np.float32(math.fsum(absmax.tolist()) / len(absmax))
    midpoints = ((values[1:] + values[:-1]) / np.float32(2)).astype(np.float32)
    codes, scales = [], []
    for start in range(0, len(absmax), block_size):
        rest = absmax[start : start + block_size] - offset
        scale = np.float32(np.abs(rest).max())
        if scale < SMALLEST_NORMAL:
            scale, scaled = np.float32(0), np.zeros_like(rest)
        else:
            scaled = rest * (np.float32(1) / scale)
        scales.append(scale)
        codes += [int((x > midpoints).sum()) for x in scaled]
    return np.array(codes, np.uint8), np.array(scales, np.float32), offset


def dequantize_absmax(
    codes: Array, scales: Array, offset: Any, values: Array, block_size: int
) -> Array:
    """value * scale + offset in float32, each operation rounded."""
    products = values[codes] * np.repeat(scales, block_size)[: len(codes)]
    return (products + np.float32(offset)).astype(np.float32)
