"""DoRA: LoRA for the direction of each row of a weight, a trained number for its length.

    V = W + s B A              (Liu et al. 2024: weight-decomposed low-rank adaptation)
    W' = m / |V| * V           m (out,): trained, starts as |W|; |V|: norms of rows, no gradient

The norms need no V: with one number for each row,

    |V|^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B)

which takes rank products with W, as many as `rank` more rows of input; |W|^2 is computed once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.lora import LoRALinear, add_lora
from minipeft.ops import without_autocast
from minipeft.protocol import is_adapter, is_packed
from minipeft.qlora import NF4Linear
from minipeft.wrapper import innermost

_CHUNK_BYTES = 16 * 2**20  # of float32 copies of a 16-bit weight


def row_norms(
    square: Float[Tensor, " out"],
    product: Float[Tensor, "out rank"],
    a: Float[Tensor, "rank n"],
    b: Float[Tensor, "out rank"],
    scaling: float | Tensor,
) -> Float[Tensor, " out"]:
    """|W + scaling B A| of each row, from |W|^2 and W A^T, float32.

    Cancellation can leave a sum below zero where a row almost vanishes; it is clamped.
    """
    cross = (product * b).sum(1)
    own = ((b @ (a @ a.T)) * b).sum(1)
    return (square + 2 * scaling * cross + scaling * scaling * own).clamp(min=0).sqrt()


def length_ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / |V|; a direction that is zero has no length to set and stays zero, instead of 0 / 0."""
    return magnitude / norm.where(norm > 0, 1.0)


class Kept:
    """A tensor that is computed again when one of the tensors it was computed from has changed.

    Seen are other tensors, in-place operations, casts and moves; not what goes through `.data`.
    """

    def __init__(self) -> None:
        self._value: Any = None
        self._sources: list[tuple[Any, ...]] | None = None

    def get(self, make: Callable[[], Any], *sources: Tensor, number: float = 1.0) -> Any:
        """What `make` returns, now or since these sources (and this number) are the same."""
        if any(t.is_inference() for t in sources):  # nobody counts their changes
            return make()
        now = [(t, t._version, t.data_ptr(), t.dtype, t.device, number) for t in sources]
        then = self._sources
        same = then is not None and len(then) == len(now) and all(
            old[0] is new[0] and old[1:] == new[1:] for old, new in zip(then, now, strict=True)
        )  # fmt: skip
        if not same:
            self._value, self._sources = make(), now
        return self._value

    def drop(self) -> None:
        """Compute again at the next call."""
        self._value = self._sources = None


class DoRALinear(LoRALinear):
    """A linear layer with DoRA; arguments as of LoRALinear.

    `magnitude` (out_features,) float32 starts as the norms of the base's rows, so the layer starts
    at the base.  The bias is not scaled.  Norms are float32, without gradient (section 4.3 of the
    paper); a `scale` of 0 is off.  In eval() they are kept until a tensor that they depend on
    changes; what is changed through `.data` is seen after the next call of train() or eval().
    Nothing of the weight's size is made in forward, except over another adapter: there the base
    weight is the effective one of the layers below.

    Raises:
        TypeError, ValueError: as LoRALinear.

    >>> layer = DoRALinear(nn.Linear(8, 4), rank=2)
    >>> x = torch.randn(3, 8)
    >>> torch.allclose(layer(x), layer.base(x))
    True
    """

    magnitude: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        init: Callable[["LoRALinear"], None] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            base, rank, alpha,
            dropout=dropout, rank_stabilized=rank_stabilized, init=init, dtype=dtype,
        )  # fmt: skip
        self._kept_norms, self._kept_square = Kept(), Kept()
        with torch.no_grad():
            self.magnitude = nn.Parameter(self._square().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_module is not None and self._enabled:
            merged: Tensor = self.call_merged(x)
            return merged
        out: Tensor = self.base(x)
        compiling = torch.compiler.is_compiling()
        if not compiling and (not self._enabled or self._scale == 0):
            return out
        strength = self.strength if compiling else self.scaling * self._scale
        ratio, bias = length_ratio(self.magnitude, self.norms(strength)), self.bias
        bias = None if bias is None else bias.to(out.dtype)
        if self.dropout and self.training:
            dropped = F.dropout(x, self.dropout)
            dense = self.base(dropped) if bias is None else self.base(dropped) - bias
            branch = add_lora(dense, dropped, *self.factors(), strength) * ratio
            made = (out + (branch - dense)).to(out.dtype)
        else:
            direction = add_lora(out, x, *self.factors(), strength)
            if bias is None:
                made = (direction * ratio).to(out.dtype)
            else:
                made = ((direction - bias) * ratio + bias).to(out.dtype)
        return torch.where(self.strength == 0, out, made) if compiling else made

    def norms(self, strength: float | Tensor) -> Float[Tensor, " out"]:
        """|W + strength B A| of each row, without gradient."""
        with torch.no_grad(), without_autocast(self.magnitude.device):
            a, b = (factor.to(torch.float32) for factor in self.factors())

            def make() -> Tensor:
                return row_norms(self._square(), self._product(a), a, b, strength)

            if self.training or torch.compiler.is_compiling() or is_adapter(self.base):
                return make()
            sources = (*self._factor_parameters(), *innermost(self).parameters())
            kept: Tensor = self._kept_norms.get(make, *sources, number=float(strength))
            return kept

    def train(self, mode: bool = True) -> "DoRALinear":
        """Set the mode; what was kept is computed again."""
        for kept in (self.__dict__.get("_kept_norms"), self.__dict__.get("_kept_square")):
            if kept is not None:
                kept.drop()
        super().train(mode)
        return self

    def _factor_parameters(self) -> list[Tensor]:
        return [p for n, p in self._parameters.items() if p is not None and n.startswith("lora_")]

    def _weight(self) -> Tensor:
        """The base's weight, (out, in), as stored or, over adapters, effective in float32."""
        if is_adapter(self.base):
            weight = self.exact_below("weight", torch.float32)
        else:
            weight = innermost(self).weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def _product(self, a: Tensor) -> Float[Tensor, "out rank"]:
        """W A^T in float32, without a float32 copy of the whole W."""
        plain = innermost(self)
        if isinstance(plain, NF4Linear) and not is_adapter(self.base):
            out: Tensor = torch.ops.minipeft.nf4_linear(
                a, *plain.state(), None, plain.out_features, plain.block_size, plain.codebook
            )
            return out.T
        weight = self._weight()
        return torch.cat([part.to(a.dtype) @ a.T for part in _parts(weight)])

    def _square(self) -> Float[Tensor, " out"]:
        """|W|^2 of each row in float32."""
        plain = innermost(self)
        if torch.compiler.is_compiling() or is_adapter(self.base):
            return _row_squares(self._weight())

        def make() -> Tensor:
            if not is_packed(plain):
                return _row_squares(self._weight())
            return _row_squares(plain.dequantize(torch.float32))  # (out, in), of Conv1D too

        kept: Tensor = self._kept_square.get(make, *plain.parameters())
        return kept

    def exact_parameters(self) -> dict[str, Tensor]:
        """m / |V| * V in the weight's own layout, float32 or better."""
        if not self.enabled or self.scale == 0:
            return self.parameters_below()
        found = super().exact_parameters()
        axis = 0 if self.transposed else 1
        direction = found["weight"]
        norm = direction.detach().square().sum(axis, keepdim=True).sqrt()
        shape = (1, -1) if self.transposed else (-1, 1)
        return {**found, "weight": direction * length_ratio(self.magnitude.view(shape), norm)}


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """The weight whole, or its rows in parts of which a float32 copy is small."""
    if weight.dtype in (torch.float32, torch.float64):
        return (weight,)
    rows = max(1, _CHUNK_BYTES // (4 * max(1, weight.shape[1])))
    return torch.split(weight, rows)


def _row_squares(weight: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(part.float(), dim=1) for part in _parts(weight)]
    return torch.cat(norms).square()
