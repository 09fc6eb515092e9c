"""Two training steps on the meta device, and what was alive during the second.

The first step makes the optimiser's moments, so that the second is like all that follow.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import is_packed
from minipeft.adapters.state import named_adapters
from minipeft.fast.panels import GPU_PANEL_BYTES, PANEL_BYTES
from minipeft.fast.prefix import attention as prefix_attention
from minipeft.model.predict.attention import FusedAttention, WithinModules
from minipeft.model.predict.live import Live
from minipeft.ops import Implementation

MODEL, GRADIENTS, MOMENTS = "model", "gradients", "moments"
FORWARD, LOSS, BACKWARD, UPDATE = "forward", "loss", "backward", "update"
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# on the meta device too, prefixes take the way that they take on a CPU
PREFIX_ROW = Implementation(
    "prefix_attention", "pytorch", lambda device, dtype, shape: device.type == "meta",
    prefix_attention.__module__, prefix_attention.__name__,
)  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """Bytes of a step; `peaks` by phase, each by what the memory was for at its highest moment."""

    gradients: int
    moments: int
    activations: int
    logits_and_loss: int
    largest_temporary: int
    kernels: int
    peaks: dict[str, dict[str, int]]


class _Step(Live):  # type: ignore[no-untyped-call]
    """Live, with what the 4-bit operators take inside themselves on the device in question."""

    def __init__(self, device_type: str) -> None:
        super().__init__("meta")
        self.target = device_type

    def kernel_bytes(self, func: Any, args: Any) -> int:
        """On a GPU a part of the weight is decoded; on a CPU into a buffer that stays."""
        name = func._schema.name
        if self.target == "cpu" or not name.startswith("minipeft::nf4_linear"):
            return 0
        x, columns = args[0], args[-1]
        return min(int(x.shape[-1] * columns * x.element_size()), GPU_PANEL_BYTES)


def trace(
    model: nn.Module,
    forward: Callable[[nn.Module], Tensor],
    make_optimizer: MakeOptimizer,
    *,
    device_type: str = "cpu",
    head: nn.Module | None = None,
) -> Traced:
    """Run forward, backward and update twice; `model` is on the meta device and ready to train.

    `forward` returns the loss.  What is made from the call of `head` on counts as logits and loss.

    Raises:
        ValueError: nothing trains, or the loss is no single number.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("predict_memory: no parameter of the model trains")
    live = _Step(device_type)
    live.use = MODEL
    for tensor in (*model.parameters(), *model.buffers()):
        live.follow(tensor)
    mode = FusedAttention(device_type)
    around = WithinModules(FusedAttention(device_type), model)
    kernels = PANEL_BYTES if device_type == "cpu" and _has_packed(model) else 0
    handles: list[Any] = [
        p.register_post_accumulate_grad_hook(lambda p: live.follow(p.grad, GRADIENTS))  # type: ignore[no-untyped-call]
        for p in trained
    ]
    if head is not None:
        handles.append(head.register_forward_pre_hook(lambda *_: setattr(live, "use", LOSS)))
    try:
        with live:
            optimizer = make_optimizer(trained)
            for _ in range(2):
                live.restart()
                live.use = FORWARD
                with mode:
                    loss = forward(model)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    raise ValueError("predict_memory: the forward must return the loss, one number")
                live.keep_new()
                activations, of_loss = live.now[FORWARD], live.now[LOSS]
                live.use = BACKWARD
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
                gradients = live.now[GRADIENTS]
                live.use = UPDATE
                optimizer.step()
                moments = _moments(optimizer)
                for tensor in moments:
                    live.follow(tensor, MOMENTS)
                optimizer.zero_grad()
    finally:
        around.remove()
        for handle in handles:
            handle.remove()
    peaks = {phase: dict(+Counter(bytes_)) for phase, bytes_ in live.peaks.items()}
    return Traced(
        gradients, sum(t.untyped_storage().nbytes() for t in moments), activations, of_loss,
        live.largest_freed, kernels, peaks,
    )  # fmt: skip


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of the optimiser's state."""
    return [t for own in optimizer.state.values() for t in own.values() if isinstance(t, Tensor)]


def _has_packed(model: nn.Module) -> bool:
    return any(is_packed(module) for module in model.modules())


@dataclass(frozen=True)
class Held:
    """Bytes of a model's tensors, by what they are."""

    dense: int
    codes: int
    scales: int
    adapters: int


def held(model: nn.Module, share: Callable[[Tensor], int] | None = None) -> Held:
    """Count the tensors of the model, shared ones once; buffers are dense.

    `share` says how many bytes of a parameter a device has, where it is not all.
    """
    share = share or _size
    of: dict[int, tuple[str, int]] = {}
    for adapter in named_adapters(model).values():
        for parameter in adapter.adapter_parameters().values():
            of[id(parameter)] = ("adapters", share(parameter))
    for module in model.modules():
        if is_packed(module):
            for name, parameter in module.packed_parameters().items():
                kind = "codes" if name == "packed" else "scales"
                of[id(parameter)] = (kind, share(parameter))
    for parameter in model.parameters():
        of.setdefault(id(parameter), ("dense", share(parameter)))
    for buffer in model.buffers():
        of.setdefault(id(buffer), ("dense", _size(buffer)))
    sums: Counter[str] = Counter()
    for kind, size in of.values():
        sums[kind] += size
    return Held(sums["dense"], sums["codes"], sums["scales"], sums["adapters"])


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def shard_of(world_size: int) -> Callable[[Tensor], int]:
    """How many bytes of a parameter the first of so many devices has: its rows, rounded up."""

    def share(tensor: Tensor) -> int:
        if tensor.dim() == 0:
            return _size(tensor)
        rest = math.prod(tensor.shape[1:]) * tensor.element_size()
        return math.ceil(tensor.shape[0] / world_size) * rest

    return share


def largest_block(model: nn.Module) -> tuple[int, int]:
    """Bytes of the largest block's parameters, and of those that are in no block.

    A block is a module in an nn.ModuleList that is in no other; without any, all are one block.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [m for n, m in lists if not any(n.startswith(f"{o}.") for o, _ in lists)]
    blocks = [_parameters(block.parameters()) for found in outer for block in found]
    everything = _parameters(model.parameters())
    if not blocks:
        return sum(map(_size, everything.values())), 0
    inside = {key for block in blocks for key in block}
    largest = max(sum(map(_size, block.values())) for block in blocks)
    return largest, sum(_size(p) for key, p in everything.items() if key not in inside)


def _parameters(parameters: Iterable[nn.Parameter]) -> dict[int, nn.Parameter]:
    return {id(p): p for p in parameters}
