"""Other data types: any codebook, in the blocks of NF4.

A data type is its codebook: 2 to 256 numbers in [-1, 1], which a block's absmax scales.  With at
most 16 of them two codes share a byte.  These are the types that the QLoRA paper compares
(Dettmers et al. 2023), here to be measured: quantising a layer gives NF4 (nf4.py).

    NF4       quantiles of a normal distribution        normal_float_codebook(4)
    FP4       a sign, 2 bits of exponent, 1 of mantissa FP4, in bitsandbytes' order
    FP4 E3M0  a sign, 3 bits of exponent                FP4_E3M0
    Int4      -7..7, evenly spaced                      int_codebook(4)
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from minipeft.nf4 import (
    check_block_size,
    check_finite,
    check_sizes,
    check_weights,
    normal_float_codebook,
    pack_pairs,
    scaled_blocks,
    unpack_pairs,
)

__all__ = [  # mp.codebooks
    "FP4",
    "FP4_E3M0",
    "check_codebook",
    "dequantize_blockwise",
    "int_codebook",
    "normal_float_codebook",
    "quantize_blockwise",
]


def _signed(magnitudes: Sequence[float]) -> tuple[float, ...]:
    """Magnitudes by their bits, then their negatives, over the largest, in float32."""
    values = torch.tensor(magnitudes, dtype=torch.float64) / max(magnitudes)
    half = values.to(torch.float32).tolist()
    return (*half, *(-value for value in half))


# E2M1 by its bits, a subnormal step of 1/16 of the smallest normal as in bitsandbytes; -0 is 0
FP4 = _signed([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0])
# E3M0: zero and seven powers of two
FP4_E3M0 = _signed([0.0, *(2.0**k for k in range(-6, 1))])


def int_codebook(bits: int) -> tuple[float, ...]:
    """Evenly spaced symmetric levels: -7..7 over 7 for 4 bits, -127..127 over 127 for 8.

    Raises:
        ValueError: bits outside 2..8.

    >>> len(int_codebook(4)), int_codebook(2)
    (15, (-1.0, 0.0, 1.0))
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"int_codebook: bits={bits!r}; choose 2 to 8")
    largest = 2 ** (bits - 1) - 1
    levels = torch.arange(-largest, largest + 1, dtype=torch.float32) / largest
    return tuple(levels.tolist())


def check_codebook(caller: str, codebook: Sequence[float]) -> tuple[float, ...]:
    """The codebook as a tuple.

    Raises:
        ValueError: not 2 to 256 numbers in [-1, 1], or none of magnitude 1, which absmax needs.
    """
    values = tuple(float(value) for value in codebook)
    if not 2 <= len(values) <= 256:
        raise ValueError(f"{caller}: a codebook of {len(values)} values; expected 2 to 256")
    if not all(-1 <= value <= 1 for value in values) or max(map(abs, values)) != 1:
        raise ValueError(
            f"{caller}: the codebook runs from {min(values)} to {max(values)}; expected values in "
            "[-1, 1] of which the largest has magnitude 1 (absmax scales it)"
        )
    return values


def quantize_blockwise(
    w: Float[Tensor, "*shape"], codebook: Sequence[float], *, block_size: int = 64
) -> tuple[UInt8[Tensor, " bytes"], Float32[Tensor, " n_blocks"]]:
    """Codes and block scales of `w` in any data type, over the flattened tensor.

    The code is that of the value nearest to weight / absmax, the lower of two at a tie; the rules
    of `quantize_nf4` otherwise.  Up to 16 values: (ceil(n/2),) bytes with two codes each, the
    first one high; more: (n,) bytes.  An odd count is padded with the code nearest to zero.  Works
    on the whole tensor at once, for which it needs about 20 bytes a weight.

    Raises:
        TypeError: `w` is no tensor.
        ValueError: `w` holds integers, NaN or Inf; the codebook is not 2 to 256 numbers in [-1, 1]
            of which one has magnitude 1; block_size is no power of two in 32..4096.

    >>> codes, absmax = quantize_blockwise(torch.tensor([7.0, -3.0, 1.0]), int_codebook(4))
    >>> [hex(code) for code in codes], absmax
    (['0xe4', '0x87'], tensor([7.]))
    """
    check_weights("quantize_blockwise", w)
    check_block_size("quantize_blockwise", block_size)
    values = check_codebook("quantize_blockwise", codebook)
    table = torch.tensor(values, dtype=torch.float32, device=w.device)
    ascending, code_of = torch.sort(table, stable=True)
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    scaled, absmax = scaled_blocks(w.detach().flatten(), block_size)
    check_finite("quantize_blockwise", w, absmax)
    codes = code_of.to(torch.uint8)[torch.bucketize(scaled.flatten(), midpoints, out_int32=True)]
    if len(values) > 16:
        return codes[: w.numel()], absmax
    return pack_pairs(codes)[: math.ceil(w.numel() / 2)], absmax


def dequantize_blockwise(
    codes: UInt8[Tensor, " bytes"],
    absmax: Float32[Tensor, " n_blocks"],
    shape: tuple[int, ...] | torch.Size,
    codebook: Sequence[float],
    *,
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape"]:
    """codebook[code] * absmax, of `shape`, in float32 and rounded once to `dtype`.

    Raises:
        ValueError: the sizes of codes, absmax and shape do not belong together, or a code is
            beyond the codebook.
    """
    values = check_codebook("dequantize_blockwise", codebook)
    n, in_byte = math.prod(shape), 2 if len(values) <= 16 else 1
    check_sizes("dequantize_blockwise", codes, absmax, shape, block_size, in_byte)
    numbers = (unpack_pairs(codes) if in_byte == 2 else codes)[:n].int()
    if n and (largest := int(numbers.max())) >= len(values):
        raise ValueError(f"dequantize_blockwise: code {largest} in a codebook of {len(values)}")
    table = torch.tensor(values, dtype=torch.float32, device=codes.device)
    scales = absmax.repeat_interleave(block_size)[:n]
    return (table[numbers] * scales).to(dtype).view(shape)
