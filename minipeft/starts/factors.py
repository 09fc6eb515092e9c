"""Where the factors start: makers of functions for `init=` of the LoRA layers.

    gaussian()      A ~ N(0, 1/rank^2), B = 0                       as in loralib's early versions
    orthogonal()    rows of A and columns of B from one orthogonal matrix, so that B A = 0
    pissa()         the principal part of the weight                (PiSSA, Meng et al. 2024)
    olora()         the first columns of Q and rows of R, W = Q R   (OLoRA, Bueyuekakyuez 2024)

The last two do not start at zero.  Their papers take the start off the base weight; here it is kept
and its product subtracted (`LowRank.subtract_start`), so the base stays as it was, bit for bit, and
what was learnt is a plain LoRA of twice the rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minipeft.adapters.protocol import whole
from minipeft.adapters.sharded import is_shard, refuse_shards
from minipeft.lora import LoRALinear, LowRank

Init = Callable[[Any], None]
WHOLE = (
    "start where they are whole: inject with init= in every process, then shard or cut the model"
)


def gaussian() -> Init:
    """A ~ N(0, 1/rank^2), B = 0: PEFT's "gaussian"."""

    def init(layer: LowRank) -> None:
        with torch.no_grad():
            layer.lora_a.normal_(std=1 / layer.rank)
            layer.lora_b.zero_()

    return init


def orthogonal() -> Init:
    """A and B from alternate rows of one orthogonal (rank, rank) matrix: B A = 0, neither is 0.

    The function raises ValueError on an odd rank, on another layer than LoRALinear, and on shards.
    """

    def init(layer: LowRank) -> None:
        layer = _linear("orthogonal", layer)
        half, dtype = layer.rank // 2, torch.float32
        if layer.rank % 2:
            raise ValueError(f"orthogonal: rank {layer.rank} is odd; half is for A, half for B")
        if is_shard(layer.lora_a):
            refuse_shards("orthogonal", layer, WHOLE)
        with torch.no_grad():
            q = torch.linalg.qr(torch.randn(layer.rank, layer.rank, dtype=dtype)).Q.to(layer.lora_a)
            a = torch.randn(layer.in_features, half, dtype=dtype).to(layer.lora_a) @ q[0::2]
            b = torch.randn(half, layer.out_features, dtype=dtype).to(layer.lora_b).T @ q[1::2]
            layer.lora_a.copy_(a.T / 10)  # the size that PEFT gives them
            layer.lora_b.copy_(b / 10)

    return init


def pissa(iterations: int | None = None) -> Init:
    """s B A = the best approximation of the weight by the rank, by its singular values.

    A = sqrt(S/s) V^T and B = U sqrt(S/s) of the largest ones.  Takes a singular value decomposition
    of the whole weight (of an NF4 base, the rounded one).  With `iterations` it is a random
    projection with so many power iterations, for large layers; PEFT's "pissa_niter_16" has 16.
    The function raises ValueError on another layer than LoRALinear, on the meta device, and on a
    base of which each process has a part (shards of fully_shard, or cut by `parallelize`).

    Raises:
        ValueError: iterations below 1.
    """
    if iterations is not None:
        whole("pissa", "iterations", iterations)

    def init(layer: LowRank) -> None:
        weight = _weight("pissa", layer)
        if iterations is None:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
        else:
            rank = min(layer.rank, *weight.shape)
            u, s, v = torch.svd_lowrank(weight, q=rank, niter=iterations)
            v = v.T
        r = layer.rank
        root = (s[:r] / layer.scaling).sqrt()
        _copy(layer, root[:, None] * v[:r], u[:, :r] * root)

    return init


def olora() -> Init:
    """B = the first columns of Q, A = the first rows of R, of W = Q R.

    The function raises ValueError where that of `pissa` does.
    """

    def init(layer: LowRank) -> None:
        q, r = torch.linalg.qr(_weight("olora", layer))
        _copy(layer, r[: layer.rank], q[:, : layer.rank])

    return init


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
    refuse_shards(caller, layer, WHOLE)
    with torch.no_grad():
        weight = layer.exact_below("weight", torch.float32)
    return weight.T if layer.transposed else weight


def _copy(layer: LowRank, a: Tensor, b: Tensor) -> None:
    """Let the layer start here; a rank above the weight's sizes leaves the rest at zero."""
    with torch.no_grad():
        layer.lora_a.zero_()[: len(a)] = a.to(layer.lora_a.dtype)
        layer.lora_b.zero_()[:, : b.shape[1]] = b.to(layer.lora_b.dtype)
    layer.subtract_start()
