"""Exercise 1, solved."""

from torch import Tensor


def gradients(x: Tensor, a: Tensor, b: Tensor, scaling: float, g: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dA and dL/dB: the small tensor (rows, rank) comes first in both."""
    hidden, back = x @ a.T, g @ b  # both (rows, rank)
    return scaling * (back.T @ x), scaling * (g.T @ hidden)
