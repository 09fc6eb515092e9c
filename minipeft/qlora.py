"""QLoRA: a frozen 4-bit base under LoRA (Dettmers et al. 2023).

There is no QLoRA class: it is LoRALinear(NF4Linear.from_linear(linear), rank=8), equation 5 of
the paper:  y = x doubleDequant(c1, c2, W)^T + s x A^T B^T.

NF4Linear stores bytes only, as frozen uint8 parameters, so that no cast, optimiser or precision
policy can touch them; float32 scales are kept as their bytes and viewed as float32 at use:

    packed          (out, in/2)           two codes in a byte
    absmax_code     (out, in/block_size)  8-bit codes of the block scales
    absmax_scale    (4 * groups,)         float32 bytes, one scale for 256 codes
    absmax_offset   (4,)                  float32 bytes

or `absmax` (out, 4 * in/block_size) instead of the last three without double quantisation.
Backward needs the weight again and decodes it again: saving it would cost what was saved.

Read next: prefix.py.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from minipeft import nf4, ops
from minipeft.double_quant import ABSMAX_BLOCK_SIZE, decoded_absmax, quantize_absmax
from minipeft.protocol import has_stored_weight

PANEL_BYTES = 16 * 2**20
GPU_PANEL_BYTES = 256 * 2**20


def _panel_bytes(device: torch.device) -> int:
    """How much of the weight to decode at a time for a product.

    On a CPU larger panels leave the cache before they are multiplied, and smaller ones make thin
    products; elsewhere it is a bound on memory, seldom reached.
    """
    return PANEL_BYTES if device.type == "cpu" else GPU_PANEL_BYTES


def _as_bytes(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.uint8)


def _as_float32(stored: Tensor) -> Tensor:
    # a slice of somebody's buffer: viewing needs alignment (a compiled layer owns its parameters)
    if not torch.compiler.is_compiling() and stored.storage_offset() % 4:
        stored = stored.clone()
    return stored.view(torch.float32)


def _frozen(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def _encoded(weight: Tensor, block_size: int, double_quant: bool) -> dict[str, Tensor]:
    """Codes and scales by the names that NF4Linear keeps them under."""
    packed, absmax = nf4.quantize_nf4(weight.detach(), block_size=block_size)
    if not double_quant:
        return {"packed": packed, "absmax": absmax}
    code, scale, offset = quantize_absmax(absmax)
    return {
        "packed": packed, "absmax_code": code, "absmax_scale": scale, "absmax_offset": offset
    }  # fmt: skip


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
) -> Tensor:
    in_features = x.shape[-1]
    rows = max(1, _panel_bytes(x.device) // max(1, in_features * x.element_size()))
    if rows >= out_features or in_features % block_size:
        shape = [out_features, in_features]
        weight = torch.ops.minipeft.dequantize_nf4(
            packed, absmax, scale, offset, shape, block_size, x.dtype
        )
        return F.linear(x, weight, bias)
    scales = decoded_absmax(absmax, scale, offset).view(out_features, -1)
    codes, panels = packed.view(out_features, -1), []
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        weight = torch.ops.minipeft.dequantize_nf4(
            codes[first:last], scales[first:last], None, None, [last - first, in_features],
            block_size, x.dtype,
        )  # fmt: skip
        panels.append(F.linear(x, weight, None if bias is None else bias[first:last]))
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
) -> Tensor:
    out_features = grad.shape[-1]
    blocks = _panel_bytes(grad.device) // max(1, out_features * grad.element_size() * block_size)
    columns = max(1, blocks) * block_size
    if columns >= in_features or in_features % block_size:
        shape = [out_features, in_features]
        weight = torch.ops.minipeft.dequantize_nf4(
            packed, absmax, scale, offset, shape, block_size, grad.dtype
        )
        return torch.matmul(grad, weight)
    # panels of columns, not of rows: each element of the gradient is one sum, rounded once
    scales = decoded_absmax(absmax, scale, offset).view(out_features, -1)
    codes, panels = packed.view(out_features, -1), []
    for first in range(0, in_features, columns):
        last = min(first + columns, in_features)
        weight = torch.ops.minipeft.dequantize_nf4(
            codes[:, first // 2 : last // 2].contiguous(),
            scales[:, first // block_size : last // block_size].contiguous(),
            None, None, [out_features, last - first], block_size, grad.dtype,
        )  # fmt: skip
        panels.append(torch.matmul(grad, weight))
    return torch.cat(panels, dim=-1)


class NF4Linear(nn.Module):
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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        nf4.check_block_size("NF4Linear", block_size)
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise ValueError(f"NF4Linear: compute_dtype={compute_dtype}; expected a float dtype")
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.compute_dtype = block_size, compute_dtype
        self.weight_dtype = dtype or torch.get_default_dtype()
        n, aligned = in_features * out_features, in_features % block_size == 0
        n_blocks = math.ceil(n / block_size)
        blocks = (out_features, in_features // block_size) if aligned else (n_blocks,)
        sizes = {"packed": (out_features, in_features // 2) if aligned else (math.ceil(n / 2),)}
        if double_quant:
            sizes["absmax_code"] = blocks
            sizes["absmax_scale"] = (4 * math.ceil(n_blocks / ABSMAX_BLOCK_SIZE),)
            sizes["absmax_offset"] = (4,)
        else:
            sizes["absmax"] = (*blocks[:-1], 4 * blocks[-1])
        for name, size in sizes.items():
            # not register_parameter: it refuses "absmax", which the class has as a property
            self._parameters[name] = _frozen(torch.empty(size, dtype=torch.uint8, device=device))
        self.register_parameter(
            "bias",
            _frozen(torch.empty(out_features, dtype=self.weight_dtype, device=device))
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
            ValueError: not an nn.Linear, or a subclass with a forward of its own (it would be
                lost; LoRA can wrap it); weights that cannot be quantised.
        """
        weight, bias = check_quantizable(linear)
        layer = cls.from_weight(weight, bias, block_size, double_quant, compute_dtype)
        return layer.train(linear.training)

    @classmethod
    @torch.inference_mode(False)  # its tensors could never be saved for a backward
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        block_size: int,
        double_quant: bool,
        compute_dtype: torch.dtype | None,
    ) -> "NF4Linear":
        """A layer that computes x W^T + bias with `weight`, (out_features, in_features), in NF4."""
        if weight.is_meta:
            raise ValueError("NF4Linear: the weight is on the meta device and has no values yet")
        state = _encoded(weight, block_size, double_quant)
        out_features, in_features = weight.shape
        layer = cls(
            in_features, out_features, bias=False, block_size=block_size,
            double_quant=double_quant, compute_dtype=compute_dtype, dtype=weight.dtype,
            device="meta",
        )  # fmt: skip
        for name, value in state.items():
            shape = layer._parameters[name].shape  # type: ignore[union-attr]
            layer._parameters[name] = _frozen(_as_bytes(value).view(shape))
        if bias is not None:
            layer.bias = _frozen(bias.detach())
        return layer

    @property
    def double_quant(self) -> bool:
        """Whether the block scales are stored as 8-bit codes."""
        return "absmax_code" in self._parameters

    def state(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """packed, absmax, scale, offset as the operators take them; the last two may be None."""
        stored = cast(dict[str, Tensor], self._parameters)
        if not self.double_quant:
            return stored["packed"], _as_float32(stored["absmax"]), None, None
        scale, offset = _as_float32(stored["absmax_scale"]), _as_float32(stored["absmax_offset"])
        return stored["packed"], stored["absmax_code"], scale, offset

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"NF4Linear: input of shape {tuple(x.shape)}; expected (*, {self.in_features})"
            )
        dtype, device = x.dtype, x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = dtype if dtype == torch.float64 else torch.get_autocast_dtype(device)
        compute_dtype = self.compute_dtype or dtype
        bias = None if self.bias is None else self.bias.to(compute_dtype)
        out: Tensor = torch.ops.minipeft.nf4_linear(
            x.to(compute_dtype), *self.state(), bias, self.out_features, self.block_size
        )
        return out.to(dtype)

    @property
    def absmax(self) -> Float32[Tensor, "*blocks"]:
        """The decoded scales, float32; (out_features, blocks) where rows hold whole blocks."""
        _, absmax, scale, offset = self.state()
        return decoded_absmax(absmax, scale, offset)

    def dequantize(
        self, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "out_features in_features"]:
        """The dense weight, in `dtype` or the dtype that the linear layer had."""
        shape = [self.out_features, self.in_features]
        out: Tensor = torch.ops.minipeft.dequantize_nf4(
            *self.state(), shape, self.block_size, dtype or self.weight_dtype
        )
        return out

    @property
    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """The dequantised weight, computed on read."""
        return self.dequantize()

    def __setattr__(self, name: str, value: Any) -> None:
        stored = self.__dict__.get("_parameters", {})
        if name == "absmax" and name in stored and isinstance(value, nn.Parameter):
            stored[name] = value  # load_state_dict(assign=True)
            return
        if name in ("weight", "absmax"):
            raise AttributeError(
                f"NF4Linear.{name} is computed from codes; make a new layer with "
                "NF4Linear.from_linear, or load a state dict"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        # .half(), .to(bfloat16): codes are bytes and stay; `weight` follows as a dense one would

        def keeping_bytes(t: Tensor) -> Tensor:  # .type(float16) would cast codes too
            out = fn(t)
            return t.to(out.device) if t.dtype == torch.uint8 != out.dtype else out

        super()._apply(keeping_bytes, recurse)  # type: ignore[no-untyped-call]
        device = cast(Tensor, self._parameters["packed"]).device
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=device)).dtype
        return self

    def logical_parameters(self) -> int:
        """in_features * out_features."""
        return self.in_features * self.out_features

    def packed_parameters(self) -> dict[str, nn.Parameter]:
        """Codes and scales: everything but the bias."""
        stored = self._parameters.items()
        return {name: value for name, value in stored if name != "bias" and value is not None}

    def requantized(self, weight: Tensor) -> "NF4Linear":
        """A layer with this one's settings and bias and the codes of `weight`."""
        layer = self.from_weight(
            weight.float(), self.bias, self.block_size, self.double_quant, self.compute_dtype
        )
        layer.weight_dtype = self.weight_dtype
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}"
        )


def has_own_forward(module: nn.Module) -> bool:
    """Whether a linear layer computes something else than nn.Linear's forward."""
    return type(module).forward is not nn.Linear.forward


def check_quantizable(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of an nn.Linear whose forward is nn.Linear's; raises on others."""
    if not isinstance(linear, nn.Module):
        raise TypeError(f"NF4Linear: expected a module, got {type(linear).__name__}")
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"NF4Linear: {type(linear).__name__} is no nn.Linear")
    if has_own_forward(linear):
        raise ValueError(
            f"NF4Linear: {type(linear).__name__} has a forward of its own, which NF4Linear would "
            "replace by x W^T + b; leave it dense (LoRA can wrap it), or name the class in "
            "quantize_model(also=...) if its forward is only that"
        )
    if not has_stored_weight(linear):
        raise ValueError(
            f"NF4Linear: {type(linear).__name__} computes its weight (weight norm, a "
            "parametrisation); take that off first"
        )
    return linear.weight, linear.bias
