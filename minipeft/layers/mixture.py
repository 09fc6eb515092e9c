"""LoRA on the 3-D weight of a mixture of experts: a pair of factors for every expert.

    W (experts, out, in), A (experts, rank, in), B (experts, out, rank):  W_e + scaling * B_e A_e

The layer stands where the parameter stood.  Models that multiply by one expert after the other
index it, `layer[e]`, and get that expert's effective weight; `layer(x, expert)` multiplies each row
by its expert, without ever computing B A.  Models that take the tensor whole (grouped_mm of
transformers) get the effective weights of all experts, computed again at every use.
"""

from collections.abc import Callable
from typing import Any, Unpack

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minipeft.adapters import products
from minipeft.adapters.products import without_autocast
from minipeft.adapters.protocol import innermost
from minipeft.lora import LowRank, Options
from minipeft.qlora import frozen
from minipeft.quantized.experts import NF4Experts


def by_expert(
    x: Float[Tensor, "tokens in_features"],
    expert: Int[Tensor, " tokens"],
    *weights: Float[Tensor, "n_experts _ _"],
) -> Float[Tensor, "tokens out_features"]:
    """Multiply each row by the matrix of its expert, x W_e^T, then by that of the next weights.

    One product for each expert over all of its rows.  (`F.grouped_mm` takes no float64, and on a
    GPU only ranks that fill a multiple of 16 bytes.)

    Raises:
        IndexError: there is no expert of such a number.
    """
    n_experts = len(weights[0])
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=n_experts).tolist()
    if len(counts) > n_experts:
        raise IndexError(f"expert {len(counts) - 1} of {n_experts}")
    rows = list(torch.split(x[order], counts))
    for weight in weights:  # unbind: one gradient for all experts, not one of full size for each
        rows = [products.linear(part, w) for part, w in zip(rows, weight.unbind(), strict=True)]
    return torch.cat(rows)[order.argsort()]


class DenseExperts(nn.Module):
    """The 3-D parameter of a mixture of experts as a module; `original` gives it back.

    `transposed` says that it is (experts, in_features, out_features).
    """

    def __init__(self, weight: nn.Parameter, *, transposed: bool = False) -> None:
        super().__init__()
        self.weight, self.transposed = weight, transposed

    def original(self) -> nn.Parameter:
        """The parameter itself, for the place where this module stands."""
        return self.weight

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        return self.weight.shape

    def __getitem__(self, expert: int | Int[Tensor, "*index"]) -> Tensor:
        return self.weight[expert]

    def __len__(self) -> int:
        return len(self.weight)

    def forward(
        self, x: Float[Tensor, "tokens in_features"], expert: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens out_features"]:
        return by_expert(x, expert, self.weight.mT if self.transposed else self.weight)


class LoRAExperts(LowRank):
    """LoRA over a 3-D weight (experts, out_features, in_features): a parameter, or NF4Experts.

    `lora_a` (experts, rank, in_features), `lora_b` (experts, out_features, rank).  `transposed`
    says that the weight is (experts, in_features, out_features), as gpt-oss keeps it.  `dropout`
    acts in `layer(x, expert)` only: an effective weight cannot have any.  The other arguments are
    as of LoRALinear.

    Raises:
        TypeError: base is neither a parameter nor a module.
        ValueError: base is no 3-D weight of experts; rank, alpha, dropout as of LoRALinear.

    >>> layer = LoRAExperts(nn.Parameter(torch.randn(3, 4, 8)), rank=2)
    >>> layer.lora_a.shape, layer.lora_b.shape, layer[0].shape
    (torch.Size([3, 2, 8]), torch.Size([3, 4, 2]), torch.Size([4, 8]))
    """

    rows_are_lost = "experts get the tokens of all rows sorted by expert, without their row numbers"

    def __init__(
        self,
        base: nn.Parameter | nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        transposed: bool = False,
        init: Callable[["LoRAExperts"], None] | None = None,
        **options: Unpack[Options],
    ) -> None:
        layer = _as_experts(type(self).__name__, base, transposed)
        transposed = getattr(layer, "transposed", transposed)  # a stack has one layout
        plain: Any = innermost(layer)
        n_experts, rows, columns = (int(size) for size in plain.shape)
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        shape_a, shape_b = (n_experts, rank, in_features), (n_experts, out_features, rank)
        super().__init__(layer, shape_a, shape_b, rank, alpha, **options)
        self.n_experts, self.transposed = n_experts, transposed
        self.initialize(init)
        self.take_over()

    def start(self) -> None:
        """Each expert's A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0."""
        bound = max(1, self.lora_a.shape[2]) ** -0.5
        with torch.no_grad():
            self.lora_a.uniform_(-bound, bound)
            self.lora_b.zero_()

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return torch.Size(innermost(self).shape)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        plain: Any = innermost(self)
        found: torch.dtype = plain.weight_dtype if _is_nf4(plain) else plain.weight.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return next(innermost(self).parameters()).device

    def __len__(self) -> int:
        return self.n_experts

    def __getitem__(
        self, expert: int | Int[Tensor, "*index"]
    ) -> Float[Tensor, "*index rows columns"]:
        if self.merged_module is not None and self._enabled:
            self.refuse_training()
            return self.merged_module[expert]  # type: ignore[index]
        return self.exact_expert(expert).to(self.dtype)

    def whole(self) -> Tensor:
        """The effective weights of all experts, in the weight's dtype; the gradient flows."""
        if self.merged_module is not None and self._enabled:
            self.refuse_training()
        return self.weight

    def exact_expert(self, expert: int | Int[Tensor, "*index"]) -> Tensor:
        """The effective weight of one expert, before it is rounded to the weight's dtype."""
        below: Any = self.base
        stacked = isinstance(below, LoRAExperts)
        weight: Tensor = below.exact_expert(expert) if stacked else below[expert]
        if (strength := self.strength_now()) is None:
            return weight
        a, b = self.factors()
        delta = _scaled(_product(b[expert], a[expert]), strength)
        return weight.to(torch.promote_types(weight.dtype, delta.dtype)) + self._stored(delta)

    def forward(
        self, x: Float[Tensor, "tokens in_features"], expert: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens out_features"]:
        if self.merged_module is not None and self._enabled:
            return self.call_merged(x, expert)
        if self.transposed and _is_nf4(innermost(self)):
            raise ValueError("LoRAExperts: NF4Experts stored (in, out) are indexed, not called")
        out: Tensor = self.base(x, expert)
        if (strength := self.strength_now()) is None:
            return out
        with without_autocast(x.device):
            a, b = (factor.to(out.dtype) for factor in self.factors())
            product = by_expert(self.dropped(x).to(out.dtype), expert, a, b)
            return out + _scaled(product, strength)

    def _stored(self, delta: Tensor) -> Tensor:
        return delta.mT if self.transposed else delta

    def delta(self) -> Float[Tensor, "n_experts out_features in_features"]:
        """What is added to the weights, in float32 or better, with the runtime scale."""
        a, b = self.factors()
        return self.full_strength * _product(b, a)

    def delta_as_stored(self) -> Tensor:
        """`delta` in the layout of the weight."""
        return self._stored(self.delta())

    def merged(self, *, requantize: bool = False) -> nn.Module:
        """As Wrapper.merged; NF4Experts become a DenseExperts, unless they are requantised."""
        plain: Any = innermost(self)
        if requantize or not _is_nf4(plain):
            return super().merged(requantize=requantize)
        with torch.inference_mode(False), torch.no_grad():
            weight = self.effective_parameters().get("weight", plain.weight)
        return DenseExperts(frozen(weight), transposed=self.transposed).train(self.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not name.startswith("_") and hasattr(Tensor, name):
                return getattr(self.whole(), name)
            raise

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_whole(args), **_whole(kwargs or {}))


def peft_from_experts(
    a: Float[Tensor, "n_experts rank in_features"], b: Float[Tensor, "n_experts out_features rank"]
) -> tuple[Float[Tensor, "packed_rank in_features"], Float[Tensor, "out_features packed_rank"]]:
    """The factors as PEFT packs them: A's rows by expert, then rank; B's columns by rank first.

    >>> a, b = peft_from_experts(torch.zeros(3, 2, 8), torch.zeros(3, 4, 2))
    >>> a.shape, b.shape
    (torch.Size([6, 8]), torch.Size([4, 6]))
    """
    return rearrange(a, "e r i -> (e r) i"), rearrange(b, "e o r -> o (r e)")


def experts_from_peft(
    a: Float[Tensor, "packed_rank in_features"],
    b: Float[Tensor, "out_features packed_rank"],
    n_experts: int,
) -> tuple[
    Float[Tensor, "n_experts rank in_features"], Float[Tensor, "n_experts out_features rank"]
]:
    """The inverse of `peft_from_experts`.

    Raises:
        ValueError: the packed rank is no multiple of the number of experts.
    """
    if n_experts < 1 or len(a) % n_experts:
        raise ValueError(f"experts_from_peft: rank {len(a)} in all for {n_experts} experts")
    return (
        rearrange(a, "(e r) i -> e r i", e=n_experts),
        rearrange(b, "o (r e) -> e o r", e=n_experts),
    )


def _product(b: Tensor, a: Tensor) -> Tensor:
    """B A of each expert, in float32 or better."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(a.dtype, b.dtype))
    return b.to(dtype) @ a.to(dtype)


def _scaled(values: Tensor, strength: float | Tensor) -> Tensor:
    if isinstance(strength, Tensor):  # off: nothing, whatever the factors hold
        return torch.where(strength == 0, 0.0, values * strength)
    return values * strength


def _is_nf4(plain: nn.Module) -> bool:
    return isinstance(plain, NF4Experts)


def _as_experts(caller: str, base: object, transposed: bool) -> nn.Module:
    if isinstance(base, nn.Parameter):
        if base.dim() != 3 or not base.is_floating_point():
            raise ValueError(
                f"{caller}: a parameter {tuple(base.shape)} of {base.dtype}; expected floats of 3 "
                "axes, (experts, out, in)"
            )
        return DenseExperts(base, transposed=transposed)
    if not isinstance(base, nn.Module):
        raise TypeError(f"{caller}: expected a parameter or module, got {type(base).__name__}")
    if not isinstance(innermost(base), DenseExperts | NF4Experts):
        raise ValueError(
            f"{caller}: {type(innermost(base)).__name__} holds no experts; expected a 3-D "
            "parameter or NF4Experts"
        )
    return base


def _whole(values: Any) -> Any:
    """The arguments of a torch function, with the effective weights in place of each layer."""
    if isinstance(values, LoRAExperts):
        return values.whole()
    if isinstance(values, list | tuple):
        return type(values)(_whole(value) for value in values)
    if isinstance(values, dict):
        return {name: _whole(value) for name, value in values.items()}
    return values
