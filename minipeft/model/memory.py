"""What a model holds: parameters that train, parameters in all, bytes of its tensors."""

from collections.abc import Mapping
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
    packed: set[int] = set()
    total = 0
    for module in model.modules():
        if is_packed(module):
            stored = {id(value) for value in module.packed_parameters().values()}
            total += 0 if stored & packed else module.logical_parameters()
            packed |= stored
    dense = [p for p in model.parameters() if id(p) not in packed]
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return ParameterCount(
        trainable=sum(p.numel() for p in dense if p.requires_grad),
        total=total + sum(p.numel() for p in dense),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )


def packed_bits(model: nn.Module) -> float:
    """Bits per packed weight, counted from the tensors that hold codes and scales.

    Raises:
        ValueError: the model has no packed layer.
    """
    layers = [module for module in model.modules() if is_packed(module)]
    weights = sum(layer.logical_parameters() for layer in layers)
    if not weights:
        raise ValueError("packed_bits: the model has no packed layer")
    size = sum(p.numel() * p.element_size() for m in layers for p in m.packed_parameters().values())
    return 8 * size / weights


def quantization_report(model: nn.Module, left_out: Mapping[str, str] | None = None) -> str:
    """What is stored in 4 bits, what is dense, and the bits per parameter, counted from tensors.

    `left_out` is what `quantize_model(...).left_out` says; with it the report gives the reasons.

    >>> from minipeft import quantize_model
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).bfloat16()
    >>> print(quantization_report(model, quantize_model(model, skip=["1"]).left_out))
    4-bit: 1 layer, 4,096 weights in 2,120 bytes, 4.141 bits each
    dense: 194 parameters in 388 bytes, 16.000 bits each
    together: 4,290 parameters, 4.677 bits each
    left dense: 1 (skipped)
    """
    layers = [module for module in model.modules() if is_packed(module)]
    stored = {id(p): p for layer in layers for p in layer.packed_parameters().values()}
    weights = {
        id(layer.packed_parameters()["packed"]): layer.logical_parameters() for layer in layers
    }
    others = [p for p in model.parameters() if id(p) not in stored]

    def line(what: str, count: int, noun: str, size: int) -> str:
        bits = f", {8 * size / count:.3f} bits each" if count else ""
        return f"{what} {count:,} {noun} in {size:,} bytes{bits}"

    packed_size = sum(p.numel() * p.element_size() for p in stored.values())
    dense_size = sum(p.numel() * p.element_size() for p in others)
    n_packed, n_dense = sum(weights.values()), sum(p.numel() for p in others)
    total = n_packed + n_dense
    lines = [
        line(f"4-bit: {len(layers)} layer{'s' * (len(layers) != 1)},", n_packed, "weights",
             packed_size),
        line("dense:", n_dense, "parameters", dense_size),
        f"together: {total:,} parameters, {8 * (packed_size + dense_size) / max(1, total):.3f} "
        "bits each",
    ]  # fmt: skip
    by_reason: dict[str, list[str]] = {}
    for name, reason in (left_out or {}).items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"left dense: {shown} ({reason})")
    return "\n".join(lines)
