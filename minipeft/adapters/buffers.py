"""Modules with running statistics, and the mode that they were told to take.

model/buffers.py holds normalisations of a frozen base in eval mode; here is what layers ask.
"""

from torch import nn

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
MODE = "_minipeft_mode"  # in a held module's __dict__: the mode that it was last told to take


def keeps_statistics(module: nn.Module) -> bool:
    """Whether the module itself has running statistics, as torch's normalisations name them."""
    return any(module._buffers.get(name) is not None for name in STATISTICS)


def mode_of(module: nn.Module) -> bool:
    """Whether the module was last told to train, also if it is held in eval mode."""
    return bool(vars(module).get(MODE, module.training))
