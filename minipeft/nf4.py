"""4-bit NormalFloat: 16 values, blocks, and two codes in a byte (QLoRA, Dettmers et al. 2023).

Weights of a trained layer look like draws from a normal distribution.  NF4's 16 values are normal
quantiles, chosen for about equal use of each.  Every block of 64 weights stores its largest
magnitude (absmax), and every weight the index of the value nearest to weight / absmax.  The widest
gap between two values is that from -1 to -0.696, and a rounding error is at most half a gap: a
weight is off by at most 0.152 absmax.

    weights   0.31 -0.62  0.05  0.11 ...     one block of 64
    absmax    0.62                           float32
    / absmax  0.50 -1.00  0.08  0.18         in [-1, 1]
    code        12     0     8     9         index into NF4_CODEBOOK
    packed    0xC0        0x89               the first code of a byte is its high nibble

4 bits for the code and 32/64 for the absmax: 4.5 bits a weight; double_quant.py makes it 4.127.
`encode` and `decode` are the whole format; fast/nf4.py computes the same bits four times as fast.
Read next: double_quant.py.
"""

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from minipeft import ops

BLOCK_SIZES = tuple(2**k for k in range(5, 13))  # 32..4096, as bitsandbytes
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def evenly_spaced(start: float, end: float, parts: int) -> Float32[Tensor, " parts_and_one"]:
    """The ends of equal parts, counted from the nearer end and rounded to float32 once.

    torch.linspace rounds twice on some processors, and tables made with it would differ there.
    """
    first, last = torch.tensor([start, end], dtype=torch.float32, device="cpu").double()
    step = ((last - first).float() / parts).double()
    i = torch.arange(parts + 1, device="cpu").double()
    return torch.where(i < (parts + 1) // 2, first + step * i, last - step * (parts - i)).float()


def normal_float_codebook(bits: int = 4) -> tuple[float, ...]:
    """The 2**bits values of NormalFloat: quantiles of the standard normal, scaled to [-1, 1].

    Zero is one of them, so that zeros of a weight and of padding stay zero.  An odd number is left:
    for 4 bits, 8 values above zero and 7 below.  Each side has the quantiles of evenly spaced
    probabilities between 1/2 and an offset below 1, whose quantile is infinite: the mean of
    1 - 1/(2 * 16) and 1 - 1/(2 * 15), the middles of the last of 16 and of 15 equal parts of
    probability.  Probabilities and values are rounded to float32, and the offset to 7 decimals, so
    that for 4 bits the result equals the published table in every bit.

    Raises:
        ValueError: bits outside 2..8.

    >>> normal_float_codebook(4)[:2]
    (-1.0, -0.6961928009986877)
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"normal_float_codebook: bits={bits}; choose 2 to 8")
    half = 2 ** (bits - 1)
    offset = round(1 - (1 / (2 * half - 1) + 1 / (2 * half)) / 4, 7)
    values = [0.0]
    for count, sign in ((half, 1.0), (half - 1, -1.0)):
        probabilities = evenly_spaced(offset, 0.5, count)[:-1].tolist()
        values += [sign * NormalDist().inv_cdf(p) for p in probabilities]
    rounded = torch.tensor(sorted(values), dtype=torch.float32)
    return tuple((rounded / rounded.max()).tolist())


NF4_CODEBOOK = normal_float_codebook(4)


@functools.cache
def codebook_on(device: torch.device) -> Float32[Tensor, " 16"]:
    """NF4_CODEBOOK as a tensor on this device."""
    return torch.tensor(NF4_CODEBOOK, dtype=torch.float32, device=device)


def scaled_blocks(
    x: Float[Tensor, " n"], block_size: int
) -> tuple[Float32[Tensor, "n_blocks block_size"], Float32[Tensor, " n_blocks"]]:
    """Blocks of `x` times the float32 reciprocal of their absmax, and absmax.

    Zeros fill the last block; they change no absmax.  The reciprocal of a subnormal number can
    overflow, so a block with such an absmax counts as zero: absmax 0, every value 0.  A value that
    is not finite makes the absmax of its block so.
    """
    x, missing = x.float(), -x.numel() % block_size
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    blocks = rearrange(x, "(n_blocks i) -> n_blocks i", i=block_size)
    absmax = blocks.abs().amax(dim=1)
    absmax = torch.where(absmax < _SMALLEST_NORMAL, 0.0, absmax)
    return blocks * torch.where(absmax == 0, 0.0, absmax.reciprocal())[:, None], absmax


def pack_pairs(codes: UInt8[Tensor, " two_n"]) -> UInt8[Tensor, " n"]:
    """Two 4-bit codes in a byte, the first in the high nibble."""
    high, low = rearrange(codes, "(n two) -> two n", two=2)
    packed: Tensor = (high << 4) | low
    return packed


def unpack_pairs(packed: UInt8[Tensor, "*shape"]) -> UInt8[Tensor, " two_n"]:
    """The codes in their order, flat: the high nibble of a byte first."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()


def _encoded_shapes(given: Any) -> tuple[Tensor, Tensor]:
    n, size, empty = given.w.numel(), given.block_size, given.w.new_empty
    absmax = empty(((n + size - 1) // size,), dtype=torch.float32)  # n may be symbolic
    return empty(((n + 1) // 2,), dtype=torch.uint8), absmax


@ops.operator(
    "quantize_nf4", "(Tensor w, int block_size) -> (Tensor, Tensor)", shapes=_encoded_shapes
)
def encode(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes and absmax of the flattened `w`."""
    scaled, absmax = scaled_blocks(w.flatten(), block_size)
    check_finite("quantize_nf4", w, absmax)
    values = codebook_on(w.device)
    midpoints = (values[1:] + values[:-1]) / 2  # in float32, as every reader of NF4 rounds them
    codes = torch.bucketize(scaled.flatten(), midpoints)  # a tie goes to the lower code
    packed = pack_pairs(codes.to(torch.uint8))
    return packed[: math.ceil(w.numel() / 2)], absmax


def decode(weight: ops.Packed, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The weights: codebook[code] * absmax in float32, rounded once to `dtype`.

    A zero block stays zero: its codes are those of the value 0, whatever scale multiplies it.
    """
    packed, absmax, block_size, *_, codebook = weight  # with float32 absmax
    n = math.prod(shape)
    values = codebook_on(packed.device) if codebook is None else codebook
    scales = absmax.flatten().repeat_interleave(block_size)[:n]
    weights = values[unpack_pairs(packed)[:n].int()] * scales
    return weights.to(dtype).view(shape)


def check_finite(caller: str, w: Tensor, absmax: Tensor) -> None:
    """Raise ValueError with the first value of `w` that is not finite, if absmax has any."""
    if bool(absmax.isfinite().all()):
        return
    index = tuple((~w.isfinite()).nonzero()[0].tolist())
    raise ValueError(
        f"{caller}: {w[index].item()} at index {index} of a tensor of shape {tuple(w.shape)}; "
        "weights must be finite"
    )


def check_block_size(caller: str, block_size: int) -> None:
    """Raise ValueError unless `block_size` is a power of two in 32..4096."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"{caller}: block_size={block_size!r}; choose one of {list(BLOCK_SIZES)} "
            "(64 is QLoRA's and the one most checkpoints use)"
        )


def check_sizes(
    caller: str, codes: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int, in_byte: int
) -> None:
    """Raise ValueError unless this is the number of codes and scales of a weight of this shape."""
    check_block_size(caller, block_size)
    n = math.prod(shape)
    expected = (math.ceil(n / in_byte), math.ceil(n / block_size))
    if (codes.numel(), absmax.numel()) != expected:
        raise ValueError(
            f"{caller}: shape {tuple(shape)} with block_size={block_size} takes {expected[0]} "
            f"bytes and {expected[1]} scales; got {codes.numel()} and {absmax.numel()}"
        )


def check_weights(caller: str, w: object) -> None:
    """Raise unless `w` is a tensor in float32, float16 or bfloat16."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{caller}: expected a tensor, got {type(w).__name__}")
    if w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{caller}: dtype {w.dtype}; expected float32, float16 or bfloat16 "
            "(convert the weights first; packed 4-bit weights cannot be quantised again)"
        )


def quantize_nf4(
    w: Float[Tensor, "*shape"], *, block_size: int = 64
) -> tuple[UInt8[Tensor, " bytes"], Float32[Tensor, " n_blocks"]]:
    """NF4 codes and block scales of `w`, over the flattened tensor (QLoRA, section 3).

    Returns `packed`, (ceil(n/2),) bytes, and `absmax`, (ceil(n/block_size),) float32.  An odd
    count is padded with code 7, the code of zero.  Computed in float32 in chunks: needs less than
    64 MiB beside the result, also for a `w` that is not contiguous.  The default 64 is QLoRA's.

    Raises:
        TypeError: `w` is not a tensor.
        ValueError: `w` holds integers, NaN or Inf (the message has the index of the first), or
            block_size is not a power of two in 32..4096.

    >>> packed, absmax = quantize_nf4(torch.tensor([1.0, -1.0, 0.5626, 0.0]))
    >>> [hex(byte) for byte in packed], absmax
    (['0xf0', '0xd7'], tensor([1.]))
    """
    check_weights("quantize_nf4", w)
    check_block_size("quantize_nf4", block_size)
    packed, absmax = torch.ops.minipeft.quantize_nf4(w.detach(), block_size)
    return packed, absmax


def dequantize_nf4(
    packed: UInt8[Tensor, "*packed_shape"],
    absmax: Float32[Tensor, "*absmax_shape"],
    shape: tuple[int, ...] | torch.Size,
    *,
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape"]:
    """The weights that codes and scales stand for: NF4_CODEBOOK[code] * absmax, of `shape`.

    The product is taken in float32 and rounded once to `dtype`.

    Raises:
        ValueError: the sizes of packed, absmax and shape do not belong together, packed is not
            uint8, absmax not float32, or `dtype` not a floating-point dtype.

    >>> dequantize_nf4(torch.tensor([0xF0], dtype=torch.uint8), torch.tensor([2.0]), (2,))
    tensor([ 2., -2.])
    """
    check_sizes("dequantize_nf4", packed, absmax, shape, block_size, 2)
    if packed.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise ValueError(
            f"dequantize_nf4: expected uint8 codes and float32 scales; got {packed.dtype} and "
            f"{absmax.dtype}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dequantize_nf4: dtype={dtype}; expected a floating-point dtype")
    weight = ops.Packed(packed, absmax, block_size)
    return ops.call("dequantize_nf4", weight, list(shape), dtype)
