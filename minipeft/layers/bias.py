"""A bias of LoRA's second factor: PEFT's `lora_bias`.

    y = base(x) + scaling * (B A x + lora_bias)

Made for adapters that were cut out of a fully trained layer, whose bias had changed too.  The bias
is a layer of its own over the LoRA layer, with that layer's scaling, so that it is saved, switched
off, scaled and merged with it.
"""

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import innermost
from minipeft.layers.conv import LoRAConv
from minipeft.layers.trained import AddedBias
from minipeft.lora import LoRALinear


class LoRABias(AddedBias):
    """base(x) + scaling * lora_bias, over a LoRA layer whose scaling it takes.

    `lora_bias` (out_features,) starts at zero and is float32; it is cast to the output's dtype.
    Merging needs a bias in the innermost module, to add it to.

    Raises:
        ValueError: the base is no LoRALinear or LoRAConv.

    >>> layer = LoRABias(LoRALinear(nn.Linear(4, 2), rank=1, alpha=3))
    >>> layer.scaling, layer.lora_bias.shape
    (3.0, torch.Size([2]))
    """

    vector = "lora_bias"

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

    def exact_parameters(self) -> dict[str, Tensor]:
        """The innermost bias plus scaling * lora_bias.

        Raises:
            ValueError: the innermost module has no bias.
        """
        plain = innermost(self)
        if self.enabled and getattr(plain, "bias", None) is None:
            raise ValueError(
                f"LoRABias: the {type(plain).__name__} has no bias to merge into; give it one of "
                "zeros first (its .bias), or leave the adapter unmerged"
            )
        return super().exact_parameters()
