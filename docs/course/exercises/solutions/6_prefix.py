"""Exercise 6, solved."""

import torch
from torch import Tensor


def blended(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """w = sum of exp over the prefix / sum over all: a sigmoid of the difference of logsumexps."""
    scale = q.shape[-1] ** -0.5
    of_tokens, of_prefix = (scale * q @ keys.transpose(-1, -2) for keys in (k, prefix_k))
    sums = of_prefix.logsumexp(-1, keepdim=True) - of_tokens.logsumexp(-1, keepdim=True)
    w = torch.sigmoid(sums)
    return (1 - w) * (of_tokens.softmax(-1) @ v) + w * (of_prefix.softmax(-1) @ prefix_v)
