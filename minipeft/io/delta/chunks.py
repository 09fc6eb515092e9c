"""The arithmetic of deltas, a chunk of numbers at a time, so that memory does not grow with it.

    difference   tuned - base, in float32 (float64 if one is), rounded to the delta's dtype
    total        base + delta, in the same, rounded to the result's dtype

Neither undoes the other in every bit: where the base is much larger than the tuned number, the
difference has no room for the last bits of the tuned one; -0.0 comes back as 0.0; and a difference
in 16 bits is rounded.  So make_delta computes the total too and keeps what differs.  Integers wrap
around, and truth values are combined by exclusive or: both are exact.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**18  # numbers; some 10 copies in float32 or int64 live at a time, 16 MiB
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Base:
    """A base tensor by flat chunks; rows that the shape has beyond the tensor's are made up.

    `rows` "zeros": they count as 0.  "mean": each is the mean of the tensor's rows, summed in
    float64 and rounded to float32, as a resized vocabulary begins in Alpaca.
    """

    def __init__(self, tensor: Tensor, shape: tuple[int, ...], rows: str | None) -> None:
        self._flat = tensor.reshape(-1)
        self._row = tensor.new_empty(0)
        if tuple(tensor.shape) != shape:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            total = torch.zeros(shape[1:], dtype=torch.float64, device="cpu")
            if rows == "mean":
                step = max(1, CHUNK // max(1, total.numel()))
                for start in range(0, len(tensor), step):
                    total += tensor[start : start + step].double().sum(0)
                total /= len(tensor)
            self._row = total.to(wide).reshape(-1)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Numbers `start` to `stop` of the tensor, row by row."""
        own = self._flat[start:stop]
        if len(own) == stop - start:
            return own
        places = torch.arange(max(start, len(self._flat)), stop, device="cpu")
        made = self._row[(places - len(self._flat)) % len(self._row)]
        return torch.cat([own.to(made.dtype), made])


def chunks_of(numbers: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """First and last (excluded) number of each chunk."""
    for start in range(0, numbers, size):
        yield start, min(start + size, numbers)


def difference(base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Tensor:
    """tuned - base, in the delta's dtype."""
    if not tuned.is_floating_point():
        return tuned ^ base if tuned.dtype == torch.bool else tuned - base
    wide = _wide(base, tuned)
    return (tuned.to(wide) - base.to(wide)).to(dtype)


def total(base: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """base + delta, in the result's dtype."""
    if not delta.is_floating_point():
        return base ^ delta if delta.dtype == torch.bool else base + delta
    wide = _wide(base, delta)
    return (base.to(wide) + delta.to(wide)).to(dtype)


def where_bits_differ(one: Tensor, other: Tensor) -> Tensor:
    """Places in two chunks of one dtype, int32, whose bits differ: 0.0 is not -0.0."""
    kind = _BITS[one.element_size()]
    return (one.view(kind) != other.view(kind)).nonzero()[:, 0].to(torch.int32)


def is_finite(chunk: Tensor) -> bool:
    """Whether there is no NaN and no Inf."""
    if chunk.is_floating_point() and chunk.element_size() == 1:
        chunk = chunk.float()  # torch has no isfinite for floats of 8 bits
    return bool(chunk.isfinite().all())


def is_zero(tensor: Tensor) -> bool:
    """Whether all numbers are 0, in float64: torch counts no floats of 8 bits."""
    flat = tensor.reshape(-1)
    return not any(bool(flat[a:b].double().any()) for a, b in chunks_of(len(flat)))


def wider(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The dtype that holds the numbers of both; of float16 and bfloat16 that is float32."""
    small = [own for own in {one, other} if own.is_floating_point and own.itemsize == 1]
    if one == other or not small:
        return torch.promote_types(one, other)
    rest = {one, other} - set(small)
    return rest.pop() if rest else torch.float32


def _wide(one: Tensor, other: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where one of the two is that."""
    return torch.float64 if torch.float64 in (one.dtype, other.dtype) else torch.float32
