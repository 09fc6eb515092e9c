"""QLoRA: a frozen 4-bit base under LoRA (Dettmers et al. 2023).

There is no QLoRA class: it is LoRALinear(NF4Linear.from_linear(linear), rank=8), equation 5 of
the paper:  y = x doubleDequant(c1, c2, W)^T + s x A^T B^T.

A 4-bit layer keeps bytes only, as frozen uint8 parameters, so that no cast, optimiser or precision
policy can touch them; float32 scales are kept as their bytes and viewed as float32 at use.  For a
weight of shape (*rows, n) whose last axis holds whole blocks:

    packed          (*rows, n/2)           two codes in a byte
    absmax_code     (*rows, n/block_size)  8-bit codes of the block scales
    absmax_scale    (4 * groups,)          float32 bytes, one for 256 absmax_code
    absmax_offset   (4,)                   float32 bytes

Without double quantisation `absmax_bytes` (*rows, 4 * n/block_size) replaces the last three.  Where
blocks run over the ends of rows, codes and scales are flat.  `codebook_bytes` (64,) is there only
if a file came with sixteen float32 values that are not NF4's.  Parameters do not have the names of
what is decoded from them (`absmax`, `codebook`), since offloading reads parameters by name.

The caller chooses which layers become 4-bit.  minipeft.quantize_model leaves the output head dense:
no layer comes after it to make up for errors in the scores of tokens, and its weight is often the
embedding's too.  Read next: prefix.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypedDict, Unpack, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from minipeft import nf4, ops
from minipeft.adapters import products
from minipeft.adapters.protocol import why_not
from minipeft.double_quant import ABSMAX_BLOCK_SIZE, decoded_absmax, quantize_absmax
from minipeft.ops import Packed


def decode(weight: Packed, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The dense weight, of this shape, in this dtype."""
    return ops.call("dequantize_nf4", weight, list(shape), dtype)


def multiply(x: Tensor, weight: Packed, bias: Tensor | None, out_features: int) -> Tensor:
    """x W^T + bias, with derivatives by x and bias in every mode of PyTorch."""
    return ops.call("nf4_linear", x, weight, bias, out_features)


def _gradient_of_x(grad: Tensor, given: Any) -> Tensor:
    """dL/dx = dL/dy W.  W is decoded again: kept since forward, it would undo the saving."""
    return ops.call("nf4_linear_input_gradient", grad, given.weight, given.x.shape[-1])


@ops.operator(
    "nf4_linear",
    "(Tensor x, Packed weight, Tensor? bias, SymInt out_features) -> Tensor",
    shapes=lambda given: given.x.new_empty((*given.x.shape[:-1], given.out_features)),
    gradients={
        "x": _gradient_of_x,
        "bias": lambda grad, given: grad.reshape(-1, grad.shape[-1]).sum(0),
    },
    row_arguments=1,
)
def linear(x: Tensor, weight: Packed, bias: Tensor | None, out_features: int) -> Tensor:
    """Decode the weight, then multiply."""
    return F.linear(x, decode(weight, [out_features, x.shape[-1]], x.dtype), bias)


def _gradient_of_dy(grad: Tensor, given: Any) -> Tensor:
    """For second derivatives: dy W is linear in dy, and its gradient is a product with W^T."""
    return ops.call("nf4_linear", grad, given.weight, None, given.dy.shape[-1])


@ops.operator(
    "nf4_linear_input_gradient",
    "(Tensor dy, Packed weight, SymInt in_features) -> Tensor",
    shapes=lambda given: given.dy.new_empty((*given.dy.shape[:-1], given.in_features)),
    gradients={"dy": _gradient_of_dy},
    row_arguments=1,
)
def input_gradient(dy: Tensor, weight: Packed, in_features: int) -> Tensor:
    """dy W: decode the weight, then multiply by it, not transposed."""
    return dy @ decode(weight, [dy.shape[-1], in_features], dy.dtype)


def as_bytes(scales: Tensor) -> Tensor:
    """The bytes of a tensor, as uint8."""
    return scales.contiguous().view(torch.uint8)


def as_float32(stored: Tensor) -> Tensor:
    """float32 values from their bytes, without a copy where the memory is aligned."""
    # a view needs alignment, which a slice of a larger buffer may lack (no compiled layer has such)
    if not torch.compiler.is_compiling() and stored.storage_offset() % 4:
        stored = stored.clone()
    return stored.view(torch.float32)


def frozen(data: Tensor) -> nn.Parameter:
    """A parameter that no optimiser trains."""
    return nn.Parameter(data, requires_grad=False)


def encoded(weight: Tensor, block_size: int, double_quant: bool) -> dict[str, Tensor]:
    """NF4 codes and scales of a weight, by the names that layers keep them under; on its device.

    Raises:
        ValueError: the weight has values that are not finite.
    """
    packed, absmax = nf4.quantize_nf4(weight.detach(), block_size=block_size)
    if not double_quant:
        return {"packed": packed, "absmax": absmax}
    names = ("absmax_code", "absmax_scale", "absmax_offset")
    return {"packed": packed, **dict(zip(names, quantize_absmax(absmax), strict=True))}


class Quantized(TypedDict, total=False):
    """Keywords that say how a weight is quantised; by default 64 and True."""

    block_size: int
    double_quant: bool


class Stored(Quantized, total=False):
    """Keywords of the constructors, which leave codes empty, to be filled by a state dict.

    `codebook` has the values of the codes where they are not NF4's; `dtype` is the dense weight's.
    """

    codebook: Sequence[float] | None
    dtype: torch.dtype | None
    device: torch.device | str | None


class PackedModule(nn.Module):
    """What 4-bit layers share: the bytes of one weight of `shape`, and reading them.

    Casting the module changes `weight_dtype`, the dtype of the dense weight, and no code.
    """

    from_weight: ClassVar[Callable[..., Any]]  # of each kind of layer

    def __init__(
        self,
        shape: Sequence[int],
        *,
        block_size: int = 64,
        double_quant: bool = True,
        codebook: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        nf4.check_block_size(type(self).__name__, block_size)
        self.shape, self.block_size = tuple(int(size) for size in shape), block_size
        self.weight_dtype = dtype or torch.get_default_dtype()
        *rows, row = self.shape
        n, aligned = math.prod(self.shape), row % block_size == 0
        n_blocks = math.ceil(n / block_size)
        blocks = (*rows, row // block_size) if aligned else (n_blocks,)
        sizes = {"packed": (*rows, row // 2) if aligned else (math.ceil(n / 2),)}
        if double_quant:
            groups = math.ceil(n_blocks / ABSMAX_BLOCK_SIZE)
            sizes |= {"absmax_code": blocks, "absmax_scale": (4 * groups,), "absmax_offset": (4,)}
        else:
            sizes["absmax_bytes"] = (*blocks[:-1], 4 * blocks[-1])
        for name, size in sizes.items():
            self.register_parameter(
                name, frozen(torch.empty(size, dtype=torch.uint8, device=device))
            )
        if codebook is not None:
            values = torch.tensor(codebook, dtype=torch.float32, device=device)
            self.register_parameter("codebook_bytes", frozen(as_bytes(values)))

    def fill(self, state: dict[str, Tensor]) -> None:
        """Take codes and scales (float32 or bytes, any shape of the right size) without a copy.

        `state` has them by the names of the parameters, `absmax` for `absmax_bytes`, and may have
        the values of the codes as `codebook`.

        Raises:
            ValueError: a tensor is missing, or has another size.
        """
        state = {"absmax_bytes" if n == "absmax" else n: value for n, value in state.items()}
        own = {n: p.shape for n, p in self.packed_parameters().items() if n != "codebook_bytes"}
        if missing := [name for name in own if name not in state]:
            raise ValueError(f"{type(self).__name__}.fill: {missing} missing")
        stored = {name: as_bytes(state[name]) for name in own}
        for name, shape in own.items():
            if (found := stored[name].numel()) != shape.numel():
                raise ValueError(
                    f"{type(self).__name__}.fill: {name} takes {shape.numel()} bytes, got {found}"
                )
            stored[name] = stored[name].view(shape)
        if "codebook" in state:
            values = state["codebook"].float()
            if tuple(values.tolist()) != nf4.NF4_CODEBOOK:
                stored["codebook_bytes"] = as_bytes(values)
        for name, value in stored.items():
            self._parameters[name] = frozen(value)

    @property
    def double_quant(self) -> bool:
        """Whether the block scales are stored as 8-bit codes."""
        return "absmax_code" in self._parameters

    def state(self) -> Packed:
        """The weight as the operators take it.

        Raises:
            RuntimeError: within torch.jit.trace, which cannot record bytes viewed as float32.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(
                f"{type(self).__name__}: torch.jit.trace cannot hold 4-bit layers; use "
                "torch.export or torch.compile, or minipeft.dequantize_model first"
            )
        stored: dict[str, Any] = self._parameters
        packed, codes = stored["packed"], stored.get("absmax_code")
        if codes is None:
            absmax = as_float32(stored["absmax_bytes"])
            return Packed(packed, absmax, self.block_size, codebook=self.codebook)
        scale, offset = as_float32(stored["absmax_scale"]), as_float32(stored["absmax_offset"])
        return Packed(packed, codes, self.block_size, scale, offset, self.codebook)

    @property
    def codebook(self) -> Float32[Tensor, " 16"] | None:
        """The sixteen values of the codes where they are not NF4's."""
        stored = self._parameters.get("codebook_bytes")
        return None if stored is None else as_float32(stored)

    @property
    def absmax(self) -> Float32[Tensor, "*blocks"]:
        """The decoded scales, float32; (*rows, blocks) where rows hold whole blocks."""
        return decoded_absmax(self.state())

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "*shape"]:
        """The dense weight, in `dtype` or the dtype that the dense layer had."""
        return decode(self.state(), self.shape, dtype or self.weight_dtype)

    @property
    def weight(self) -> Float[Tensor, "*shape"]:
        """The dequantised weight, computed on read."""
        return self.dequantize()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "absmax", "codebook"):
            raise AttributeError(
                f"{type(self).__name__}.{name} is computed from codes; make a new layer from the "
                "dense one, or load a state dict"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        # .half(), .to(bfloat16): codes are bytes and stay; `weight` follows as a dense one would
        def keeping_bytes(t: Tensor) -> Tensor:  # .type(float16) would cast codes too
            out = fn(t)
            return t.to(out.device) if t.dtype == torch.uint8 != out.dtype else out

        super()._apply(keeping_bytes, recurse)  # type: ignore[no-untyped-call]
        device = cast(Tensor, self._parameters["packed"]).device
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=device)).dtype
        return self

    def _settings(self) -> dict[str, Any]:
        """The keywords with which `from_weight` makes a layer like this one."""
        return {"block_size": self.block_size, "double_quant": self.double_quant}

    def requantized(self, weight: Tensor) -> "PackedModule":
        """A layer like this one with the codes of another weight, in NF4."""
        layer: PackedModule = self.from_weight(weight.float(), **self._settings())
        layer.weight_dtype = self.weight_dtype
        return layer.train(self.training)

    def logical_parameters(self) -> int:
        """The number of weights that the codes stand for."""
        return math.prod(self.shape)

    def packed_parameters(self) -> dict[str, nn.Parameter]:
        """Codes and scales: everything but a bias."""
        stored = self._parameters.items()
        return {name: value for name, value in stored if name != "bias" and value is not None}

    def settings_repr(self) -> str:
        """block_size and the like, for `extra_repr`."""
        own = ", a codebook of its own" if "codebook_bytes" in self._parameters else ""
        return f"block_size={self.block_size}, double_quant={self.double_quant}{own}"

    def extra_repr(self) -> str:
        return ", ".join([*map(str, self.shape), self.settings_repr()])


class NF4Linear(PackedModule):
    """A linear layer with a frozen NF4 weight, double-quantised unless told otherwise.

    Made by `from_linear` (keywords `block_size=64`, `double_quant=True`).  The output has the
    input's dtype, or autocast's under autocast; `compute_dtype` is another one for the product
    inside.  `weight` is the dequantised weight in the dtype that the linear layer had, computed on
    read; casting the module changes that dtype and no code.

    Source of the format: QLoRA (Dettmers et al. 2023), section 3; the bytes are bitsandbytes'.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        compute_dtype: torch.dtype | None = None,
        **stored: Unpack[Stored],
    ) -> None:
        super().__init__((out_features, in_features), **stored)
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise ValueError(f"NF4Linear: compute_dtype={compute_dtype}; expected a float dtype")
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        empty = torch.empty(out_features, dtype=self.weight_dtype, device=stored.get("device"))
        self.register_parameter("bias", frozen(empty) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        compute_dtype: torch.dtype | None = None,
        **settings: Unpack[Quantized],
    ) -> "NF4Linear":
        """The same layer with its weight rounded to NF4; the bias is shared, and frozen.

        Raises:
            TypeError: not a module.
            ValueError: not an nn.Linear, a subclass that computes something else than x W^T + b,
                which would be lost (LoRA can wrap it), or weights that cannot be quantised.
        """
        if not isinstance(linear, nn.Module):
            raise TypeError(f"NF4Linear: expected a module, got {type(linear).__name__}")
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"NF4Linear: {type(linear).__name__} is no nn.Linear")
        if reason := why_not("replace", linear):  # tried by adapters/linearity.py
            raise ValueError(
                f"NF4Linear: {reason}; leave it dense (LoRA can wrap it), or name the class in "
                "quantize_model(also=...) if you know better"
            )
        layer = cls.from_weight(linear.weight, linear.bias, compute_dtype=compute_dtype, **settings)
        return layer.train(linear.training)

    @classmethod
    @torch.inference_mode(False)  # inference tensors cannot be saved for backward
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        **settings: Unpack[Quantized],
    ) -> "NF4Linear":
        """A layer that computes x W^T + bias with `weight`, (out_features, in_features), in NF4."""
        out_features, in_features = weight.shape
        layer = cls(
            in_features, out_features, bias=False, compute_dtype=compute_dtype,
            dtype=weight.dtype, device="meta", **settings,
        )  # fmt: skip
        if bias is not None:
            layer.bias = frozen(bias.detach())
        layer.fill(encoded(weight, layer.block_size, layer.double_quant))
        return layer

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"bias": self.bias, "compute_dtype": self.compute_dtype}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"NF4Linear: input of shape {tuple(x.shape)}; expected (*, {self.in_features})"
            )
        dtype = products.product_dtype(x)
        compute_dtype = self.compute_dtype or dtype
        bias = None if self.bias is None else products.cast(self.bias, compute_dtype)
        x = products.cast(x, compute_dtype)
        return products.cast(multiply(x, self.state(), bias, self.out_features), dtype)

    def dense(self, weight: Tensor | None = None) -> nn.Module:
        """A plain nn.Linear with this layer's weight, or with another one; frozen."""
        weight = self.dequantize() if weight is None else weight
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = frozen(weight)
        if self.bias is not None:
            linear.bias = frozen(self.bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.settings_repr()}"
