"""Exercise 4: what a weight costs."""


def bits(n: int, *, double_quant: bool) -> float:
    """Stored bits a weight of an NF4 tensor of n weights, with blocks of 64, all bytes counted.

    Without double quantisation: codes, and a float32 scale for each block.  With it: codes, an
    8-bit code for each block, a float32 scale for each 256 of these, and one float32 offset.  The
    last byte and the last blocks may be only partly used.
    """
    raise NotImplementedError
