"""Exercise 1: the gradients of both factors, by hand."""

from torch import Tensor


def gradients(x: Tensor, a: Tensor, b: Tensor, scaling: float, g: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dA (rank, in) and dL/dB (out, rank) of y = scaling * x A^T B^T.

    x is (rows, in), g = dL/dy is (rows, out).  No autograd, and no matrix of (out, in).
    """
    raise NotImplementedError
