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

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.ops import without_autocast
from minipeft.protocol import (
    has_stored_weight,
    is_adapter,
    is_packed,
    linear_shape,
    linear_with_weight,
)


def lora_scaling(alpha: float, rank: int, *, rank_stabilized: bool = False) -> float:
    """The factor on the low-rank product: alpha / rank (Hu et al. 2021, section 4.1).

    `rank_stabilized` takes alpha / sqrt(rank), which keeps the size of what a high rank learns
    (Kalajdzievski 2023, rsLoRA).

    Raises:
        ValueError: rank below 1, or alpha not above 0 and finite.

    >>> lora_scaling(16, 8), lora_scaling(16, 4, rank_stabilized=True)
    (2.0, 8.0)
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"LoRA: rank={rank!r}; expected a whole number of at least 1")
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


def add_lora(base_out: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """base_out + lora_forward(x, a, b, scaling): the product is added in the same matrix multiply.

    `x`, `a` and `b` are cast to `base_out`'s dtype where it differs, so that the result has it.
    Backward keeps x and x A^T, and the casts of the factors; nothing of base_out's size.
    """
    dtype, columns = base_out.dtype, base_out.shape[-1]
    with without_autocast(x.device):  # every dtype is settled here
        hidden = F.linear(x.to(dtype), a.to(dtype))  # x A^T, (*batch, rank)
        if base_out.dim() == 2:
            return torch.addmm(base_out, hidden, b.to(dtype).T, alpha=scaling)
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = torch.addmm(base_out.reshape(-1, columns), rows, b.to(dtype).T, alpha=scaling)
        return out.view(base_out.shape)


def init_default(layer: "LoRALinear") -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, as in loralib and PEFT."""
    bound = 1 / math.sqrt(max(1, layer.in_features))
    with torch.no_grad():
        layer.lora_a.uniform_(-bound, bound)
        layer.lora_b.zero_()


class LoRALinear(nn.Module):
    """A linear layer with LoRA: base(x) + scaling * B A x  (Hu et al. 2021, eq. 3).

    `base` is any linear-like module (nn.Linear, transformers' Conv1D, NF4Linear, your own); it
    is called, never copied, and its parameters are frozen.  `lora_a` (rank, in_features) and
    `lora_b` (out_features, rank) are float32 unless `dtype` says otherwise, and cast to the
    input's dtype (autocast's, under autocast) at use.  `alpha` None means alpha = rank, an
    unscaled product.  `dropout` acts on the branch's input while training.  `init` is called
    with the layer after the default initialisation and changes lora_a and lora_b in place.

    `weight` is the effective weight, base and product, in the base's layout and dtype, computed
    on read; the gradient flows through it.  Backward keeps x and x A^T.

    Raises:
        TypeError: base is no module.
        ValueError: base is no linear layer or already has an adapter; rank below 1; alpha not
            above 0; dropout outside [0, 1).

    >>> layer = LoRALinear(nn.Linear(8, 4), rank=2)
    >>> x = torch.randn(3, 8)
    >>> torch.equal(layer(x), layer.base(x))  # B = 0
    True
    """

    merged_weight: Tensor | None

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
        super().__init__()
        self.scaling = lora_scaling(
            rank if alpha is None else alpha, rank, rank_stabilized=rank_stabilized
        )
        shape = _checked_shape(base)
        if not 0 <= dropout < 1:
            raise ValueError(f"LoRALinear: dropout={dropout!r}; expected 0 <= dropout < 1")
        if not dtype.is_floating_point:
            raise ValueError(f"LoRALinear: dtype={dtype}; expected a floating-point dtype")
        self.in_features, self.out_features, self._transposed = shape
        if rank > min(self.in_features, self.out_features):
            warnings.warn(
                f"LoRALinear: rank {rank} is above min(in_features, out_features) = "
                f"{min(self.in_features, self.out_features)}; the product has no more rank than "
                "that, only more parameters",
                stacklevel=2,
            )
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.rank_stabilized, self.dropout = rank_stabilized, dropout
        self.enabled, self.scale = True, 1.0
        self.base = base
        device = next(base.parameters()).device
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, dtype=dtype, device=device))
        self.register_buffer("merged_weight", None, persistent=False)
        init_default(self)  # also under a custom one, which may fill only what it changes
        if init is not None:
            init(self)
        base.requires_grad_(False)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None and self.enabled:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "LoRALinear: training while merged would give the adapter no gradient; call "
                    "minipeft.unmerge(model) first, or model.eval() to run it merged"
                )
            return linear_with_weight(self.base, self.merged_weight, x)
        base_out: Tensor = self.base(x)
        if not self.enabled:
            return base_out
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return add_lora(base_out, x, self.lora_a, self.lora_b, self.scaling * self.scale)

    def delta(self) -> Tensor:
        """scaling * B A, (out_features, in_features), float32 or better, with the runtime scale."""
        return lora_delta(self.lora_a, self.lora_b, self.scaling * self.scale)

    def effective_weight(self) -> Tensor:
        """Base weight plus delta, summed in float32 or better and rounded once to its dtype."""
        base_weight: Tensor = self.base.weight  # type: ignore[assignment]
        delta = self.delta().T if self._transposed else self.delta()
        return (base_weight.to(delta.dtype) + delta).to(base_weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight that forward multiplies by, in the base's layout; computed on read."""
        if not self.enabled:
            return self.base.weight  # type: ignore[return-value]
        return self.effective_weight() if self.merged_weight is None else self.merged_weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"LoRALinear.{name} belongs to the base; assign to .base.{name} "
                "(and unmerge first), or train lora_a and lora_b"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        # torch's part of load_state_dict for one module; the last argument collects errors
        if self.merged_weight is not None and f"{prefix}lora_a" in state:
            rest[-1].append(f"{prefix[:-1]} is merged; call minipeft.unmerge(model) first")
            return
        super()._load_from_state_dict(state, prefix, *rest)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """lora_a and lora_b."""
        return {"lora_a": self.lora_a, "lora_b": self.lora_b}

    def merge(self) -> None:
        """Compute with one dense weight, kept beside the untouched base and in no state dict.

        Raises:
            ValueError: the merged weight is not finite, or the base computes its weight (weight
                norm, a parametrisation); nothing has changed then.
        """
        _require_stored_weight("merge", self.base)
        with torch.inference_mode(False), torch.no_grad():
            weight = self.effective_weight()
        if not bool(weight.isfinite().all()):
            raise ValueError(
                "LoRALinear.merge: the merged weight holds NaN or Inf; look for a diverged "
                "adapter, or a sum beyond the range of " + str(weight.dtype)
            )
        self.merged_weight = weight

    def unmerge(self) -> None:
        """Drop the merged weight; the base was never changed."""
        self.merged_weight = None

    def merged(self, *, requantize: bool = False) -> nn.Module:
        """A plain module with the effective weight: the base's own class, nn.Linear for NF4.

        `requantize` keeps a packed base packed, at the price of rounding to 4 bits again.

        Raises:
            ValueError: requantize on a base that is not packed, or a base that computes its
                weight.
        """
        _require_stored_weight("merged", self.base)
        with torch.inference_mode(False), torch.no_grad():
            weight = self.effective_weight()
        if is_packed(self.base):
            base = self.base
            plain = base.requantized(weight) if requantize else base.dense(weight)
            return cast(nn.Module, plain).train(self.training)
        if requantize:
            raise ValueError(f"LoRALinear.merged: {type(self.base).__name__} has no codes to renew")
        # deepcopy finds the weight in its memo, so the old one is never copied
        plain = copy.deepcopy(self.base, {id(self.base.weight): nn.Parameter(weight)})
        return plain.requires_grad_(False)

    def extra_repr(self) -> str:
        off = "" if self.enabled else ", disabled"
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}{off}"


def _require_stored_weight(caller: str, base: nn.Module) -> None:
    if not has_stored_weight(base):
        raise ValueError(
            f"LoRALinear.{caller}: {type(base).__name__} computes its weight (weight norm, a "
            "parametrisation); take that off first, with torch.nn.utils.parametrize."
            "remove_parametrizations or torch.nn.utils.remove_weight_norm"
        )


def _checked_shape(base: nn.Module) -> tuple[int, int, bool]:
    if not isinstance(base, nn.Module):
        raise TypeError(f"LoRALinear: expected a module as base, got {type(base).__name__}")
    if is_adapter(base):
        raise ValueError(
            f"LoRALinear: base is a {type(base).__name__}, which already has an adapter; wrap its "
            ".base, or remove the adapter first"
        )
    shape = linear_shape(base)
    if shape is None:
        raise ValueError(
            f"LoRALinear: {type(base).__name__} is no linear layer; expected nn.Linear, Conv1D, "
            "NF4Linear, or a module with in_features, out_features and a weight of (out, in)"
        )
    return shape
