"""4-bit weights joined, split and reordered without decoding: whole blocks change their places.

What a move does is tried on numbers: each quarter of a block has one, a tensor of them in the shape
of each weight goes through the move, and what comes out says which block of which weight lies
where.  A move that changes the order within rows (columns turned, interleaved, transposed) does not
leave the four quarters of a block together, and is refused.

    one tensor per expert, 64 x 128 in blocks of 64        numbers (64, 8) of each
    stacked and concatenated, gate above up                numbers (experts, 128, 8)
    codes and scales                                       taken in the order of these numbers
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minipeft.double_quant import ABSMAX_BLOCK_SIZE, dequantize_absmax
from minipeft.io.bitsandbytes.weight import Settings

Coded = tuple[Settings, dict[str, Tensor]]  # what `state_of` gives for a weight
_PARTS = 4  # of a block, that must stay together
Move = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class NotWholeBlocksError(ValueError):
    """The move takes blocks apart, so that codes cannot follow it."""


def moved(pieces: Mapping[str, Coded], move: Move) -> dict[str, Coded]:
    """The codes that `move` would give if the weights were dense; no weight is decoded.

    Codes are those of the pieces.  Scales stay the same float32 numbers: they are kept decoded,
    since pieces that were quantised one by one have offsets of their own.

    Raises:
        NotWholeBlocksError: the pieces' block sizes, values or dtypes differ, or blocks would be
            taken apart.
        ValueError: the move itself fails.
    """
    first, state = next(iter(pieces.values()))
    size, codebook = first.block_size, state["codebook"]
    for name, (settings, own) in pieces.items():
        same = settings.block_size == size and torch.equal(own["codebook"], codebook)
        if not same or settings.dtype != first.dtype:
            raise NotWholeBlocksError(
                f"{name} has blocks of {settings.block_size}, {settings.quant_type}, "
                f"{settings.dtype}; {next(iter(pieces))} has {size}, {first.quant_type}, "
                f"{first.dtype}"
            )
        if math.prod(settings.shape) % size:
            raise NotWholeBlocksError(f"{name} ends in a part of a block")
    unit = math.gcd(size // _PARTS, *(settings.shape[-1] for settings, _ in pieces.values()))
    numbers, start = {}, 0
    for name, (settings, _) in pieces.items():
        *rows, row = settings.shape
        count = math.prod(settings.shape) // unit
        numbered = torch.arange(start, start + count, dtype=torch.int32)
        numbers[name] = numbered.view(*rows, row // unit)
        start += count
    made = {name: _blocks(name, value, size // unit) for name, value in move(numbers).items()}
    everywhere = torch.cat([blocks for blocks, _ in made.values()])
    each = torch.arange(start * unit // size, dtype=torch.int32)
    if not torch.equal(everywhere.sort().values, each):
        raise NotWholeBlocksError(f"{next(iter(made))} does not get every block once")
    codes = torch.cat([own["packed"].view(-1, size // 2) for _, own in pieces.values()])
    scales = torch.cat([_scales(own) for _, own in pieces.values()])
    return {
        name: (
            first._replace(shape=(*shape[:-1], shape[-1] * unit), double_quant=False),
            {
                "packed": codes.index_select(0, blocks).view(-1),
                "absmax": scales.index_select(0, blocks), "codebook": codebook,
            },
        )
        for name, (blocks, shape) in made.items()
    }  # fmt: skip


def _blocks(name: str, numbers: Tensor, units: int) -> tuple[Tensor, tuple[int, ...]]:
    """The number of each block, from the numbers of its units; and the shape in units."""
    if numbers.numel() % units:
        raise NotWholeBlocksError(f"{name} ends in a part of a block")
    runs, order = numbers.reshape(-1, units), torch.arange(units, dtype=torch.int32)
    starts = runs[:, 0]
    if bool((starts % units).any()) or not torch.equal(runs, starts[:, None] + order):
        raise NotWholeBlocksError(f"{name} has blocks of several origins")
    return starts // units, tuple(numbers.shape)


def _scales(state: Mapping[str, Tensor]) -> Tensor:
    """float32 scales of the blocks, flat."""
    if "absmax" in state:
        return state["absmax"].reshape(-1)
    code = state["absmax_code"].reshape(-1)
    return dequantize_absmax(
        code, state["absmax_scale"], state["absmax_offset"], block_size=ABSMAX_BLOCK_SIZE
    )
