"""Double quantisation: the scales of NF4, quantised too (QLoRA, Dettmers et al. 2023).

One float32 absmax for 64 weights costs half a bit a weight.  The absmax of a tensor are all at
least 0 and lie near each other, so their mean (the offset) is subtracted first: 8 bits are finer
for the small differences that are left.  Differences go both ways, so the map of 8-bit codes to
values is signed; it has 7 decades of magnitudes, and more values in the larger ones.  A block of
256 differences is divided by its largest magnitude (the scale), as nf4.py divides weights.

    absmax   0.081  0.074  0.079 ...     float32, one for 64 weights         32 / 64
    offset   0.076                       float32, one for the tensor
    scale    0.012                       float32, one for 256 absmax         32 / (64 * 256)
    code       213     59    201         uint8, one for each absmax           8 / 64

8/64 + 32/(64*256) = 0.127 bits a weight instead of 0.5.  Read next: qlora.py.
"""

import functools
import math
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from minipeft import nf4, ops
from minipeft.ops import Packed

ABSMAX_BLOCK_SIZE = 256  # scales in a block: QLoRA's


@functools.cache
def dynamic_codebook() -> tuple[float, ...]:
    """The 256 values of the signed 8-bit dynamic map, ascending, from -0.99297 to 1.

    Decade i in 0..6 spans 10**(i-7) to 10**(i-6); the middles of its 2**i equal parts are values,
    of either sign; zero and one are added.  In every bit the map that bitsandbytes makes.

    >>> values = dynamic_codebook()
    >>> len(values), values[127], values[-1]
    (256, 0.0, 1.0)
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = nf4.evenly_spaced(0.1, 1.0, 2**decade)
        means = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += means + [-mean for mean in means]
    return tuple(torch.tensor(sorted(values), dtype=torch.float32).tolist())


@functools.cache
def dynamic_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of the map, and the float32 midpoints between neighbours."""
    values = torch.tensor(dynamic_codebook(), dtype=torch.float32, device=device)
    return values, (values[1:] + values[:-1]) / 2


def ordered_mean(x: Float32[Tensor, " n"]) -> Float32[Tensor, " one"]:
    """The mean, summed in float64: the upper half is added to the lower half until one is left.

    These are elementwise additions, so the sum does not depend on the device or on threads.
    """
    sums = x.double()
    while sums.numel() > 1:
        lower, upper = sums.chunk(2)  # an odd one is the lower half's
        lower[: upper.numel()] += upper
        sums = lower
    return (sums.sum() / max(1, x.numel())).float().view(1)


def _encoded_shapes(given: Any) -> tuple[Tensor, Tensor, Tensor]:
    absmax, size = given.absmax, given.block_size
    groups = (absmax.numel() + size - 1) // size  # may be symbolic
    code = absmax.new_empty(absmax.shape, dtype=torch.uint8)
    return code, absmax.new_empty((groups,)), absmax.new_empty((1,))


@ops.operator(
    "quantize_absmax",
    "(Tensor absmax, int block_size) -> (Tensor, Tensor, Tensor)",
    shapes=_encoded_shapes,
)
def encode(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, their scales, and the offset."""
    flat = absmax.flatten()
    offset = ordered_mean(flat)
    scaled, scale = nf4.scaled_blocks(flat - offset, block_size)
    _, midpoints = dynamic_tables(flat.device)
    nearest = torch.bucketize(scaled.flatten(), midpoints)  # a tie goes to the lower code
    return nearest[: flat.numel()].to(torch.uint8).view(absmax.shape), scale, offset


@ops.operator(
    "dequantize_absmax",
    "(Tensor code, Tensor scale, Tensor offset, int block_size) -> Tensor",
    shapes=lambda given: torch.empty_like(given.code, dtype=torch.float32),
)
def decode(code: Tensor, scale: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """The scales of weights: value[code] * scale + offset."""
    values, _ = dynamic_tables(code.device)
    scales = scale.repeat_interleave(block_size)[: code.numel()]
    rest = values.index_select(0, code.flatten().int())
    return rest.mul_(scales).add_(offset).view(code.shape)


def decoded_absmax(weight: Packed) -> Tensor:
    """The float32 scales of a 4-bit weight, decoded if they are 8-bit codes."""
    if weight.scale is None or weight.offset is None:
        return weight.absmax
    absmax: Tensor = torch.ops.minipeft.dequantize_absmax(
        weight.absmax, weight.scale, weight.offset, ABSMAX_BLOCK_SIZE
    )
    return absmax


@ops.operator(
    "dequantize_nf4",
    "(Packed weight, SymInt[] shape, ScalarType dtype) -> Tensor",
    shapes=lambda given: given.weight.packed.new_empty(given.shape, dtype=given.dtype),
)
def decode_weights(weight: Packed, shape: list[int], dtype: torch.dtype) -> Tensor:
    """First the scales, then the weights, by nf4.py's `decode`."""
    return nf4.decode(weight._replace(absmax=decoded_absmax(weight)), shape, dtype)


def quantize_absmax(
    absmax: Float32[Tensor, "*shape"], *, block_size: int = ABSMAX_BLOCK_SIZE
) -> tuple[UInt8[Tensor, "*shape"], Float32[Tensor, " n_groups"], Float32[Tensor, " one"]]:
    """8-bit codes of `absmax` less its mean: code, scale (one for `block_size` codes), offset.

    The nearest value of the dynamic map, ties to the lower one.  The default 256 is QLoRA's.

    Raises:
        ValueError: absmax is not float32, not finite, or block_size is below 1.

    >>> code, scale, offset = quantize_absmax(torch.tensor([1.0, 2.0, 3.0]))
    >>> dequantize_absmax(code, scale, offset)
    tensor([1.0070, 2.0000, 3.0000])
    """
    if absmax.dtype != torch.float32:
        raise ValueError(f"quantize_absmax: expected float32 scales, got {absmax.dtype}")
    if block_size < 1:
        raise ValueError(f"quantize_absmax: block_size={block_size}; expected at least 1")
    if not absmax.is_meta and not bool(absmax.isfinite().all()):
        raise ValueError("quantize_absmax: scales must be finite; quantise finite weights")
    code, scale, offset = torch.ops.minipeft.quantize_absmax(absmax.detach(), block_size)
    return code, scale, offset


def dequantize_absmax(
    code: UInt8[Tensor, "*shape"],
    scale: Float32[Tensor, " n_groups"],
    offset: Float32[Tensor, " one"],
    *,
    block_size: int = ABSMAX_BLOCK_SIZE,
) -> Float32[Tensor, "*shape"]:
    """The scales that codes stand for: value[code] * scale + offset, in float32.

    Raises:
        ValueError: there is not one scale for every `block_size` codes.
    """
    groups = math.ceil(code.numel() / block_size)
    if scale.numel() != groups or offset.numel() != 1:
        raise ValueError(
            f"dequantize_absmax: {code.numel()} codes take {groups} scales and 1 offset; got "
            f"{scale.numel()} and {offset.numel()}"
        )
    return ops.call("dequantize_absmax", code, scale, offset, block_size)
