"""LoRA: a frozen weight plus a trainable low-rank product (Hu et al. 2021).

Fine-tuning changes a weight W by something of low rank.  So W stays frozen and two thin matrices
are trained; B starts at zero, hence training starts exactly at the base model.

              x  (*batch, in)
              |---------------------.
              |                     |  A  (rank, in)     ~ U(-1/sqrt(in), 1/sqrt(in))
      W (out, in), frozen           |
              |                     |  B  (out, rank)    = 0
              |                     |  * scaling         = alpha / rank
              '---------(+)---------'
                         |
              y  (*batch, out)

Read next: inject.py.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.adapters import products
from minipeft.adapters.products import autocast_is_on, call, without_autocast
from minipeft.adapters.protocol import LinearShape, innermost, linear_shape, whole
from minipeft.adapters.wrapper import Wrapper


def lora_scaling(alpha: float, rank: int, *, rank_stabilized: bool = False) -> float:
    """The factor on the low-rank product: alpha / rank (Hu et al. 2021, section 4.1).

    `rank_stabilized` takes alpha / sqrt(rank), which keeps the size of what a high rank learns
    (Kalajdzievski 2023, rsLoRA).

    Raises:
        ValueError: rank below 1, or alpha not above 0 and finite.

    >>> lora_scaling(16, 8), lora_scaling(16, 4, rank_stabilized=True)
    (2.0, 8.0)
    """
    whole("LoRA", "rank", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(
            f"LoRA: alpha={alpha!r}; expected a number above 0 (alpha = rank leaves the product "
            "unscaled; to switch an adapter off use disable_adapters)"
        )
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def lora_delta(
    a: Float[Tensor, "rank in_features"], b: Float[Tensor, "out_features rank"], scaling: float
) -> Float[Tensor, "out_features in_features"]:
    """The change of the weight: scaling * B A, in float32 or better (Hu et al. 2021, eq. 3)."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(a.dtype, b.dtype))
    return scaling * (b.to(dtype) @ a.to(dtype))


def lora_forward(
    x: Float[Tensor, "*batch in_features"],
    a: Float[Tensor, "rank in_features"],
    b: Float[Tensor, "out_features rank"],
    scaling: float,
) -> Float[Tensor, "*batch out_features"]:
    """The low-rank branch: scaling * x A^T B^T, in x's dtype (Hu et al. 2021, eq. 3).

    Costs 2 * rank * (in_features + out_features) FLOPs a row; never builds the out x in matrix.

    >>> lora_forward(torch.ones(1, 3), torch.ones(2, 3), torch.ones(1, 2), 0.5)
    tensor([[3.]])
    """
    return scaling * (x @ a.T.to(x.dtype) @ b.T.to(x.dtype))  # x A^T first: (*batch, rank) is small


def add_lora(base_out: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """base_out + lora_forward(x, a, b, scaling): the product is added in the same matrix multiply.

    `x`, `a` and `b` are cast to `base_out`'s dtype where it differs, so that the result has it.
    Backward keeps x and x A^T, and the casts of the factors; nothing of base_out's size.
    `scaling` as a tensor without dimensions is what compiled code takes: 0 adds nothing, whatever
    `a` holds.
    """
    # dtypes are settled here, so autocast is off below.  The `with` is entered only where it is
    # needed: in every call it would take 1.33 to 1.86 times as long
    if autocast_is_on(x.device):
        with without_autocast(x.device):
            return add_lora(base_out, x, a, b, scaling)
    dtype, columns = base_out.dtype, base_out.shape[-1]
    b = products.cast(b, dtype)
    hidden = products.linear(products.cast(x, dtype), products.cast(a, dtype))  # (*batch, rank)
    if isinstance(scaling, Tensor):
        hidden, scaling = torch.where(scaling == 0, 0.0, hidden * scaling), 1.0
    if base_out.dim() == 2:
        return products.addmm(base_out, hidden, b.T, scaling)
    rows = hidden.reshape(-1, hidden.shape[-1])
    out = products.addmm(base_out.reshape(-1, columns), rows, b.T, scaling)
    return out.view(base_out.shape)


class Options(TypedDict, total=False):
    """Keywords that LoRA layers of every kind take; `LowRank` has the defaults."""

    dropout: float  # of the branch's input, while training; at least 0, below 1
    rank_stabilized: bool  # scaling = alpha / sqrt(rank), see `lora_scaling`
    dtype: torch.dtype  # of the factors; a floating-point one


class LowRank(Wrapper):
    """What LoRA layers of every kind share: two trained factors, their scaling and dropout.

    `lora_a` starts random, `lora_b` at zero; `init` is called with the layer after that and
    changes them in place.  An initialisation whose product B0 A0 is not zero keeps a frozen copy of
    it, `lora_a0` and `lora_b0`, and the layer adds s (B A - B0 A0): zero at first, over a base that
    stays as it is.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_a0: nn.Parameter | None
    lora_b0: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        shape_a: Sequence[int],
        shape_b: Sequence[int],
        rank: int,
        alpha: float | None,
        *,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        alpha = rank if alpha is None else alpha
        super().__init__(base, scaling=lora_scaling(alpha, rank, rank_stabilized=rank_stabilized))
        kind = type(self).__name__
        if not 0 <= dropout < 1:
            raise ValueError(f"{kind}: dropout={dropout!r}; expected 0 <= dropout < 1")
        if not dtype.is_floating_point:
            raise ValueError(f"{kind}: dtype={dtype}; expected a floating-point dtype")
        self.rank, self.alpha = rank, float(alpha)
        self.rank_stabilized, self.dropout = rank_stabilized, dropout
        products.warn_of_dense(innermost(base))
        device = next(innermost(base).parameters()).device
        self.lora_a = nn.Parameter(torch.empty(*shape_a, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(*shape_b, dtype=dtype, device=device))
        self.register_parameter("lora_a0", None)
        self.register_parameter("lora_b0", None)

    def initialize(self, init: "Callable[[Any], Any] | None") -> None:
        """Start the factors, then call `init`, which may fill only what it changes."""
        self.start()
        if init is not None and isinstance(init(self), FunctionType):
            raise TypeError(f"init: {init!r:.80} made another function; call it: init=...()")

    def start(self) -> None:
        """A ~ U(-1/sqrt(n), 1/sqrt(n)), n inputs to each of its rows, B = 0: as loralib and PEFT.

        B = 0 makes B A zero, so training starts at the base model.  With G the gradient of the
        output, that of B is s G^T (x A^T) and that of A is s B^T G^T x: in the first step A's is
        zero because B is zero, and B's is not.  If both started at zero, both gradients would be
        zero and stay so; if both started random, training would start from a disturbed model.
        """
        bound = 1 / math.sqrt(max(1, self.lora_a[0].numel()))
        with torch.no_grad():
            self.lora_a.uniform_(-bound, bound)
            self.lora_b.zero_()

    def subtract_start(self) -> None:
        """Keep a copy of the present factors, whose product is subtracted from now on."""
        for name in ("lora_a", "lora_b"):
            start = getattr(self, name).detach().clone()
            setattr(self, f"{name}0", nn.Parameter(start, requires_grad=False))

    def factors(self) -> tuple[Tensor, Tensor]:
        """a and b of all that is added; where a start is subtracted, of twice the rank.

        B A - B0 A0 is one product, [B, -B0] [A; A0]: the rows of A0 below those of A, the columns
        of -B0 beside those of B.
        """
        own: Any = self._parameters  # read directly: `self.lora_a` takes a call each
        a, b, a0, b0 = own["lora_a"], own["lora_b"], own["lora_a0"], own["lora_b0"]
        return (a, b) if a0 is None else (torch.cat([a, a0], -2), torch.cat([b, -b0], -1))

    def halves(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, A0 and B0 of what `factors` made of them."""
        (a, a0), (b, b0) = a.chunk(2, -2), b.chunk(2, -1)
        return a, b, a0, -b0

    def dropped(self, x: Tensor) -> Tensor:
        """The branch's input: while training, after dropout."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def delta(self) -> Tensor:
        """What is added to the base's weight, in float32 or better, with the runtime scale."""
        return lora_delta(*self.factors(), self.full_strength)

    def exact_parameters(self) -> dict[str, Tensor]:
        """The weight of the layers below plus `delta`."""
        below = self.parameters_below()
        if not self.enabled:
            return below
        delta = self.delta_as_stored()
        return {**below, "weight": self.exact_below("weight", delta.dtype) + delta}

    def delta_as_stored(self) -> Tensor:
        """`delta` in the layout of the base's weight."""
        return self.delta()

    def extra_repr(self) -> str:
        off = "" if self.enabled else ", disabled"
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}{off}"


class LoRALinear(LowRank):
    """A linear layer with LoRA: base(x) + scaling * B A x  (Hu et al. 2021, eq. 3).

    `base` is any linear-like module (nn.Linear, transformers' Conv1D, NF4Linear, your own), or one
    with an adapter already; it is called, never copied, and its parameters are frozen.  `lora_a`
    (rank, in_features) and `lora_b` (out_features, rank) are float32 unless `dtype` says
    otherwise, and cast to the input's dtype (autocast's, under autocast) at use.  `alpha` None
    means alpha = rank, an unscaled product.  `init` and `options`: see `LowRank` and `Options`.

    `weight` is the effective weight, base and product, in the base's layout and dtype, computed
    on read; the gradient flows through it.  Backward keeps x and x A^T.

    Raises:
        TypeError: base is no module.
        ValueError: base is no linear layer; rank below 1; alpha not above 0; dropout outside
            [0, 1).

    >>> layer = LoRALinear(nn.Linear(8, 4), rank=2)
    >>> x = torch.randn(3, 8)
    >>> torch.equal(layer(x), layer.base(x))  # B = 0
    True
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        init: Callable[["LoRALinear"], None] | None = None,
        **options: Unpack[Options],
    ) -> None:
        shape = checked_linear(type(self).__name__, base)
        shape_a, shape_b = (rank, shape.in_features), (shape.out_features, rank)
        super().__init__(base, shape_a, shape_b, rank, alpha, **options)
        self.in_features, self.out_features, self.transposed = shape
        warn_of_rank(type(self).__name__, rank, shape.in_features, shape.out_features)
        self.initialize(init)
        self.take_over()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged_module is not None and self._enabled:  # W + s B A stands beside W
            return self.call_merged(x, *args, **kwargs)
        y, strength = call(self._modules["base"], x, *args, **kwargs), self.strength_now()
        return y if strength is None else add_lora(y, self.dropped(x), *self.factors(), strength)

    def on_top(self, out: Tensor, x: Tensor, strength: float | Tensor) -> Tensor:
        """The output of the layers below, and the branch."""
        return add_lora(out, self.dropped(x), *self.factors(), strength)

    def delta_as_stored(self) -> Tensor:
        """`delta`, (in_features, out_features) where the weight is stored so (Conv1D)."""
        return self.delta().T if self.transposed else self.delta()


def checked_linear(caller: str, base: nn.Module) -> LinearShape:
    """The sizes of a linear-like base; raises TypeError or ValueError on anything else."""
    if not isinstance(base, nn.Module):
        raise TypeError(f"{caller}: expected a module as base, got {type(base).__name__}")
    shape = linear_shape(base)
    if shape is None:
        raise ValueError(
            f"{caller}: {type(base).__name__} is no linear layer; expected nn.Linear, Conv1D, "
            "NF4Linear, or a module with in_features, out_features and a weight of (out, in)"
        )
    return shape


def warn_of_rank(caller: str, rank: int, *sizes: int) -> None:
    """Warn where a rank is above what the product can have."""
    if rank > min(sizes):
        warnings.warn(
            f"{caller}: rank {rank} is above min(in_features, out_features) = {min(sizes)}; the "
            "product has no more rank than that, only more parameters",
            stacklevel=4,
        )
