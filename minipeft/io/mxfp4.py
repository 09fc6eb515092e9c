"""MXFP4 weights in files, as gpt-oss has them: 32 values share a scale that is a power of two.

    name_blocks      (experts, out, in/32, 16) uint8    two codes in a byte, the first in the low
                                                        nibble
    name_scales      (experts, out, in/32) uint8        E8M0: the scale is 2^(byte - 127)

The codes are E2M1: a sign, two bits of exponent, one of mantissa.  Value times scale is exact in
float32, so the packed layers hold these weights in every bit, with E2M1's values as their codebook
and float32 scales.  In the model the weight is (experts, in, out): transformers transposes it.

Source: Open Compute Project, Microscaling Formats (MX) v1.0, sections 5.3 and 5.4.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from minipeft.io.bitsandbytes.weight import Settings
from minipeft.io.header import Spec

MXFP4 = "mxfp4"  # `quant_type` of such a weight, and `quant_method` of its checkpoint
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCK_SIZE = 32
_BLOCKS, _SCALES = "_blocks", "_scales"
_NAN = 255  # E8M0's only code that is no power of two


def groups(specs: Mapping[str, Spec]) -> dict[str, list[str]]:
    """The two tensors that belong to each MXFP4 weight of a file, by the weight's name."""
    names = (key.removesuffix(_BLOCKS) for key in specs if key.endswith(_BLOCKS))
    return {
        name: [name + _BLOCKS, name + _SCALES] for name in names
        if name + _SCALES in specs and specs[name + _BLOCKS][0] == torch.uint8
    }  # fmt: skip


def shape_of(name: str, specs: Mapping[str, Spec]) -> tuple[int, ...]:
    """(experts, out, in) of a weight.

    Raises:
        ValueError: codes and scales are not bytes of the shapes above.
    """
    (kind, blocks), (scale_kind, scales) = specs[name + _BLOCKS], specs[name + _SCALES]
    fits = len(blocks) == 4 and blocks[:-1] == scales and 2 * blocks[-1] == BLOCK_SIZE
    if not fits or {kind, scale_kind} != {torch.uint8} or 0 in blocks:
        raise ValueError(
            f"{name}: MXFP4 codes are {kind} {blocks}, scales {scale_kind} {scales}; expected "
            "bytes (experts, out, in/32, 16) and (experts, out, in/32)"
        )
    return (*blocks[:2], blocks[2] * BLOCK_SIZE)


def state_of(
    name: str, found: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Settings, dict[str, Tensor]]:
    """What a layer's `fill` takes; the dense weight's dtype is the caller's to say.

    Raises:
        ValueError: other shapes than MXFP4's, or a scale that is NaN.
    """
    shape = shape_of(name, {key: (t.dtype, tuple(t.shape)) for key, t in found.items()})
    scales = found[name + _SCALES].flatten()
    if bool((scales == _NAN).any()):
        raise ValueError(f"{name}{_SCALES}: holds NaN (E8M0 code 255)")
    codes = found[name + _BLOCKS].flatten()
    state = {
        "packed": (codes << 4) | (codes >> 4),  # our first code is in the high nibble
        "absmax": torch.ldexp(torch.ones(len(scales)), scales.int() - 127),
        "codebook": torch.tensor(E2M1),
    }
    return Settings(shape, dtype, BLOCK_SIZE, MXFP4, double_quant=False), state


def entries(
    name: str, packed: Tensor, absmax: Tensor, shape: tuple[int, ...]
) -> dict[str, Tensor] | None:
    """The file's tensors of a weight (experts, out, in) in our codes; None if a scale is no E8M0.

    `absmax` are the float32 scales.
    """
    mantissa, exponent = torch.frexp(absmax.flatten())
    scales = exponent + 126  # frexp's mantissa is 0.5
    if not bool(((mantissa == 0.5) & (scales >= 0) & (scales < _NAN)).all()):
        return None
    codes = packed.flatten()
    *rows, row = shape
    places = (*rows, row // BLOCK_SIZE)
    return {
        name + _BLOCKS: ((codes << 4) | (codes >> 4)).view(*places, BLOCK_SIZE // 2),
        name + _SCALES: scales.to(torch.uint8).view(places),
    }
