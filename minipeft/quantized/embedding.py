"""An embedding in NF4: the rows that are asked for are gathered as codes, then decoded.

A vocabulary of 128,000 by 4,096 takes 270 MB instead of 1 GB in 16 bits, and a batch of 4 x 512
tokens decodes 8 M weights of its 524 M (fast/gathered.py; the plain function here decodes all).
"""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minipeft import ops
from minipeft.adapters.linearity import why_not_replaceable
from minipeft.fast.gathered import ROW, check_numbers
from minipeft.ops import Packed
from minipeft.qlora import PackedModule, Quantized, Stored, decode, encoded, frozen


@ops.operator(
    "nf4_embedding",
    "(Tensor rows, Packed weight, SymInt table_rows, SymInt dim, ScalarType dtype) -> Tensor",
    shapes=lambda given: given.weight.packed.new_empty(
        (*given.rows.shape, given.dim), dtype=given.dtype
    ),
    row_arguments=1,
)
def embedding(
    rows: Tensor, weight: Packed, table_rows: int, dim: int, dtype: torch.dtype
) -> Tensor:
    """Decode the table, then take its rows."""
    if rows.device.type == "cpu":  # elsewhere it would wait for the device
        check_numbers(ROW, rows, table_rows)
    return F.embedding(rows.long(), decode(weight, [table_rows, dim], dtype))


class NF4Embedding(PackedModule):
    """An embedding table with frozen NF4 codes, double-quantised unless told otherwise.

    Made by `from_embedding` (keywords `block_size=64`, `double_quant=True`).  Takes row numbers of
    any shape, gives (*shape, embedding_dim) in `weight_dtype`, the dtype that the table had (it
    follows `.half()` and `.to(dtype)` as the table's would).

    Raises:
        IndexError: a row number below 0 or beyond the table (on a CPU; elsewhere as nn.Embedding).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        **stored: Unpack[Stored],
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), **stored)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Module, **settings: Unpack[Quantized]) -> "NF4Embedding":
        """The same table rounded to NF4.

        Raises:
            TypeError: not a module.
            ValueError: not an nn.Embedding, a subclass that gives something else than rows of its
                table, one with `max_norm` (it rescales rows in forward), or weights that cannot be
                quantised.
        """
        if not isinstance(embedding, nn.Module):
            raise TypeError(f"NF4Embedding: expected a module, got {type(embedding).__name__}")
        if not isinstance(embedding, nn.Embedding):
            raise ValueError(f"NF4Embedding: {type(embedding).__name__} is no nn.Embedding")
        reason = why_not_replaceable(embedding)
        if embedding.max_norm is not None:
            reason = "max_norm rescales rows in forward"
        if reason:
            raise ValueError(
                f"NF4Embedding: {reason}; leave it dense (codes give rows of the table, no more)"
            )
        layer = cls.from_weight(embedding.weight, embedding.padding_idx, **settings)
        return layer.train(embedding.training)

    @classmethod
    @torch.inference_mode(False)
    def from_weight(
        cls, weight: Tensor, padding_idx: int | None = None, **settings: Unpack[Quantized]
    ) -> "NF4Embedding":
        """An embedding whose table is `weight`, (num_embeddings, embedding_dim), in NF4."""
        rows, dim = weight.shape
        layer = cls(rows, dim, padding_idx, dtype=weight.dtype, device="meta", **settings)
        layer.fill(encoded(weight, layer.block_size, layer.double_quant))
        return layer

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"padding_idx": self.padding_idx}

    def forward(self, rows: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape embedding_dim"]:
        return ops.call("nf4_embedding", rows, self.state(), *self.shape, self.weight_dtype)

    def dense(self, weight: Tensor | None = None) -> nn.Module:
        """A plain nn.Embedding with this layer's table, or with another one; frozen."""
        with torch.device("meta"):
            table = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        table.weight = frozen(self.dequantize() if weight is None else weight)
        return table.train(self.training)
