"""Which tiles a product takes: a fixed table by kind of card and number of rows."""

from typing import NamedTuple

MOST_ROWS = 64  # above, decoding the weight once and the vendor's product are as fast


class Plan(NamedTuple):
    """Tile sizes of `product_kernel` or `gradient_kernel`, and how it is launched.

    `tile` is BN of the product and of the gradient; a step of the loop has `slices` of them, one
    for each warp, and the loop is divided among `parts` programs.
    """

    rows: int
    tile: int
    slices: int
    warps: int
    stages: int
    parts: int


def rows_of(m: int) -> int:
    """The tile's rows for m rows."""
    return 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64


PLAN: Plan | None = None  # set by the tuning benchmark: for every product


def plan_for(operator: str, m: int, n: int, k: int) -> Plan:
    """The plan of `nf4_linear` or `nf4_linear_input_gradient` for m rows and a weight (n, k)."""
    rows = rows_of(m)
    if operator == "nf4_linear":
        return Plan(rows, 32, 4, 4, 3, 1 if n >= 8192 else 2)
    return Plan(max(16, rows), 32, 4, 4, 3, 2 if k >= 8192 else 4)
