"""What the launches of all kernels share: the device, the arguments of a 4-bit weight."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from minipeft.ops import Packed
from minipeft_kernels.triton.codes import float_tables
from minipeft_kernels.triton.selection import Card

INTERPRETED = bool(triton.knobs.runtime.interpret)  # Triton too settles it when it is imported


def on(tensor: Tensor, *others: Tensor | None) -> AbstractContextManager[Any]:
    """A context in which kernels go to the tensor's device.

    Raises:
        RuntimeError: kernels do not run there, or another tensor is on another device (a kernel
            would read that memory as its own).
    """
    for other in others:
        if other is not None and other.device != tensor.device:
            raise RuntimeError(
                f"minipeft_kernels.triton: tensors on {tensor.device} and {other.device}; expected "
                "all of them on one device"
            )
    if INTERPRETED or (tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()):
        return nullcontext()
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    raise RuntimeError(
        f"minipeft_kernels.triton: the weight is on {tensor.device.type}; these kernels run on "
        "CUDA and ROCm devices, or anywhere in a process started with TRITON_INTERPRET=1"
    )


@functools.cache
def card_of(device: torch.device) -> Card:
    """The kind of card, by which plans are chosen."""
    if torch.version.hip is not None:
        return "amd"
    major = 9 if INTERPRETED else torch.cuda.get_device_capability(device)[0]
    if major < 8:
        return "old"
    return "staged" if major in (9, 10) else "nvidia"


@functools.cache
def lanes_of(device: torch.device) -> int:
    """Threads of a warp: 32, or 64 on AMD's data-centre cards."""
    return 32 if INTERPRETED else int(torch.cuda.get_device_properties(device).warp_size)


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


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int,
    stages: int,
) -> None:
    """Launch a kernel on the current device; `constants` are its last parameters, in their order.

    Triton's own launch looks at every argument and option again and compares what the kernel reads
    from its module, which takes longer than a small product.  What it compiled is kept here by all
    that it specialises on: dtypes, alignment to 16 bytes, and whole numbers that are 1, multiples
    of 16 or beyond 32 bits.
    """
    if INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    key = (
        id(kernel), torch.cuda.current_device(), warps, stages, *constants.values(),
        *[
            (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, Tensor)
            else (a == 1, a % 16 == 0, a < 2**31) if isinstance(a, int) else None
            for a in arguments
        ],
    )  # fmt: skip
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *constants.values())
        return
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    compiled = kernel[grid](*arguments, **constants, **options)
    if compiled is not None:  # Triton's hooks can keep it from compiling
        _compiled[key] = compiled


_compiled: dict[tuple[Any, ...], Any] = {}
