"""Weights that are stored as NF4 codes: the state that every 4-bit layer keeps.

Bytes only, as frozen uint8 parameters, so that no cast, optimiser or precision policy can touch
them; float32 scales are kept as their bytes and viewed as float32 at use.  For a weight of shape
(*rows, n) whose last axis holds whole blocks:

    packed          (*rows, n/2)           two codes in a byte
    absmax_code     (*rows, n/block_size)  8-bit codes of the block scales
    absmax_scale    (4 * groups,)          float32 bytes, one scale for 256 codes
    absmax_offset   (4,)                   float32 bytes

or `absmax_bytes` (*rows, 4 * n/block_size) instead of the last three without double quantisation;
flat where blocks run over the ends of rows.  `codebook_bytes` (64,) is there only if the values are
not NF4's: sixteen float32 of a file that somebody else wrote.  No parameter is called as what is
decoded from it (`absmax`, `codebook`): offloading reads parameters by name.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from minipeft import nf4
from minipeft.double_quant import ABSMAX_BLOCK_SIZE, decoded_absmax, quantize_absmax


def as_bytes(scales: Tensor) -> Tensor:
    """The bytes of a tensor, as uint8."""
    return scales.contiguous().view(torch.uint8)


def as_float32(stored: Tensor) -> Tensor:
    """float32 values from their bytes, without a copy where the memory is aligned."""
    # a slice of somebody's buffer: viewing needs alignment (a compiled layer owns its parameters)
    if not torch.compiler.is_compiling() and stored.storage_offset() % 4:
        stored = stored.clone()
    return stored.view(torch.float32)


def frozen(data: Tensor) -> nn.Parameter:
    """A parameter that no optimiser trains."""
    return nn.Parameter(data, requires_grad=False)


def encoded(weight: Tensor, block_size: int, double_quant: bool) -> dict[str, Tensor]:
    """NF4 codes and scales of a weight, by the names that layers keep them under.

    Raises:
        ValueError: the weight has no values, or some that cannot be quantised.
    """
    if weight.is_meta:
        raise ValueError("NF4: the weight is on the meta device and has no values yet")
    packed, absmax = nf4.quantize_nf4(weight.detach(), block_size=block_size)
    if not double_quant:
        return {"packed": packed, "absmax": absmax}
    code, scale, offset = quantize_absmax(absmax)
    return {
        "packed": packed, "absmax_code": code, "absmax_scale": scale, "absmax_offset": offset
    }  # fmt: skip


class PackedModule(nn.Module):
    """What 4-bit layers share: the bytes of one weight of `shape`, and reading them.

    `weight` is the dequantised weight in `weight_dtype`, the dtype that the dense layer had,
    computed on read; casting the module changes that dtype and no code.
    """

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
            sizes["absmax_code"] = blocks
            sizes["absmax_scale"] = (4 * math.ceil(n_blocks / ABSMAX_BLOCK_SIZE),)
            sizes["absmax_offset"] = (4,)
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
        """Take codes and scales (float32 or bytes, any shape of the right size); no copies.

        By the names of the parameters; `absmax` is `absmax_bytes`.  `codebook`: values that are not
        NF4's.

        Raises:
            ValueError: a tensor is missing, or has another size.
        """
        state = {
            "absmax_bytes" if name == "absmax" else name: value for name, value in state.items()
        }
        names = [name for name in self.packed_parameters() if name != "codebook_bytes"]
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"{type(self).__name__}.fill: {missing} missing")
        stored = {name: as_bytes(state[name]) for name in names}
        for name, value in stored.items():
            expected = self._parameters[name].shape  # type: ignore[union-attr]
            if value.numel() != expected.numel():
                raise ValueError(
                    f"{type(self).__name__}.fill: {name} takes {expected.numel()} bytes, got "
                    f"{value.numel()}"
                )
            stored[name] = value.view(expected)
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

    def state(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """packed, absmax, scale, offset as the operators take them; the last two may be None.

        Raises:
            RuntimeError: within torch.jit.trace, which has no word for bytes viewed as float32.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(
                f"{type(self).__name__}: torch.jit.trace cannot hold 4-bit layers; use "
                "torch.export or torch.compile, or minipeft.dequantize_model before"
            )
        stored = cast(dict[str, Tensor], self._parameters)
        if not self.double_quant:
            return stored["packed"], as_float32(stored["absmax_bytes"]), None, None
        scale, offset = as_float32(stored["absmax_scale"]), as_float32(stored["absmax_offset"])
        return stored["packed"], stored["absmax_code"], scale, offset

    @property
    def codebook(self) -> Float32[Tensor, " 16"] | None:
        """The sixteen values of the codes where they are not NF4's."""
        stored = self._parameters.get("codebook_bytes")
        return None if stored is None else as_float32(stored)

    @property
    def absmax(self) -> Float32[Tensor, "*blocks"]:
        """The decoded scales, float32; (*rows, blocks) where rows hold whole blocks."""
        _, absmax, scale, offset = self.state()
        return decoded_absmax(absmax, scale, offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "*shape"]:
        """The dense weight, in `dtype` or the dtype that the dense layer had."""
        out: Tensor = torch.ops.minipeft.dequantize_nf4(
            *self.state(), list(self.shape), self.block_size, dtype or self.weight_dtype,
            self.codebook,
        )  # fmt: skip
        return out

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
