"""LoRA on an embedding: a row of the table plus a row of the low-rank product.

    y = E[x] + scaling * A^T[x] B^T        A (rank, num_embeddings), B (embedding_dim, rank)

Rows of A^T are gathered like rows of E; the product is never made for the whole table.
"""

from collections.abc import Callable
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minipeft.adapters.linearity import why_not_formula
from minipeft.adapters.protocol import innermost
from minipeft.lora import LowRank, Options
from minipeft.quantized.embedding import NF4Embedding


class LoRAEmbedding(LowRank):
    """An embedding with LoRA, over nn.Embedding or NF4Embedding.

    `lora_a` (rank, num_embeddings) starts at zero and `lora_b` (embedding_dim, rank) as N(0, 1),
    as in loralib and PEFT.  A table that multiplies its output by `embed_scale` (Gemma's) does so
    with the branch too.  `dropout` acts on the gathered rows of A^T while training.  A head that
    shares the table's weight keeps the frozen one, unless LoRATiedLinear goes over it.

    Raises:
        TypeError: base is no module.
        ValueError: base is no embedding, or one that gives something else than rows of its table
            (times `embed_scale`); rank, alpha, dropout as of LoRALinear.

    >>> layer = LoRAEmbedding(nn.Embedding(10, 4), rank=2)
    >>> torch.equal(layer(torch.tensor([3])), layer.base(torch.tensor([3])))  # A = 0
    True
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        init: Callable[["LoRAEmbedding"], None] | None = None,
        **options: Unpack[Options],
    ) -> None:
        rows, dim = checked_table(type(self).__name__, base)
        super().__init__(base, (rank, rows), (dim, rank), rank, alpha, **options)
        self.num_embeddings, self.embedding_dim = rows, dim
        self.initialize(init)
        self.take_over()

    def start(self) -> None:
        """A = 0 and B ~ N(0, 1)."""
        with torch.no_grad():
            self.lora_a.zero_()
            self.lora_b.normal_()

    def on_top(
        self, out: Float[Tensor, "*shape dim"], ids: Int[Tensor, "*shape"], strength: float | Tensor
    ) -> Float[Tensor, "*shape dim"]:
        """The output of the layers below, and the rows of the product."""
        a, b = self.factors()
        plain: Any = innermost(self)
        rows = F.embedding(ids, a.T, plain.padding_idx)  # no gradient to the row of padding
        branch = (self.dropped(rows) @ b.T) * strength
        if isinstance(strength, Tensor):
            branch = torch.where(strength == 0, 0.0, branch)
        scale = getattr(plain, "embed_scale", None)
        if isinstance(scale, Tensor):
            scale = scale.to(out.dtype)  # rounded as the base rounds it
        return out + (branch if scale is None else branch * scale).to(out.dtype)

    def delta_as_stored(self) -> Tensor:
        """`delta`, (num_embeddings, embedding_dim), as the table is stored."""
        return self.delta().T


def checked_table(caller: str, base: nn.Module) -> tuple[int, int]:
    """Rows and columns of an embedding that gives rows of its table; raises on anything else."""
    if not isinstance(base, nn.Module):
        raise TypeError(f"{caller}: expected a module as base, got {type(base).__name__}")
    plain = innermost(base)
    if not isinstance(plain, nn.Embedding | NF4Embedding):
        raise ValueError(f"{caller}: {type(plain).__name__} is no embedding")
    if getattr(plain, "max_norm", None) is not None:
        raise ValueError(
            f"{caller}: max_norm rescales the table's rows in forward, so it is not frozen"
        )
    own = type(plain).__name__
    if isinstance(plain, NF4Embedding):
        same = type(plain).forward is NF4Embedding.forward
        reason = None if same else f"{own} has a forward of its own"
    else:
        reason = why_not_formula(plain, hooks=False)
    if reason:
        raise ValueError(
            f"{caller}: {reason}, so rows of the branch would not be its rows; leave it out "
            "(exclude=), or wrap it in a layer of your own"
        )
    return plain.num_embeddings, plain.embedding_dim
