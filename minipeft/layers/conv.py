"""LoRA on a convolution: a convolution to `rank` channels, then a 1x1 one.

    x (batch, in, *size) -> A, the base's own kernel size, stride, padding, dilation -> (rank, ...)
                         -> B, 1x1 -> (out, ...), added to the base's output

Their composition is one kernel, B A, which merging adds to the base's.  In a convolution with
groups both stay within the groups, so that this holds there too.
"""

from collections.abc import Callable
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.adapters.linearity import why_not_formula
from minipeft.adapters.protocol import innermost
from minipeft.lora import LowRank, Options, lora_scaling

_POINTWISE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoRAConv(LowRank):
    """nn.Conv1d, Conv2d or Conv3d with LoRA; any stride, padding, padding mode, dilation, groups.

    `lora_a` (rank, in_channels / groups, *kernel_size), `lora_b` (out_channels, rank / groups,
    *ones).  The first convolution is computed by the base's own code with `lora_a` for a weight,
    so no setting can be forgotten.  `dropout` acts on the branch's input while training.

    `across_groups` lets `lora_a` (rank, in_channels, *kernel_size) see every channel, as PEFT's
    does: no kernel of the base's shape can express that, so such a layer cannot be merged.

    Raises:
        TypeError: base is no module.
        ValueError: base is no such convolution, or computes something else than torch's by its
            settings; `groups` does not divide the rank; rank, alpha, dropout as of LoRALinear.

    >>> layer = LoRAConv(nn.Conv1d(4, 6, 3), rank=2)
    >>> layer.lora_a.shape, layer.lora_b.shape, layer.delta().shape
    (torch.Size([2, 4, 3]), torch.Size([6, 2, 1]), torch.Size([6, 4, 3]))
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        init: Callable[["LoRAConv"], None] | None = None,
        across_groups: bool = False,
        **options: Unpack[Options],
    ) -> None:
        plain = _checked_convolution(type(self).__name__, base)
        groups, kernel = plain.groups, plain.kernel_size
        lora_scaling(rank if alpha is None else alpha, rank)  # raises on an invalid rank
        if rank % groups:
            raise ValueError(
                f"{type(self).__name__}: rank {rank} over {groups} groups; choose a multiple of "
                f"{groups}, so that each group gets as much"
            )
        self_groups = 1 if across_groups else groups
        shape_a = (rank, plain.in_channels // self_groups, *kernel)
        shape_b = (plain.out_channels, rank // groups, *(1,) * len(kernel))
        super().__init__(base, shape_a, shape_b, rank, alpha, **options)
        self.across_groups = self_groups != groups
        if self.across_groups:  # the base's settings but one; no submodule: its weight is not used
            kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
            self.__dict__["across"] = kind(
                plain.in_channels, rank, kernel, plain.stride, plain.padding, plain.dilation,
                bias=False, padding_mode=plain.padding_mode, device="meta",
            )  # fmt: skip
        self.initialize(init)
        self.take_over()

    def on_top(self, out: Tensor, x: Tensor, strength: float | Tensor) -> Tensor:
        """The output of the layers below, and the branch."""
        return out + self.branch(self.dropped(x.to(out.dtype)), out.dtype, strength)

    def branch(self, x: Tensor, dtype: torch.dtype, strength: float | Tensor) -> Tensor:
        """strength * B A x, in `dtype`."""
        a, b = (factor.to(dtype) for factor in self.factors())
        plain: Any = innermost(self)
        first = self.across if self.across_groups else plain
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[a.dim() - 3]
        hidden = kind._conv_forward(first, x, a, None) * strength
        if isinstance(strength, Tensor):
            hidden = torch.where(strength == 0, 0.0, hidden)
        return _POINTWISE[a.dim() - 2](hidden, b, groups=plain.groups)

    def groups_within(self) -> int:
        """The groups that both factors stay within: the base's, or one for all channels."""
        plain: Any = innermost(self)
        return 1 if self.across_groups else int(plain.groups)

    def delta(self) -> Tensor:
        """The kernel that is added, (out_channels, in_channels / groups, *kernel_size).

        Raises:
            ValueError: `lora_a` reaches across groups.
        """
        if self.across_groups:
            raise ValueError(
                "LoRAConv: lora_a reaches across the base's groups, which no kernel of its shape "
                "can express; it cannot be merged"
            )
        a, b = self.factors()
        dtype = torch.promote_types(torch.float32, torch.promote_types(a.dtype, b.dtype))
        return self.full_strength * kernel_product(a.to(dtype), b.to(dtype), self.groups_within())

    def factors(self) -> tuple[Tensor, Tensor]:
        """a and b of the whole product; where a start is subtracted, of twice the rank."""
        if self.lora_a0 is None or self.lora_b0 is None:
            return self.lora_a, self.lora_b
        a: list[Tensor] = [
            rearrange(t, "(g r) ... -> g r ...", g=self.groups_within())
            for t in (self.lora_a, self.lora_a0)
        ]
        joined = rearrange(torch.cat(a, dim=1), "g r ... -> (g r) ...")
        return joined, torch.cat([self.lora_b, -self.lora_b0], dim=1)

    def halves(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, A0 and B0 of what `factors` made of them."""
        grouped = rearrange(a, "(g r) ... -> g r ...", g=self.groups_within())
        parts = [rearrange(t, "g r ... -> (g r) ...") for t in grouped.chunk(2, 1)]
        (b, b0) = b.chunk(2, 1)
        return parts[0], b, parts[1], -b0


def kernel_product(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """The kernel of b after a: (out, in / groups, *kernel)."""
    a = rearrange(a, "(g r) ... -> g r ...", g=groups)
    b = rearrange(b.flatten(1), "(g o) r -> g o r", g=groups)
    product = torch.einsum("gor,grk->gok", b, a.flatten(2))
    return product.reshape(-1, *a.shape[2:])


def full_from_grouped(
    a: Float[Tensor, "rank in_of_group *kernel"], b: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """The same factors with `a` over all input channels, (rank, in, *kernel), zero across groups.

    That is the shape of PEFT's, whose first convolution has no groups.
    """
    if groups == 1:
        return a, b
    parts = rearrange(a, "(g r) i ... -> g r i ...", g=groups)
    full = a.new_zeros(groups, parts.shape[1], groups, *parts.shape[2:])
    for group in range(groups):
        full[group, :, group] = parts[group]
    return rearrange(full, "g r h i ... -> (g r) (h i) ..."), b


def grouped_from_full(
    a: Float[Tensor, "rank channels *kernel"], b: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """The inverse of `full_from_grouped`.

    Raises:
        ValueError: `a` reaches across groups, which no kernel of the base's shape can express.
    """
    if groups == 1:
        return a, b
    if a.shape[0] % groups or a.shape[1] % groups:
        raise ValueError(f"a kernel of shape {tuple(a.shape)} does not divide into {groups} groups")
    full = rearrange(a, "(g r) (h i) ... -> g r h i ...", g=groups, h=groups)
    own = torch.stack([full[group, :, group] for group in range(groups)])
    across = full.clone()
    for group in range(groups):
        across[group, :, group] = 0
    if bool((across != 0).any()):
        raise ValueError(
            f"lora_A reaches across the {groups} groups of the convolution, so that it could never "
            "be merged; this layer stays within them"
        )
    return rearrange(own, "g r i ... -> (g r) i ..."), b


def _checked_convolution(caller: str, base: nn.Module) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    if not isinstance(base, nn.Module):
        raise TypeError(f"{caller}: expected a module as base, got {type(base).__name__}")
    plain = innermost(base)
    if not isinstance(plain, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise ValueError(
            f"{caller}: {type(plain).__name__} is none of nn.Conv1d, nn.Conv2d, nn.Conv3d"
        )
    if reason := why_not_formula(plain, hooks=False):
        raise ValueError(
            f"{caller}: {reason} (padding, standardised weights?), so the branch and a merged "
            "kernel could not follow it; leave it out (exclude=)"
        )
    return plain
