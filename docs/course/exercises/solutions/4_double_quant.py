"""Exercise 4, solved."""

import math


def bits(n: int, *, double_quant: bool) -> float:
    """Bytes of codes and scales, times eight, over n."""
    codes, blocks = math.ceil(n / 2), math.ceil(n / 64)
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 if double_quant else 4 * blocks
    return 8 * (codes + scales) / n
