"""What the launches of all kernels share: the device, the arguments of a 4-bit weight."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from minipeft.ops import Packed
from minipeft_kernels.triton.codes import float_tables

INTERPRETED = bool(triton.knobs.runtime.interpret)  # Triton too settles it when it is imported


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels go to the tensor's device.

    Raises:
        RuntimeError: kernels do not run there.
    """
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if INTERPRETED:
        return nullcontext()
    raise RuntimeError(
        f"minipeft_kernels.triton: the weight is on {tensor.device.type}; these kernels run on "
        "CUDA and ROCm devices, or anywhere in a process started with TRITON_INTERPRET=1"
    )


def can_permute(weight: Packed) -> bool:
    """Whether codes are looked up by byte permutation, an instruction of NVIDIA's."""
    return weight.codebook is None and not INTERPRETED and torch.version.hip is None


def pointers(weight: Packed) -> tuple[Tensor, ...]:
    """packed, absmax, scale, offset, codebook, dynamic: a 4-bit weight as kernels take it."""
    packed, absmax, _, scale, offset, codebook = weight
    values, dynamic = float_tables(packed.device)
    if scale is None or offset is None:
        scale = offset = values  # not read
    return (
        packed.contiguous(), absmax.contiguous(), scale.contiguous(), offset,
        values if codebook is None else codebook.contiguous(), dynamic,
    )  # fmt: skip
