"""Which output rows of a fused projection belong to the query, the key and the value.

    blocks          q | k | v                              GPT-2, MPT, ChatGLM2, Phi-3, gate | up
    per_head        q k v of head 1, of head 2, ...        ChatGLM-6B, BLOOM, GPT-NeoX, Falcon-RW
    per_group       q .. q k v of group 1, of group 2, ..  Falcon-40B; with one group Falcon-7B
    model_parallel  q v k of block 1, .. of block 4        CodeGen, MOSS

Each function gives {name: row numbers}, in the order in which the model makes heads of them.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from einops import rearrange
from torch import Tensor

Rows = dict[str, Tensor]


def _arange(*ends: int) -> Tensor:
    return torch.arange(*ends, device="cpu")  # not the meta device, where a model may be built


def blocks(sizes: Mapping[str, int]) -> Rows:
    """One slice after the other.

    >>> blocks({"q": 2, "kv": 1})
    {'q': tensor([0, 1]), 'kv': tensor([2])}
    """
    bounds = pairwise(accumulate(sizes.values(), initial=0))
    return {name: _arange(*ends) for name, ends in zip(sizes, bounds, strict=True)}


def per_head(n_heads: int, head_dim: int, names: Sequence[str] = ("q", "k", "v")) -> Rows:
    """For each head its query, key and value.

    >>> per_head(n_heads=2, head_dim=1)
    {'q': tensor([0, 3]), 'k': tensor([1, 4]), 'v': tensor([2, 5])}
    """
    rows = _arange(n_heads * len(names) * head_dim)
    parts = rearrange(rows, "(h n d) -> n (h d)", h=n_heads, n=len(names))
    return dict(zip(names, parts, strict=True))


def per_group(n_heads: int, n_kv_heads: int, head_dim: int) -> Rows:
    """For each group its queries, then its one key, then its one value.

    Raises:
        ValueError: the groups do not divide the heads.
    """
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"per_group: {n_heads} heads in {n_kv_heads} groups; expected a divisor of {n_heads}"
        )
    rows = _arange((n_heads + 2 * n_kv_heads) * head_dim)
    heads = rearrange(rows, "(g n d) -> g n d", g=n_kv_heads, d=head_dim)
    return {"q": heads[:, :-2].flatten(), "k": heads[:, -2].flatten(), "v": heads[:, -1].flatten()}


def model_parallel(n_heads: int, head_dim: int, *, n_blocks: int = 4) -> Rows:
    """`n_blocks` blocks, each with the query, the value and the key of its heads, in this order.

    Raises:
        ValueError: the blocks do not divide the heads.
    """
    if n_blocks < 1 or n_heads % n_blocks:
        raise ValueError(
            f"model_parallel: {n_heads} heads in {n_blocks} blocks; expected a divisor of {n_heads}"
        )
    rows = _arange(3 * n_heads * head_dim)
    query, value, key = rearrange(rows, "(m n d) -> n (m d)", m=n_blocks, n=3)
    return {"q": query, "k": key, "v": value}
