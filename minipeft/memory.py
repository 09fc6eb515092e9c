"""What a model holds: parameters that train, parameters in all, bytes of its tensors."""

from typing import NamedTuple

from torch import Tensor, nn

from minipeft.protocol import is_packed


class ParameterCount(NamedTuple):
    """trainable and total parameters (a packed weight counts as what it stands for), and bytes."""

    trainable: int
    total: int
    bytes: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable parameters, all parameters, and the bytes that parameters and buffers take.

    An NF4 layer counts with the in_features * out_features weights its codes stand for, and with
    the bytes its codes and scales really take.  Shared tensors count once.

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
