"""An embedding in NF4: the rows that are asked for are gathered as codes, then decoded.

The table itself is never decoded.  A vocabulary of 128,000 by 4,096 takes 270 MB instead of 1 GB
in 16 bits, and a batch of 4 x 512 tokens decodes 8 M weights of its 524 M.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minipeft import ops
from minipeft.adapters.linearity import why_not_replaceable
from minipeft.fast import nf4
from minipeft.qlora import PackedModule, encoded, frozen


def _embedding_shape(given: Any) -> Any:
    return given.packed.new_empty((*given.rows.shape, given.dim), dtype=given.dtype)


@ops.operator(
    "nf4_embedding",
    "(Tensor rows, Tensor packed, Tensor absmax, Tensor? scale, Tensor? offset, SymInt table_rows, "
    "SymInt dim, int block_size, ScalarType dtype, Tensor? codebook=None) -> Tensor",
    shapes=_embedding_shape,
    row_arguments=1,
)
def _embedding(
    rows: Tensor,
    packed: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    table_rows: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> Tensor:
    wanted = rows.reshape(-1).long()
    if wanted.device.type == "cpu" and wanted.numel():  # elsewhere it would wait for the device
        low, high = int(wanted.min()), int(wanted.max())
        if low < 0 or high >= table_rows:
            raise IndexError(
                f"NF4Embedding: row {low if low < 0 else high} of a table of {table_rows} rows"
            )
    out = torch.empty(wanted.numel(), dim, dtype=dtype, device=packed.device)
    if dim % block_size == 0:  # rows of whole blocks
        per_row = dim // block_size
        blocks = wanted[:, None] * per_row + torch.arange(per_row, device=wanted.device)
        scales = nf4.absmax_of_blocks(absmax, scale, offset, blocks)
        codes = packed.view(table_rows, -1).index_select(0, wanted)
        nf4.decode_into(out, codes, scales, block_size, codebook)
    elif dim:
        step = max(1, nf4.chunk_elements(out.device) // dim)
        for first in range(0, wanted.numel(), step):
            part = wanted[first : first + step, None]
            index = part * dim + torch.arange(dim, device=wanted.device)
            scales = nf4.absmax_of_blocks(absmax, scale, offset, index // block_size)
            values = nf4.decode_at(packed, index, codebook)
            out[first : first + step] = values * scales
    return out.view(*rows.shape, dim)


class NF4Embedding(PackedModule):
    """An embedding table with frozen NF4 codes, double-quantised unless told otherwise.

    Made by `from_embedding`; the constructor leaves the codes empty, to be filled by a state
    dict.  Takes row numbers of any shape, gives (*shape, embedding_dim) in `weight_dtype`, the
    dtype that the table had (it follows `.half()` and `.to(dtype)` as the table's would).

    Raises:
        IndexError: a row number below 0 or beyond the table (on a CPU; elsewhere as nn.Embedding).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            (num_embeddings, embedding_dim), block_size=block_size, double_quant=double_quant,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx

    @classmethod
    @torch.inference_mode(False)
    def from_embedding(
        cls, embedding: nn.Module, *, block_size: int = 64, double_quant: bool = True
    ) -> "NF4Embedding":
        """The same table rounded to NF4.

        Raises:
            TypeError: not a module.
            ValueError: no nn.Embedding, a subclass that gives something else than rows of its
                table, one with `max_norm` (it rescales rows in forward); weights that cannot be
                quantised.
        """
        table = check_embedding(embedding)
        state = encoded(table.weight, block_size, double_quant)
        layer = cls(
            table.num_embeddings, table.embedding_dim, table.padding_idx, block_size=block_size,
            double_quant=double_quant, dtype=table.weight.dtype, device="meta",
        )  # fmt: skip
        layer.fill(state)
        return layer.train(embedding.training)

    def forward(self, rows: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape embedding_dim"]:
        *codes, codebook = self.state()
        out: Tensor = torch.ops.minipeft.nf4_embedding(
            rows, *codes, self.num_embeddings, self.embedding_dim, self.block_size,
            self.weight_dtype, codebook,
        )  # fmt: skip
        return out

    def requantized(self, weight: Tensor) -> "NF4Embedding":
        """A layer of the same settings with the codes of another table."""
        table = self.dense(weight.float())
        layer = self.from_embedding(
            table, block_size=self.block_size, double_quant=self.double_quant
        )
        layer.weight_dtype = self.weight_dtype
        return layer.train(self.training)

    def dense(self, weight: Tensor | None = None) -> nn.Module:
        """A plain nn.Embedding with this layer's table, or with another one; frozen."""
        with torch.device("meta"):
            table = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        table.weight = frozen(self.dequantize() if weight is None else weight)
        return table.train(self.training)


def check_embedding(embedding: object) -> nn.Embedding:
    """The embedding, if NF4Embedding may take its place; raises if not."""
    if not isinstance(embedding, nn.Module):
        raise TypeError(f"NF4Embedding: expected a module, got {type(embedding).__name__}")
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"NF4Embedding: {type(embedding).__name__} is no nn.Embedding")
    if embedding.max_norm is not None:
        raise ValueError(
            "NF4Embedding: max_norm rescales rows in forward, which codes cannot; leave it dense"
        )
    if reason := why_not_replaceable(embedding):
        raise ValueError(f"NF4Embedding: {reason}, and NF4Embedding gives no more; leave it dense")
    return embedding
