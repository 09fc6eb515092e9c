"""Which modules keep running statistics; model/buffers.py holds them still in a frozen base."""

from torch import nn

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def keeps_statistics(module: nn.Module) -> bool:
    """Whether the module itself has running statistics, as torch's normalisations name them."""
    return any(module._buffers.get(name) is not None for name in STATISTICS)
