"""GPT-2's linear layer in NF4: transformers' Conv1D, whose weight is (in_features, out_features).

The codes are those of the transposed weight, (out_features, in_features), as in bitsandbytes'
files: blocks run along the inputs of one output.  `weight` has Conv1D's own layout.
"""

from typing import Unpack, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.adapters.protocol import is_conv1d
from minipeft.qlora import NF4Linear, Quantized, frozen


class NF4Conv1D(NF4Linear):
    """transformers' Conv1D, x W + bias with W (in_features, out_features), frozen and in NF4.

    Computes as NF4Linear does; made by `from_linear(conv1d)`.

    Raises:
        ValueError: `from_linear` of anything but a Conv1D.
    """

    transposed = True
    dense_class: type[nn.Module]  # transformers' Conv1D, taken from the layer it was made of

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        compute_dtype: torch.dtype | None = None,
        **settings: Unpack[Quantized],
    ) -> "NF4Conv1D":
        """The same layer with its transposed weight rounded to NF4; the bias is shared, frozen."""
        if not is_conv1d(linear) or type(linear).__name__ != "Conv1D":
            raise ValueError(
                f"NF4Conv1D: {type(linear).__name__} is no transformers Conv1D; NF4Linear is for "
                "nn.Linear"
            )
        weight, bias = cast(Tensor, linear.weight), cast(Tensor | None, linear.bias)
        made = cls.from_weight(weight.T, bias, compute_dtype=compute_dtype, **settings)
        layer = cast(NF4Conv1D, made)
        layer.dense_class = type(linear)
        return layer.train(linear.training)

    @property
    def nf(self) -> int:
        """out_features, by Conv1D's name."""
        return self.out_features

    @property
    def nx(self) -> int:
        """in_features, by Conv1D's name."""
        return self.in_features

    @property
    def weight(self) -> Float[Tensor, "in_features out_features"]:
        """The dequantised weight in Conv1D's layout, computed on read."""
        return self.dequantize().T

    def requantized(self, weight: Tensor) -> "NF4Conv1D":
        """A layer like this one with the codes of another (in, out) weight."""
        layer = cast(NF4Conv1D, super().requantized(weight.T))
        layer.dense_class = self.dense_class
        return layer

    def dense(self, weight: Tensor | None = None) -> nn.Module:
        """A plain Conv1D with this layer's weight, or with another (in, out) one; frozen."""
        with torch.device("meta"):
            plain = self.dense_class(self.out_features, self.in_features)
        plain.weight = frozen((self.weight if weight is None else weight).contiguous())
        if self.bias is not None:
            plain.bias = frozen(self.bias.detach().clone())
        return plain.train(self.training)
