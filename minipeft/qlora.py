"""QLoRA: a frozen 4-bit base under LoRA (Dettmers et al. 2023).

There is no QLoRA class: it is LoRALinear(NF4Linear.from_linear(linear), rank=8), equation 5 of
the paper:  y = x doubleDequant(c1, c2, W)^T + s x A^T B^T.

NF4Linear keeps its weight as bytes (packed.py says how), decodes it, and multiplies.  Backward
needs the weight again and decodes it again: saving it would cost what was saved.

Read next: prefix.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minipeft import ops
from minipeft.adapters.linearity import why_not_replaceable
from minipeft.double_quant import decoded_absmax
from minipeft.fast import derivatives, products
from minipeft.packed import PackedModule, encoded, frozen

PANEL_BYTES = 16 * 2**20
GPU_PANEL_BYTES = 256 * 2**20


def _panel_bytes(device: torch.device) -> int:
    """How much of the weight to decode at a time for a product.

    On a CPU larger panels leave the cache before they are multiplied, and smaller ones make thin
    products; elsewhere it is a bound on memory, seldom reached.
    """
    return PANEL_BYTES if device.type == "cpu" else GPU_PANEL_BYTES


@ops.implements("nf4_linear")
def _linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    in_features = x.shape[-1]
    rows = max(1, _panel_bytes(x.device) // max(1, in_features * x.element_size()))
    if rows >= out_features or in_features % block_size:
        shape = [out_features, in_features]
        weight = torch.ops.minipeft.dequantize_nf4(
            packed, absmax, scale, offset, shape, block_size, x.dtype, codebook
        )
        return products.linear(x, weight, bias)
    scales = decoded_absmax(absmax, scale, offset).view(out_features, -1)
    codes, panels = packed.view(out_features, -1), []
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        weight = torch.ops.minipeft.dequantize_nf4(
            codes[first:last], scales[first:last], None, None, [last - first, in_features],
            block_size, x.dtype, codebook,
        )  # fmt: skip
        panels.append(products.linear(x, weight, None if bias is None else bias[first:last]))
    return torch.cat(panels, dim=-1)


@ops.implements("nf4_linear_input_gradient")
def _input_gradient(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    out_features = grad.shape[-1]
    blocks = _panel_bytes(grad.device) // max(1, out_features * grad.element_size() * block_size)
    columns = max(1, blocks) * block_size
    if columns >= in_features or in_features % block_size:
        shape = [out_features, in_features]
        weight = torch.ops.minipeft.dequantize_nf4(
            packed, absmax, scale, offset, shape, block_size, grad.dtype, codebook
        )
        return products.matmul(grad, weight)
    # panels of columns, not of rows: each element of the gradient is one sum, rounded once
    scales = decoded_absmax(absmax, scale, offset).view(out_features, -1)
    codes, panels = packed.view(out_features, -1), []
    for first in range(0, in_features, columns):
        last = min(first + columns, in_features)
        weight = torch.ops.minipeft.dequantize_nf4(
            codes[:, first // 2 : last // 2].contiguous(),
            scales[:, first // block_size : last // block_size].contiguous(),
            None, None, [out_features, last - first], block_size, grad.dtype,
            codebook,
        )  # fmt: skip
        panels.append(products.matmul(grad, weight))
    return torch.cat(panels, dim=-1)


class NF4Linear(PackedModule):
    """A linear layer with a frozen NF4 weight, double-quantised unless told otherwise.

    Made by `from_linear`; the constructor leaves the codes empty, to be filled by a state dict.
    Output dtype = input dtype (autocast's under autocast); `compute_dtype` asks for another
    dtype of the product inside.  `weight` is the dequantised weight in the dtype that the linear
    layer had, computed on read; casting the module changes that dtype and no code.

    Source of the format: QLoRA (Dettmers et al. 2023), section 3; the bytes are bitsandbytes'.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        codebook: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            (out_features, in_features), block_size=block_size, double_quant=double_quant,
            codebook=codebook, dtype=dtype, device=device,
        )  # fmt: skip
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise ValueError(f"NF4Linear: compute_dtype={compute_dtype}; expected a float dtype")
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        self.register_parameter(
            "bias",
            frozen(torch.empty(out_features, dtype=self.weight_dtype, device=device))
            if bias
            else None,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> "NF4Linear":
        """The same layer with its weight rounded to NF4; the bias is shared, and frozen.

        Raises:
            TypeError: not a module.
            ValueError: not an nn.Linear, or a subclass that computes something else than
                x W^T + b (it would be lost; LoRA can wrap it); weights that cannot be quantised.
        """
        weight, bias = check_quantizable(linear)
        layer = cls.from_weight(
            weight, bias, block_size=block_size, double_quant=double_quant,
            compute_dtype=compute_dtype,
        )  # fmt: skip
        return layer.train(linear.training)

    @classmethod
    @torch.inference_mode(False)  # its tensors could never be saved for a backward
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> "NF4Linear":
        """A layer that computes x W^T + bias with `weight`, (out_features, in_features), in NF4."""
        state = encoded(weight, block_size, double_quant)
        out_features, in_features = weight.shape
        layer = cls(
            in_features, out_features, bias=False, block_size=block_size,
            double_quant=double_quant, compute_dtype=compute_dtype, dtype=weight.dtype,
            device="meta",
        )  # fmt: skip
        if bias is not None:
            layer.bias = frozen(bias.detach())
        layer.fill(state)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"NF4Linear: input of shape {tuple(x.shape)}; expected (*, {self.in_features})"
            )
        dtype = x.dtype
        if ops.autocast_is_on(x.device):
            dtype = dtype if dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
        compute_dtype = self.compute_dtype or dtype
        bias = None if self.bias is None else self.bias.to(compute_dtype)
        out = derivatives.call(
            "nf4_linear", x.to(compute_dtype), *self.state(), bias, self.out_features,
            self.block_size, self.codebook,
        )  # fmt: skip
        return out.to(dtype)

    def requantized(self, weight: Tensor) -> "NF4Linear":
        """A layer with this one's settings and bias and the codes of another weight, in NF4."""
        layer = self.from_weight(
            weight.float(), self.bias, block_size=self.block_size,
            double_quant=self.double_quant, compute_dtype=self.compute_dtype,
        )  # fmt: skip
        layer.weight_dtype = self.weight_dtype
        return layer.train(self.training)

    def dense(self, weight: Tensor | None = None) -> nn.Module:
        """A plain nn.Linear with this layer's weight, or with another one; frozen."""
        weight = self.dequantize() if weight is None else weight
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = frozen(weight)
        if self.bias is not None:
            linear.bias = frozen(self.bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"{self.settings_repr()}"
        )


def check_quantizable(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of an nn.Linear that computes x W^T + b (linearity.py); or raises."""
    if not isinstance(linear, nn.Module):
        raise TypeError(f"NF4Linear: expected a module, got {type(linear).__name__}")
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"NF4Linear: {type(linear).__name__} is no nn.Linear")
    if reason := why_not_replaceable(linear):
        raise ValueError(
            f"NF4Linear: {reason}, and NF4Linear would replace it by that; leave it dense (LoRA "
            "can wrap it), or name the class in quantize_model(also=...) if you know better"
        )
    return linear.weight, linear.bias
