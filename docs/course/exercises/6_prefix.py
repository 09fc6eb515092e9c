"""Exercise 6: attention with a prefix, as a blend of two attentions."""

from torch import Tensor


def blended(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Attention of q over [prefix_k, k] and [prefix_v, v], without joining them.

    All are (heads, positions, dim); there is no mask.  Attend to the tokens and to the prefix, and
    take (1 - w) of the first and w of the second, w for each head and query.  Scores are q k^T /
    sqrt(dim); torch.logsumexp keeps large ones from overflowing.
    """
    raise NotImplementedError
