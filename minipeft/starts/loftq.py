"""LoftQ: factors that start as what rounding to 4 bits lost  (Li et al. 2023).

    repeat:  Q = NF4(W - s B A)
             s B A = the best approximation of W - Q by the rank

so that Q + s B A is nearer to W than NF4(W).  It needs W from before quantisation, which
`inject_qlora(model, target, rank, init=loftq())` hands over.  The base's codes are replaced; the
old ones are kept on the CPU, and `minipeft.remove` puts them back.
"""

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import is_conv1d
from minipeft.adapters.sharded import is_shard, refuse_shards
from minipeft.lora import LoRALinear
from minipeft.qlora import NF4Linear, encoded
from minipeft.starts.factors import WHOLE


class LoftQ:
    """An initialisation of LoRALinear over a new NF4Linear; see `loftq`."""

    def __init__(self, iterations: int) -> None:
        if iterations < 1:
            raise ValueError(f"loftq: iterations={iterations}; expected at least 1")
        self.iterations = iterations

    def __call__(self, layer: LoRALinear) -> None:
        raise ValueError(
            "loftq: needs the weight from before quantisation; use inject_qlora(..., init=loftq()) "
            "on the dense model, or loftq().for_weight(weight)(layer)"
        )

    def for_weight(self, source: nn.Module | Tensor) -> "LoftQOfWeight":
        """The initialisation of a layer whose base was made of this dense layer or weight."""
        weight: Tensor = source if isinstance(source, Tensor) else source.weight  # type: ignore[assignment]
        if isinstance(source, nn.Module) and is_conv1d(source):
            weight = weight.T
        return LoftQOfWeight(weight, self.iterations)


class LoftQOfWeight:
    """LoftQ with the dense weight (out_features, in_features) at hand."""

    def __init__(self, weight: Tensor, iterations: int) -> None:
        self.weight, self.iterations = weight, iterations

    def __call__(self, layer: LoRALinear) -> None:
        """Set the factors and the base's codes.

        Raises:
            ValueError: another layer than LoRALinear over NF4Linear, values that are not NF4's,
                another weight's shape, or a weight or layer of which each process has a part.
        """
        if self.weight.is_meta:
            raise ValueError("loftq: the weight is on the meta device; load it first")
        base = layer.base if isinstance(layer, LoRALinear) else None
        if not isinstance(base, NF4Linear):
            raise ValueError(
                f"loftq: a {type(layer).__name__} over {type(base).__name__}; expected LoRALinear "
                "over NF4Linear"
            )
        refuse_shards("loftq", layer, WHOLE)
        if is_shard(self.weight):
            raise ValueError(
                "loftq: the weight is a shard (DTensor), of which each process has a part; give "
                "weight.full_tensor(), or the weight from before the model was sharded"
            )
        if base.codebook is not None:
            raise ValueError(
                "loftq: the base has a codebook of its own, with which the new NF4 codes would be "
                "read; expected a base of NF4Linear.from_linear"
            )
        if tuple(self.weight.shape) != (base.out_features, base.in_features):
            raise ValueError(
                f"loftq: a weight {tuple(self.weight.shape)} for a base of "
                f"{(base.out_features, base.in_features)}"
            )
        with torch.no_grad():
            state, a, b = self._best(layer, base)
            layer.__dict__["codes_before"] = {
                name: value.detach().to("cpu", copy=True)
                for name, value in base.packed_parameters().items()
            }
            base.fill(state)
            layer.lora_a.copy_(a)
            layer.lora_b.copy_(b)

    def _best(self, layer: LoRALinear, base: NF4Linear) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Codes and factors of the iteration that came nearest to the weight."""
        weight = self.weight.detach().to(layer.lora_a.device, torch.float32)
        delta, best = torch.zeros_like(weight), None
        for _ in range(self.iterations):
            state = encoded(weight - delta, base.block_size, base.double_quant)
            probe = NF4Linear(
                base.in_features, base.out_features, bias=False, block_size=base.block_size,
                double_quant=base.double_quant, device="meta", dtype=torch.float32,
            )  # fmt: skip
            probe.fill(state)
            rest = weight - probe.dequantize(torch.float32)
            u, s, v = torch.linalg.svd(rest, full_matrices=False)
            r = layer.rank
            root = (s[:r] / layer.scaling).sqrt()
            a, b = root[:, None] * v[:r], u[:, :r] * root
            delta = layer.scaling * b @ a
            error = float((rest - delta).norm())
            if best is None or error < best[0]:
                best = (error, state, a, b)
        assert best is not None
        return best[1], _padded(best[2], layer.rank, 0), _padded(best[3], layer.rank, 1)


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    """Zeros for what a rank above the weight's sizes has too much."""
    missing = rank - factor.shape[axis]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[axis] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=axis)


def loftq(iterations: int = 5) -> LoftQ:
    """LoftQ for `init=` of `inject_qlora`, with so many alternations (the paper uses 5).

    Keeps a copy of the codes that plain rounding gave, half a byte a weight, on the CPU.

    Raises:
        ValueError: iterations below 1.
    """
    return LoftQ(iterations)
