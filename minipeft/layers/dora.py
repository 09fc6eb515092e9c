"""DoRA: LoRA for the direction of each row of a weight, a trained number for its length.

    V = W + s B A              (Liu et al. 2024: weight-decomposed low-rank adaptation)
    W' = m / |V| * V           m (out,): trained, starts as |W|; |V|: norms of rows, no gradient

The norms need no V: with one number for each row,

    |V|^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B)

which takes rank products with W, as many as `rank` more rows of input; |W|^2 is computed once.
An embedding has a length for each of its columns, over all tokens; a convolution for each kernel.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from minipeft.adapters.linearity import check_own_weight
from minipeft.adapters.products import call, without_autocast
from minipeft.adapters.protocol import innermost, is_adapter, is_packed
from minipeft.layers.conv import LoRAConv, kernel_product
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.lora import LoRALinear, LowRank, Options, add_lora
from minipeft.qlora import NF4Linear, multiply
from minipeft.quantized.embedding import NF4Embedding

_CHUNK_BYTES = 16 * 2**20  # of float32 copies of a 16-bit weight
_ROWS = 4096  # of a 4-bit table to decode at a time


def row_norms(
    square: Float[Tensor, " out"],
    product: Float[Tensor, "out rank"],
    a: Float[Tensor, "rank n"],
    b: Float[Tensor, "out rank"],
    scaling: float | Tensor,
) -> Float[Tensor, " out"]:
    """|W + scaling B A| of each row, from |W|^2 and W A^T, in their dtype.

    Cancellation can leave a sum below zero where a row almost vanishes; it is clamped.
    """
    cross = (product * b).sum(1)
    own = ((b @ (a @ a.T)) * b).sum(1)
    return (square + 2 * scaling * cross + scaling * scaling * own).clamp(min=0).sqrt()


def length_ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / |V|; a direction that is zero has no length to set and stays zero, instead of 0 / 0."""
    return magnitude / norm.where(norm > 0, 1.0)


@cache
def _optimizer_steps() -> list[int]:
    """Of all optimisers: a fused one changes tensors, and their versions stay the same."""
    steps = [0]

    def count(*_: Any) -> None:
        steps[0] += 1

    register_optimizer_step_post_hook(count)
    return steps


class Kept:
    """A tensor that is computed again when one of the tensors it was computed from has changed.

    Seen are other tensors, in-place operations, casts and moves, and any optimiser's step; not what
    goes through `.data`.
    """

    def __init__(self) -> None:
        self._value: Any = None
        self._sources: list[tuple[Any, ...]] | None = None

    def get(self, make: Callable[[], Any], *sources: Tensor, number: float = 1.0) -> Any:
        """What `make` returns, now or since these sources (and this number) are the same."""
        steps = _optimizer_steps()[0]
        try:
            now = [
                (t, t._version, t.data_ptr(), t.dtype, t.device, number, t.requires_grad and steps)
                for t in sources
            ]  # fmt: skip
        except RuntimeError:  # inference tensors count no changes, functorch's have no memory
            return make()
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


class DoRA(LowRank):
    """What DoRA layers share: a class has it first, then the layer with LoRA that it changes.

    `magnitude`, the lengths, starts as the norms of V, so that the layer starts as LoRA does:
    exactly at the base, where B A = 0.  The bias is not scaled.  Norms have no gradient (section
    4.3 of the paper); a `scale` of 0 is off.  In eval() linear layers and embeddings keep what they
    made of the weight until a tensor that it depends on changes; what is changed through `.data` is
    seen after the next call of train() or eval().
    """

    magnitude: nn.Parameter
    keeps_norms = True  # False: norms are of the moment in eval() too (row_groups.py)

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        init: Callable[[Any], None] | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(base, rank, alpha, init=init, **options)  # type: ignore[call-arg, arg-type]
        check_own_weight(type(self).__name__, innermost(base))
        self._kept_norms, self._kept_square = Kept(), Kept()
        self.magnitude = nn.Parameter(self.norms(self.scaling))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_module is not None and self._enabled:
            return self.call_merged(x)
        out: Tensor = call(self.base, x)
        strength = self.strength_now()
        return out if strength is None else self.on_top_now(out, x, strength)

    def strength_now(self) -> float | Tensor | None:
        """As of every layer; a scale of 0 is off too: no length is set then."""
        strength = super().strength_now()
        return strength if isinstance(strength, Tensor) or strength else None

    def scaled(self, out: Tensor, x: Tensor, strength: float | Tensor, ratio: Tensor) -> Tensor:
        """ratio (out + branch), but the bias in `out` as it is; `ratio` is m / |V|."""
        return (super().on_top(out, x, strength) * ratio).to(out.dtype)  # type: ignore[misc]

    def on_top_now(self, out: Tensor, x: Tensor, strength: float | Tensor) -> Tensor:
        """The output of the layers below and the branch, at the lengths that they have now."""
        if not isinstance(strength, Tensor) and not strength:
            return out
        made = self.scaled(out, x, strength, length_ratio(self.magnitude, self.norms(strength)))
        return torch.where(strength == 0, out, made) if isinstance(strength, Tensor) else made

    def on_top(self, out: Tensor, x: Tensor, strength: float | Tensor, *lengths: Tensor) -> Tensor:
        """The output of the layers below and the branch, at the lengths that are given."""
        ratio, shift = lengths
        made = super().on_top(out, x, strength) * ratio + shift  # type: ignore[misc]
        return made.to(out.dtype)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """What `on_top` takes: ratio = m / |V|, and shift = (1 - ratio) bias, (out,) each.

        Of the output y of the layers below, as they are now, it makes ratio (y + branch) + shift.
        """
        ratio = torch.ones_like(self.magnitude)
        if self.full_strength != 0:
            ratio = length_ratio(self.magnitude, self.norms(self.full_strength))
        bias = self.bias
        return ratio, torch.zeros_like(ratio) if bias is None else (1 - ratio) * bias

    def norms(self, strength: float | Tensor) -> Float[Tensor, " out"]:
        """|W + strength B A|: a norm for each length, without gradient."""
        with torch.no_grad(), without_autocast(self.lora_a.device):
            return self._norms(strength)

    def _norms(self, strength: float | Tensor) -> Tensor:
        raise NotImplementedError

    def _norms_of(self, weight: Tensor) -> Tensor:
        """The norms of a whole weight, as stored, in the axes of the weight."""
        raise NotImplementedError

    def _always_new(self) -> bool:
        """Whether nothing is kept: the layers below may change without a trace."""
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        return recorded or is_adapter(self.base)

    def _factor_parameters(self) -> list[Tensor]:
        return [p for n, p in self._parameters.items() if p is not None and n.startswith("lora_")]

    def exact_parameters(self) -> dict[str, Tensor]:
        """m / |V| * V in the weight's own layout, float32 or better."""
        if not self.enabled or self.scale == 0:
            return self.parameters_below()
        found = super().exact_parameters()
        direction = found["weight"]
        norm = self._norms_of(direction.detach())
        return {**found, "weight": direction * length_ratio(self.magnitude.view_as(norm), norm)}

    def train(self, mode: bool = True) -> "DoRA":
        """Set the mode; what was kept is computed again."""
        for kept in vars(self).values():
            if isinstance(kept, Kept):
                kept.drop()
        super().train(mode)
        return self


class DoRALinear(DoRA, LoRALinear):
    """A linear layer with DoRA; arguments as of LoRALinear.

    `magnitude` (out_features,) and the norms are float32, float64 where the factors are.  Nothing
    of the weight's size is made in forward, except over another adapter: there the base weight is
    the effective one of the layers below.

    Raises:
        TypeError, ValueError: as LoRALinear; a base that computes something else than its weight
            says, since its lengths are read off the weight.

    >>> layer = DoRALinear(nn.Linear(8, 4), rank=2)
    >>> x = torch.randn(3, 8)
    >>> torch.equal(layer(x), layer.base(x))
    True
    """

    def scaled(self, out: Tensor, x: Tensor, strength: float | Tensor, ratio: Tensor) -> Tensor:
        """ratio (out - bias) + bias, which is out, to the bit, where ratio is 1; and the branch."""
        bias: Any = 0.0 if self.bias is None else self.bias
        if self.dropout and self.training:
            x = self.dropped(x)
            scaled = out + (ratio - 1) * (call(self.base, x) - bias)
        else:
            scaled = torch.addcmul((1 - ratio) * bias, out, ratio)
        a, b = self.factors()
        return add_lora(scaled.to(out.dtype), x, a, ratio[:, None] * b, strength)

    def _norms(self, strength: float | Tensor) -> Float[Tensor, " out"]:
        dtype = torch.promote_types(torch.float32, self.lora_a.dtype)
        a, b = (factor.to(dtype) for factor in self.factors())

        def make() -> Tensor:
            weight = None if isinstance(self.base, NF4Linear) else self._weight(dtype)
            square, product = self._square(weight, dtype), self._product(weight, a)
            return row_norms(square, product, a, b, strength)

        if self.training or not self.keeps_norms or self._always_new():
            return make()
        sources = (*self._factor_parameters(), *self.base.parameters())
        kept: Tensor = self._kept_norms.get(make, *sources, number=float(strength))
        return kept

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """The base's weight, (out, in), as stored or, where it is computed, in `dtype` or wider."""
        if is_adapter(self.base) or is_packed(self.base):
            weight = self.exact_below("weight", dtype)
        else:
            weight = self.base.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def _square(self, weight: Tensor | None, dtype: torch.dtype) -> Float[Tensor, " out"]:
        """|W|^2 of each row in `dtype` or wider; without a weight, of the base's codes."""

        def make() -> Tensor:
            base: Any = self.base
            dense = base.dequantize(dtype) if weight is None else weight
            wide = torch.promote_types(dense.dtype, dtype)
            norms: Tensor = torch.linalg.vector_norm(dense, dim=1, dtype=wide)
            return norms.square()

        if self._always_new():
            return make()
        kept: Tensor = self._kept_square.get(make, *self.base.parameters())
        return kept

    def _product(self, weight: Tensor | None, a: Tensor) -> Float[Tensor, "out rank"]:
        """W A^T in the dtype of `a`, without a copy of the whole W in it."""
        if weight is not None:
            return torch.cat([part.to(a.dtype) @ a.T for part in _parts(weight)])
        base: Any = self.base
        return multiply(a, base.state(), None, base.out_features).T

    def _norms_of(self, weight: Tensor) -> Tensor:
        return weight.square().sum(0 if self.transposed else 1, keepdim=True).sqrt()


class DoRAEmbedding(DoRA, LoRAEmbedding):
    """An embedding with DoRA; arguments as of LoRAEmbedding.

    `magnitude` (embedding_dim,) float32 are the lengths of the table's columns.  Nothing of the
    table's size is made in forward, except over another adapter.
    """

    def _norms(self, strength: float | Tensor) -> Float[Tensor, " dim"]:
        a, b = (factor.to(torch.float32) for factor in self.factors())

        def make() -> tuple[Tensor, Tensor]:
            return self._table_products(a)

        if self.training or not self.keeps_norms or self._always_new():
            square, product = make()
        else:
            sources = (*self._factor_parameters(), *innermost(self).parameters())
            square, product = self._kept_square.get(make, *sources)
        return row_norms(square, product, a, b, strength)

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

    def _norms_of(self, weight: Tensor) -> Tensor:
        return weight.square().sum(0, keepdim=True).sqrt()


class DoRAConv(DoRA, LoRAConv):
    """A convolution with DoRA; arguments as of LoRAConv.

    `magnitude` (out_channels,) float32 are the lengths of the kernels.

    Raises:
        ValueError: `across_groups`: there is no kernel to take the norm of.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        init: Callable[[Any], None] | None = None,
        across_groups: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if across_groups:
            raise ValueError(
                "DoRAConv: lora_a across groups makes no kernel of the base's shape, whose norm "
                "DoRA needs; leave across_groups out"
            )
        super().__init__(base, rank, alpha, init=init, **options)
        self.magnitude = nn.Parameter(self.magnitude.detach().float())

    def scaled(self, out: Tensor, x: Tensor, strength: float | Tensor, ratio: Tensor) -> Tensor:
        """out, and what the lengths change: ratio (out + branch) - out, without the bias."""
        axes = (1,) * (self.lora_a.dim() - 2)
        bias, dense = self.bias, out
        if self.dropout and self.training:
            x = self.dropped(x)
            dense = self.base(x)
        shift = 0.0 if bias is None else bias.to(out.dtype).view(-1, *axes)
        branch = self.branch(x.to(out.dtype), out.dtype, strength)
        ratio = ratio.view(-1, *axes)
        return (out + ((dense - shift + branch) * ratio - (dense - shift))).to(out.dtype)

    def _norms(self, strength: float | Tensor) -> Float[Tensor, " out"]:
        a, b = (factor.float() for factor in self.factors())
        change = kernel_product(a, b, self.groups_within()) * strength
        return self._norms_of(self.exact_below("weight", torch.float32) + change).flatten()

    def _norms_of(self, weight: Tensor) -> Tensor:
        norms: Tensor = weight.flatten(1).norm(dim=1)
        return norms.view(-1, *(1,) * (weight.dim() - 1))


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """The weight whole, or its rows in parts of which a float32 copy is small."""
    if weight.dtype in (torch.float32, torch.float64):
        return (weight,)
    rows = max(1, _CHUNK_BYTES // (4 * max(1, weight.shape[1])))
    return torch.split(weight, rows)
