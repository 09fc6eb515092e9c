"""4-bit NormalFloat: 16 values, blocks, and two codes in a byte (QLoRA, Dettmers et al. 2023).

Weights of a trained layer look like draws from a normal distribution.  NF4's 16 values are normal
quantiles, so each is used about equally often; every block of 64 weights stores its largest
magnitude (absmax), and every weight the index of the value nearest to weight / absmax.

    weights   0.31 -0.62  0.05  0.11 ...     one block of 64
    absmax    0.62                           float32
    / absmax  0.50 -1.00  0.08  0.18         in [-1, 1]
    code        12     0     8     9         index into NF4_CODEBOOK
    packed    0xC0        0x89               the first code of a byte is its high nibble

4 bits for the code and 32/64 for the absmax: 4.5 bits a weight; double_quant.py makes it 4.127.
Read next: double_quant.py.
"""

import functools
import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from einops import rearrange
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from minipeft import ops

BLOCK_SIZES = tuple(2**k for k in range(5, 13))  # 32..4096, as bitsandbytes
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_BINS = 4096  # of the encoding table; the narrowest gap between midpoints is 334 bins wide


def normal_float_codebook(bits: int = 4) -> tuple[float, ...]:
    """The 2**bits values of NormalFloat: quantiles of the standard normal, scaled to [-1, 1].

    2**(bits-1) quantiles above zero, one fewer below, and zero itself.  Probabilities run from
    1/2 to an offset that is the mean of 1 - 1/(2 * 15) and 1 - 1/(2 * 16) for 4 bits, since the
    quantile of 1 is infinite.  Probabilities and values are rounded to float32 (and the offset to
    7 decimals) as in the published table, which the result for 4 bits equals to the bit.

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
        ends = torch.linspace(offset, 0.5, count + 1, dtype=torch.float32)
        probabilities = ends[:-1].tolist()
        values += [sign * NormalDist().inv_cdf(p) for p in probabilities]
    rounded = torch.tensor(sorted(values), dtype=torch.float32)
    return tuple((rounded / rounded.max()).tolist())


NF4_CODEBOOK = normal_float_codebook(4)
_ZERO_CODE = NF4_CODEBOOK.index(0.0)  # 7


@functools.cache
def _encoding_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """Per bin of [-1, 1]: the code at its lower edge, and the midpoint above that code.

    A bin is narrower than any gap between midpoints, so one comparison with that midpoint gives
    the code.  The edge is taken 1e-6 lower, since computing a bin's number in float32 is off by
    up to 2e-7 of [-1, 1]: a value is never in a bin whose lower code is already too high.
    """
    values = torch.tensor(NF4_CODEBOOK, dtype=torch.float32)
    midpoints = (values[1:] + values[:-1]) / 2  # float32, as every reader of NF4 rounds them
    edges = torch.arange(_BINS, dtype=torch.float64) * (2 / _BINS) - 1 - 1e-6
    lower = torch.bucketize(edges, midpoints.double())
    above = torch.cat([midpoints, midpoints.new_tensor([math.inf])])[lower]
    return lower.to(torch.uint8).to(device), above.to(device)


def _pair_table(values: Tensor) -> Tensor:
    """For each byte the two float32 values it stands for, as one int64 each: 256 entries."""
    high, low = values.repeat_interleave(16), values.repeat(16)
    return torch.stack([high, low], dim=1).view(torch.int64).flatten()


@functools.cache
def _nf4_pairs(device: torch.device) -> Tensor:
    return _pair_table(torch.tensor(NF4_CODEBOOK, dtype=torch.float32, device=device))


def chunk_elements(device: torch.device) -> int:
    """Weights to work on at a time.

    On a CPU the float32 temporaries of a chunk stay in a core's cache; elsewhere launches are
    few and temporaries below 64 MiB.
    """
    return 2**17 if device.type == "cpu" else 2**21


def scaled_blocks(
    blocks: Float[Tensor, "n_blocks block_size"],
) -> tuple[Float32[Tensor, "n_blocks block_size"], Float32[Tensor, " n_blocks"]]:
    """Blocks times the float32 reciprocal of their absmax, and absmax.

    A block whose absmax is no normal number is zero.  What is not finite stays so in absmax.
    """
    x = blocks.float()
    absmax = x.abs().amax(dim=1)
    absmax = torch.where(absmax < _SMALLEST_NORMAL, 0.0, absmax)
    return x * torch.where(absmax == 0, 0.0, absmax.reciprocal())[:, None], absmax


def encode_blocks(
    blocks: Float[Tensor, "n_blocks block_size"],
) -> tuple[UInt8[Tensor, "n_blocks bytes"], Float32[Tensor, " n_blocks"]]:
    """NF4 of whole blocks: the rule, without chunks.

    The higher of two codes is taken only strictly above their float32 midpoint.
    """
    lower, above = _encoding_table(blocks.device)
    x, absmax = scaled_blocks(blocks)
    bins = ((x + 1) * (_BINS / 2)).int().clamp_(0, _BINS - 1).flatten()
    step_up = x.flatten() > above.index_select(0, bins)
    code = lower.index_select(0, bins) + step_up.view(torch.uint8)
    return pack_pairs(code.view(blocks.shape)), absmax


def pack_pairs(codes: UInt8[Tensor, "rows two_n"]) -> UInt8[Tensor, "rows n"]:
    """Two 4-bit codes in a byte, the first in the high nibble."""
    high, low = rearrange(codes, "rows (n two) -> two rows n", two=2)
    packed: Tensor = (high << 4) | low
    return packed


Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def quantize_blocks(
    caller: str, w: Tensor, block_size: int, encode: Encode
) -> tuple[Tensor, Tensor]:
    """Codes as bytes and absmax of `w` over its flattened blocks, a chunk of them at a time.

    `encode` turns (n_blocks, block_size) into (n_blocks, bytes) and absmax; how many weights
    share a byte is seen from it.  Zeros fill the last block: they change no absmax.
    """
    n, n_blocks = w.numel(), math.ceil(w.numel() / block_size)
    in_byte = block_size // encode(w.new_zeros(1, block_size))[0].shape[1]
    codes = torch.empty(math.ceil(n / in_byte), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(n_blocks, dtype=torch.float32, device=w.device)
    step = max(1, chunk_elements(w.device) // block_size)
    for first in range(0, n_blocks, step):
        last = min(first + step, n_blocks)
        chunk = flat_range(w, first * block_size, min(last * block_size, n))
        missing = -chunk.numel() % block_size
        if missing:
            chunk = torch.cat([chunk, chunk.new_zeros(missing)])
        block_codes, absmax[first:last] = encode(chunk.view(-1, block_size))
        start = first * block_size // in_byte
        part = codes[start : start + block_codes.numel()]
        part.copy_(block_codes.flatten()[: part.numel()])
    finite = absmax.isfinite()
    if not bool(finite.all()):
        start = int((~finite).int().argmax()) * block_size
        block = flat_range(w, start, min(start + block_size, n))
        inside = int((~block.isfinite()).int().argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(start + inside), w.shape))
        raise ValueError(
            f"{caller}: {block[inside].item()} at index {index} of a tensor of shape "
            f"{tuple(w.shape)}; weights must be finite"
        )
    return codes, absmax


def flat_range(w: Tensor, first: int, last: int) -> Tensor:
    """w.flatten()[first:last]; of a tensor that is not contiguous only the rows it takes."""
    while w.dim() > 1 and not w.is_contiguous():
        row = w[0].numel()
        top, bottom = first // row, max(first // row + 1, math.ceil(last / row))
        if bottom - top > 1:
            return w[top:bottom].reshape(-1)[first - top * row : last - top * row]
        w, first, last = w[top], first - top * row, last - top * row
    return w.reshape(-1)[first:last]


@ops.implements("quantize_nf4")
def _quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return quantize_blocks("quantize_nf4", w.detach(), block_size, encode_blocks)


def decode_into(
    out: Tensor, packed: Tensor, absmax: Tensor, block_size: int, codebook: Tensor | None = None
) -> None:
    """Write code * absmax into `out` (contiguous, any float dtype), rounding each product once.

    `packed` and `absmax` hold the blocks of `out` from its first element on; `codebook` is sixteen
    float32 values, NF4's if None.
    """
    flat, packed, absmax = out.view(-1), packed.reshape(-1), absmax.reshape(-1)
    table = _nf4_pairs(out.device) if codebook is None else _pair_table(codebook)
    n, step = flat.numel(), max(1, chunk_elements(out.device) // block_size) * block_size
    whole = n - n % block_size
    for first in range(0, whole, step):
        last = min(first + step, whole)
        pairs = table.index_select(0, packed[first // 2 : last // 2].int())
        blocks = pairs.view(torch.float32).view(-1, block_size)
        blocks.mul_(absmax[first // block_size : last // block_size, None])
        flat[first:last].view(-1, block_size).copy_(blocks)
    if whole < n:
        pairs = table.index_select(0, packed[whole // 2 :].int()).view(torch.float32)
        flat[whole:] = pairs[: n - whole] * absmax[-1]


def decode_at(packed: Tensor, index: Tensor, codebook: Tensor | None = None) -> Tensor:
    """The float32 codebook values, before scaling, of the weights with these flat numbers."""
    table = _nf4_pairs(packed.device) if codebook is None else _pair_table(codebook)
    byte = packed.reshape(-1).index_select(0, (index // 2).reshape(-1)).int()
    pairs = table.index_select(0, byte).view(torch.float32).view(-1, 2)
    return pairs.gather(1, (index % 2).view(-1, 1)).view(index.shape)


def decode(
    packed: Tensor,
    absmax: Tensor,
    shape: list[int],
    block_size: int,
    dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> Tensor:
    """A new tensor of `shape` with what `packed` and float32 `absmax` stand for."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    decode_into(out, packed, absmax, block_size, codebook)
    return out


def check_block_size(caller: str, block_size: int) -> None:
    """Raise ValueError unless `block_size` is a power of two in 32..4096."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"{caller}: block_size={block_size!r}; choose one of {list(BLOCK_SIZES)} "
            "(64 is QLoRA's and the one most checkpoints use)"
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
    count is padded with code 7, which is zero.  Computed in float32 in chunks: needs less than
    64 MiB beside the result, also for a `w` that is not contiguous.  The default 64 is QLoRA's.

    Raises:
        TypeError: `w` is no tensor.
        ValueError: `w` holds integers, NaN or Inf (the first one's index is named), or block_size
            is no power of two in 32..4096.

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
        ValueError: the sizes of packed, absmax and shape do not belong together, or their dtypes
            are not uint8 and float32.

    >>> dequantize_nf4(torch.tensor([0xF0], dtype=torch.uint8), torch.tensor([2.0]), (2,))
    tensor([ 2., -2.])
    """
    check_block_size("dequantize_nf4", block_size)
    n = math.prod(shape)
    expected = (math.ceil(n / 2), math.ceil(n / block_size))
    if (packed.numel(), absmax.numel()) != expected:
        raise ValueError(
            f"dequantize_nf4: shape {tuple(shape)} with block_size={block_size} takes "
            f"{expected[0]} bytes and {expected[1]} scales; got {packed.numel()} and "
            f"{absmax.numel()}"
        )
    if packed.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise ValueError(
            f"dequantize_nf4: expected uint8 codes and float32 scales; got {packed.dtype} and "
            f"{absmax.dtype}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dequantize_nf4: dtype={dtype}; expected a floating-point dtype")
    out: Tensor = torch.ops.minipeft.dequantize_nf4(
        packed, absmax, None, None, list(shape), block_size, dtype
    )
    return out
