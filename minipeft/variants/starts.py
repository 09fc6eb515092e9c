"""Where the factors start: functions for `init=` of the LoRA layers.

    init_gaussian     A ~ N(0, 1/rank^2), B = 0                       as in loralib's early versions
    init_orthogonal   rows of A and columns of B from one orthogonal matrix, so that B A = 0
    init_pissa        the principal part of the weight                (PiSSA, Meng et al. 2024)
    init_olora        its first rows of an orthogonal factorisation   (OLoRA, Bueyuekakyuez 2024)

The last two do not start at zero.  Their papers take the start off the base weight; here it is kept
and its product subtracted (`LowRank.subtract_start`), so the base stays as it was, bit for bit, and
what was learnt is a plain LoRA of twice the rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minipeft.lora import LoRALinear, LowRank

Init = Callable[[Any], None]


def init_gaussian(layer: LowRank) -> None:
    """A ~ N(0, 1/rank^2), B = 0: PEFT's "gaussian"."""
    with torch.no_grad():
        layer.lora_a.normal_(std=1 / layer.rank)
        layer.lora_b.zero_()


def init_orthogonal(layer: LowRank) -> None:
    """A and B from alternate rows of one orthogonal (rank, rank) matrix: B A = 0, neither is 0.

    Raises:
        ValueError: an odd rank, or another layer than LoRALinear.
    """
    layer = _linear("init_orthogonal", layer)
    if layer.rank % 2:
        raise ValueError(
            f"init_orthogonal: rank {layer.rank} is odd; it takes half for A, half for B"
        )
    half, dtype = layer.rank // 2, torch.float32
    with torch.no_grad():
        q = torch.linalg.qr(torch.randn(layer.rank, layer.rank, dtype=dtype)).Q.to(layer.lora_a)
        a = torch.randn(layer.in_features, half, dtype=dtype).to(layer.lora_a) @ q[0::2]
        b = torch.randn(half, layer.out_features, dtype=dtype).to(layer.lora_b).T @ q[1::2]
        layer.lora_a.copy_(a.T / 10)  # the size that PEFT gives them
        layer.lora_b.copy_(b / 10)


def init_pissa(layer: LowRank) -> None:
    """s B A = the best approximation of the weight by the rank, by its singular values.

    A = sqrt(S/s) V^T and B = U sqrt(S/s) of the largest ones.  Takes a singular value decomposition
    of the whole weight (of an NF4 base, the rounded one); `init_pissa_fast` a random one.

    Raises:
        ValueError: another layer than LoRALinear, or a base on the meta device.
    """
    weight = _weight("init_pissa", layer)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    r = layer.rank
    _start(layer, u[:, :r], s[:r], v[:r])


def init_pissa_fast(n_iter: int = 16) -> Init:
    """`init_pissa` by a random projection with `n_iter` power iterations: for large layers.

    Raises:
        ValueError: n_iter below 1.
    """
    if n_iter < 1:
        raise ValueError(f"init_pissa_fast: n_iter={n_iter}; expected at least 1")

    def init(layer: LowRank) -> None:
        weight = _weight("init_pissa_fast", layer)
        u, s, v = torch.svd_lowrank(weight, q=min(layer.rank, *weight.shape), niter=n_iter)
        _start(layer, u, s, v.T)

    return init


def init_olora(layer: LowRank) -> None:
    """B = the first columns of Q, A = the first rows of R, of W = Q R.

    Raises:
        ValueError: another layer than LoRALinear, or a base on the meta device.
    """
    q, r = torch.linalg.qr(_weight("init_olora", layer))
    _copy(layer, r[: layer.rank], q[:, : layer.rank])


def _linear(caller: str, layer: object) -> LoRALinear:
    if not isinstance(layer, LoRALinear):
        raise ValueError(
            f"{caller}: a {type(layer).__name__}; it starts linear layers only (LoRALinear, "
            "DoRALinear): leave the others out with exclude="
        )
    return layer


def _weight(caller: str, layer: object) -> Tensor:
    """The weight as the base computes with it, (out, in), in float32 or float64."""
    layer = _linear(caller, layer)
    if layer.lora_a.is_meta:
        raise ValueError(f"{caller}: the base is on the meta device; load its weights first")
    with torch.no_grad():
        weight = layer.exact_below("weight", torch.float32)
    return weight.T if layer.transposed else weight


def _start(layer: LowRank, u: Tensor, s: Tensor, v: Tensor) -> None:
    root = (s / layer.scaling).sqrt()
    _copy(layer, root[:, None] * v, u * root)


def _copy(layer: LowRank, a: Tensor, b: Tensor) -> None:
    """Let the layer start here; a rank above the weight's sizes leaves the rest at zero."""
    with torch.no_grad():
        layer.lora_a.zero_()[: len(a)] = a.to(layer.lora_a.dtype)
        layer.lora_b.zero_()[:, : b.shape[1]] = b.to(layer.lora_b.dtype)
    layer.subtract_start()
