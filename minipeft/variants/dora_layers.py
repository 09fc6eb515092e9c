"""DoRA on embeddings and convolutions; the idea is in dora.py.

An embedding has a length for each of its columns, over all tokens; a convolution for each kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minipeft.adapters.linearity import check_own_weight
from minipeft.adapters.protocol import innermost, is_adapter
from minipeft.layers.conv import LoRAConv, kernel_product
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.ops import without_autocast
from minipeft.quantized.embedding import NF4Embedding
from minipeft.variants.dora import (
    Kept,
    length_ratio,
    lengths_of,
    row_norms,
    strength_or_off,
)

_ROWS = 4096  # of a 4-bit table to decode at a time


class DoRAEmbedding(LoRAEmbedding):
    """An embedding with DoRA; arguments as of LoRAEmbedding.

    `magnitude` (embedding_dim,) float32 starts as the norms of the table's columns.  Nothing of
    the table's size is made in forward, except over another adapter.
    """

    magnitude: nn.Parameter

    def __init__(self, base: nn.Module, rank: int, alpha: float | None = None, **lora: Any) -> None:
        super().__init__(base, rank, alpha, **lora)
        check_own_weight(type(self).__name__, innermost(base))
        self._kept = Kept()
        with torch.no_grad():
            square, _ = self._table_products(torch.zeros_like(self.lora_a, dtype=torch.float32))
            self.magnitude = nn.Parameter(square.sqrt())

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        if self.merged_module is not None and self._enabled:
            return self.call_merged(ids)
        out: Tensor = self.base(ids)
        if (strength := strength_or_off(self)) is None:
            return out
        ratio = length_ratio(self.magnitude, self.norms(strength))
        made = (super().on_top(out, ids, strength) * ratio).to(out.dtype)
        return torch.where(strength == 0, out, made) if isinstance(strength, Tensor) else made

    def on_top(
        self, out: Tensor, ids: Tensor, strength: float | Tensor, *lengths: Tensor
    ) -> Tensor:
        """The output of the layers below and the branch, at the lengths that are given."""
        ratio, shift = lengths
        return (super().on_top(out, ids, strength) * ratio + shift).to(out.dtype)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """What `on_top` takes: see `lengths_of`."""
        return lengths_of(self)

    def norms(self, strength: float | Tensor) -> Float[Tensor, " dim"]:
        """Norms of the columns of E + strength (B A)^T, without gradient."""
        with torch.no_grad(), without_autocast(self.magnitude.device):
            a, b = (factor.to(torch.float32) for factor in self.factors())

            def make() -> tuple[Tensor, Tensor]:
                return self._table_products(a)

            if self.training or torch.compiler.is_compiling() or is_adapter(self.base):
                square, product = make()
            else:
                sources = (*self._parameters.values(), *innermost(self).parameters())
                known = [t for t in sources if t is not None]
                square, product = self._kept.get(make, *known)
            return row_norms(square, product, a, b, strength)

    def train(self, mode: bool = True) -> "DoRAEmbedding":
        """Set the mode; what was kept is computed again."""
        if (kept := self.__dict__.get("_kept")) is not None:
            kept.drop()
        super().train(mode)
        return self

    def _table_products(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """|E|^2 of each column, and E^T A^T (dim, rank)."""
        plain: Any = innermost(self)
        if is_adapter(self.base):
            parts = [self.exact_below("weight", torch.float32)]
        elif isinstance(plain, NF4Embedding):
            numbers = torch.arange(self.num_embeddings, device=a.device)
            parts = [plain(part) for part in torch.split(numbers, _ROWS)]
        else:
            parts = list(torch.split(plain.weight, _ROWS))
        square, product = a.new_zeros(self.embedding_dim), a.new_zeros(self.embedding_dim, len(a))
        first = 0
        for part in parts:
            rows = part.float()
            square = square + rows.square().sum(0)
            product = product + rows.T @ a[:, first : first + len(rows)].T
            first += len(rows)
        return square, product

    def exact_parameters(self) -> dict[str, Tensor]:
        """The table with the lengths of its columns set, float32 or better."""
        if not self.enabled or self.scale == 0:
            return self.parameters_below()
        found = super().exact_parameters()
        direction = found["weight"]
        norm = direction.detach().square().sum(0).sqrt()
        return {**found, "weight": direction * length_ratio(self.magnitude, norm)}


class DoRAConv(LoRAConv):
    """A convolution with DoRA; arguments as of LoRAConv.

    `magnitude` (out_channels,) float32 starts as the norms of the base's kernels.

    Raises:
        ValueError: `across_groups`: there is no kernel to take the norm of.
    """

    magnitude: nn.Parameter

    def __init__(self, base: nn.Module, rank: int, alpha: float | None = None, **lora: Any) -> None:
        if lora.get("across_groups"):
            raise ValueError(
                "DoRAConv: lora_a across groups makes no kernel of the base's shape, whose norm "
                "DoRA needs; leave across_groups out"
            )
        super().__init__(base, rank, alpha, **lora)
        check_own_weight(type(self).__name__, innermost(base))
        with torch.no_grad():
            kernel = self.exact_below("weight", torch.float32)
            self.magnitude = nn.Parameter(kernel.flatten(1).norm(dim=1).to(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_module is not None and self._enabled:
            return self.call_merged(x)
        out: Tensor = self.base(x)
        if (strength := strength_or_off(self)) is None:
            return out
        axes = (1,) * (self.lora_a.dim() - 2)
        ratio = length_ratio(self.magnitude, self.norms(strength)).view(-1, *axes)
        bias = self.bias
        shift = 0.0 if bias is None else bias.to(out.dtype).view(-1, *axes)
        dense = out
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
            dense = self.base(x)
        plain: Any = innermost(self)
        a, b = (factor.to(out.dtype) for factor in self.factors())
        number = len(axes) - 1
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[number]
        hidden = kind._conv_forward(plain, x.to(out.dtype), a, None) * strength
        convolve = (F.conv1d, F.conv2d, F.conv3d)[number]
        branch = convolve(hidden, b, groups=plain.groups)
        made = (out + ((dense - shift + branch) * ratio - (dense - shift))).to(out.dtype)
        return torch.where(strength == 0, out, made) if isinstance(strength, Tensor) else made

    def on_top(self, out: Tensor, x: Tensor, strength: float | Tensor, *lengths: Tensor) -> Tensor:
        """The output of the layers below and the branch, at the lengths that are given."""
        ratio, shift = lengths
        return (super().on_top(out, x, strength) * ratio + shift).to(out.dtype)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """What `on_top` takes: see `lengths_of`."""
        return lengths_of(self)

    def norms(self, strength: float | Tensor) -> Float[Tensor, " out"]:
        """Norms of the kernels with strength B A added, without gradient."""
        with torch.no_grad(), without_autocast(self.magnitude.device):
            direction = self.exact_below("weight", torch.float32) + self._kernel(strength)
            norms: Tensor = direction.flatten(1).norm(dim=1)
            return norms

    def _kernel(self, strength: float | Tensor) -> Tensor:
        a, b = (factor.float() for factor in self.factors())
        return kernel_product(a, b, self.groups_within()) * strength

    def exact_parameters(self) -> dict[str, Tensor]:
        """The kernels with their lengths set, float32 or better."""
        if not self.enabled or self.scale == 0:
            return self.parameters_below()
        found = super().exact_parameters()
        direction = found["weight"]
        norm = direction.detach().flatten(1).norm(dim=1)
        shape = (-1, *(1,) * (direction.dim() - 1))
        return {**found, "weight": direction * length_ratio(self.magnitude, norm).view(shape)}
