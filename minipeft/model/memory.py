"""What a model holds: parameters that train, parameters in all, bytes of its tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from minipeft.adapters.protocol import is_packed


class ParameterCount(NamedTuple):
    """trainable and total parameters (a packed weight counts as what it stands for), and bytes."""

    trainable: int
    total: int
    bytes: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable parameters, all parameters, and the bytes that parameters and buffers take.

    An NF4 layer counts with the in_features * out_features weights its codes stand for, and with
    the bytes its codes and scales really take.  Shared tensors count once.  (transformers'
    `model.num_parameters()` knows bitsandbytes' classes alone: of 4-bit layers it counts bytes.)

    >>> count_parameters(nn.Linear(3, 2))
    ParameterCount(trainable=8, total=8, bytes=32)
    """
    report = memory_report(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return ParameterCount(trainable, report.packed.weights + report.dense.weights, _size(tensors))


class Stored(NamedTuple):
    """How many weights, in how many bytes."""

    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits for each weight; NaN where there are none."""
        return 8 * self.bytes / self.weights if self.weights else float("nan")

    def line(self, noun: str) -> str:
        """The same in words."""
        bits = f", {self.bits:.3f} bits each" if self.weights else ""
        return f"{self.weights:,} {noun} in {self.bytes:,} bytes{bits}"


@dataclass(frozen=True)
class MemoryReport:
    """The parameters of a model, 4-bit and dense; `print` shows it.  Buffers are not in it."""

    layers: int  # that are 4-bit
    packed: Stored  # the weights that their codes stand for, and the bytes of codes and scales
    dense: Stored  # all other parameters
    left_out: Mapping[str, str] = field(default_factory=dict)  # names, and why they stayed dense

    @property
    def together(self) -> Stored:
        """Both."""
        return Stored(
            self.packed.weights + self.dense.weights, self.packed.bytes + self.dense.bytes
        )

    def __str__(self) -> str:
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        lines = [
            f"4-bit: {layers}, {self.packed.line('weights')}",
            f"dense: {self.dense.line('parameters')}",
            f"together: {self.together.line('parameters')}",
        ]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left dense: {', '.join(names[:3])}{more} ({reason})")
        return "\n".join(lines)


def memory_report(model: nn.Module, left_out: Mapping[str, str] | None = None) -> MemoryReport:
    """What is stored in 4 bits and what is dense, and in how many bytes, counted from tensors.

    `left_out` is what `quantize_model(...).left_out` says; with it the report gives the reasons.
    Shared tensors count once.

    >>> from minipeft import quantize_model
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).bfloat16()
    >>> print(memory_report(model, quantize_model(model, skip=["1"]).left_out))
    4-bit: 1 layer, 4,096 weights in 2,120 bytes, 4.141 bits each
    dense: 194 parameters in 388 bytes, 16.000 bits each
    together: 4,290 parameters in 2,508 bytes, 4.677 bits each
    left dense: 1 (skipped)
    """
    layers = [module for module in model.modules() if is_packed(module)]
    stored = {id(p): p for layer in layers for p in layer.packed_parameters().values()}
    weights = {
        id(layer.packed_parameters()["packed"]): layer.logical_parameters() for layer in layers
    }
    others = [p for p in model.parameters() if id(p) not in stored]
    return MemoryReport(
        layers=len(layers),
        packed=Stored(sum(weights.values()), _size(stored.values())),
        dense=Stored(sum(p.numel() for p in others), _size(others)),
        left_out=left_out or {},
    )


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
