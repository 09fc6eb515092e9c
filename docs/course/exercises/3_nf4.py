"""Exercise 3: NF4 with loops."""


def quantize(weights: list[float], codebook: tuple[float, ...]) -> tuple[bytes, float]:
    """The packed codes and the scale of one block with an even number of weights.

    The scale is the largest magnitude.  A code is the index of the value in `codebook` that is
    nearest to weight / scale.  Two codes make a byte, the first in its high half.
    """
    raise NotImplementedError
