"""The order of rows in query and key projections with rotary positions: pairs, or halves.

Rotary positions turn two numbers of a head at a time.  Meta's code (and torchtune's Llama,
FlagAI's Aquila) takes neighbours, Hugging Face's takes number i and number i + dim / 2:

    pairs    x0 y0 x1 y1 x2 y2        halves    x0 x1 x2 y0 y1 y2

So the rows of wq and wk differ in order, and so do those of the B of LoRA on them: an adapter in
one order computes something else on a model of the other, without any error.
"""

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from minipeft.adapters.plain_names import PlainNames

ORDERS = ("pairs", "halves")


def halves_from_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (heads * head_dim, ...) in Hugging Face's order, from those in Meta's.

    Raises:
        ValueError: rows that are no whole number of heads; an odd head_dim.

    >>> import torch
    >>> halves_from_pairs(torch.tensor([0, 1, 2, 3]), head_dim=4)
    tensor([0, 2, 1, 3])
    """
    _check(rows, head_dim)
    return rearrange(rows, "(h d two) ... -> (h two d) ...", d=head_dim // 2, two=2)


def pairs_from_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (heads * head_dim, ...) in Meta's order, from those in Hugging Face's.

    Raises:
        ValueError: as halves_from_pairs.
    """
    _check(rows, head_dim)
    return rearrange(rows, "(h two d) ... -> (h d two) ...", d=head_dim // 2, two=2)


def _check(rows: Tensor, head_dim: int) -> None:
    if head_dim < 2 or head_dim % 2 or not rows.dim() or len(rows) % head_dim:
        raise ValueError(
            f"{tuple(rows.shape)} are no rows of heads of {head_dim} numbers; expected an even "
            "head_dim that divides them"
        )


def head_dim_of(model: nn.Module, name: str) -> int:
    """The numbers in a head of the attention module that holds the projection of this plain name.

    Raises:
        ValueError: neither the attention module nor the configuration says so.
    """
    modules = PlainNames(model).by_plain(dict(model.named_modules()))
    parent = modules[name.rpartition(".")[0]]
    config: Any = getattr(parent, "config", None) or getattr(model, "config", None)
    found = getattr(parent, "head_dim", None) or getattr(config, "head_dim", None)
    if found is None and getattr(config, "num_attention_heads", None):
        found = config.hidden_size // config.num_attention_heads
    if not isinstance(found, int):
        raise ValueError(
            f"{name}: the size of a head is unknown: {type(parent).__name__} has no head_dim, and "
            "there is no config with head_dim, or with hidden_size and num_attention_heads"
        )
    return found
