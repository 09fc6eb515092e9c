"""A bias of LoRA's second factor: PEFT's `lora_bias`.

    y = base(x) + scaling * (B A x + lora_bias)

Made for adapters that were cut out of a fully trained layer, whose bias had changed too.  The bias
is a layer of its own over the LoRA layer, with that layer's scaling, so that it is saved, switched
off, scaled and merged with it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import innermost
from minipeft.adapters.wrapper import Wrapper
from minipeft.layers.conv import LoRAConv
from minipeft.lora import LoRALinear


class LoRABias(Wrapper):
    """base(x) + scaling * lora_bias, over a LoRA layer whose scaling it takes.

    `lora_bias` (out_features,) starts at zero and is float32; it is cast to the output's dtype.
    Merging needs a bias in the innermost module, to add it to.

    Raises:
        ValueError: the base is no LoRALinear or LoRAConv.

    >>> layer = LoRABias(LoRALinear(nn.Linear(4, 2), rank=1, alpha=3))
    >>> layer.scaling, layer.lora_bias.shape
    (3.0, torch.Size([2]))
    """

    def __init__(self, base: nn.Module) -> None:
        if not isinstance(base, LoRALinear | LoRAConv) or "magnitude" in base._parameters:
            raise ValueError(
                f"LoRABias: {type(base).__name__} takes no bias; expected a LoRALinear or LoRAConv"
            )
        super().__init__(base, scaling=base.scaling)
        b = base.lora_b
        self.lora_bias = nn.Parameter(torch.zeros(len(b), dtype=torch.float32, device=b.device))
        self._trailing = (1,) * (b.dim() - 2)  # the axes after the channels'
        self.take_over()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged_module is not None and self._enabled:
            return self.call_merged(*args, **kwargs)
        out: Tensor = self.base(*args, **kwargs)
        strength = self.strength_now()
        return out if strength is None else self.on_top(out, out, strength)

    def on_top(self, out: Tensor, x: Tensor, strength: float | Tensor) -> Tensor:
        """The output of the layers below, and strength * lora_bias."""
        added = self.lora_bias * strength
        return out + added.to(out.dtype).view(*added.shape, *self._trailing)

    def exact_parameters(self) -> dict[str, Tensor]:
        """The innermost bias plus scaling * lora_bias.

        Raises:
            ValueError: the innermost module has no bias.
        """
        below = self.parameters_below()
        if not self.enabled:
            return below
        plain = innermost(self)
        if getattr(plain, "bias", None) is None:
            raise ValueError(
                f"LoRABias: the {type(plain).__name__} has no bias to merge into; give it one of "
                "zeros first (its .bias), or leave the adapter unmerged"
            )
        bias = self.exact_below("bias", torch.float32)
        return {**below, "bias": bias + self.lora_bias * self.full_strength}

    @property
    def bias(self) -> Tensor | None:
        """The bias below, and what this layer adds."""
        below, strength = super().bias, self.strength_now()
        if strength is None:
            return below
        added = self.lora_bias * strength
        return added if below is None else below + added.to(below.dtype)
