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

from minipeft.adapters.products import is_slow
from minipeft.adapters.protocol import is_packed
from minipeft.adapters.state import named_adapters
from minipeft.fast.panels import GPU_PANEL_BYTES, panel_rows
from minipeft.fast.prefix import attention as prefix_attention
from minipeft.model.predict.attention import FusedAttention
from minipeft.model.predict.live import Cost, Live, in_all
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
    """Live, with what the 4-bit operators take inside themselves on the device in question.

    `panels` is the most that the buffer held into which a CPU decodes parts of a weight.
    """

    def __init__(self, device_type: str, cost: Cost) -> None:
        super().__init__("meta", cost)
        self.target, self.panels = device_type, 0

    def kernel_bytes(self, func: Any, args: Any) -> int:
        """On a GPU a part of the weight is decoded; on a CPU into a buffer that stays."""
        name = func._schema.name
        if name == "minipeft::nf4_experts":  # one expert after the other is decoded
            return int(math.prod(args[-2][1:]) * args[0].element_size())
        if not name.startswith("minipeft::nf4_linear"):
            return 0
        x, block_size, other = args[0], args[3], args[-1]
        rows, features = (other, x.shape[-1]) if name.endswith("_linear") else (x.shape[-1], other)
        whole = int(rows * features * x.element_size())
        if features % block_size:  # blocks run over the ends of rows: no panels
            return whole
        if self.target != "cpu":
            return min(whole, GPU_PANEL_BYTES)
        cpu = torch.device("cpu")
        inside = torch.float32 if is_slow(x.dtype, cpu) else x.dtype
        panel = min(rows, panel_rows(features, inside, cpu)) * features * inside.itemsize
        self.panels = max(self.panels, panel)
        return 0


def trace(
    model: nn.Module,
    forward: Callable[[nn.Module], Tensor],
    make_optimizer: MakeOptimizer,
    *,
    device_type: str = "cpu",
    head: nn.Module | None = None,
    cost: Cost = in_all,
) -> Traced:
    """Run forward, backward and update twice; `model` is on the meta device and ready to train.

    `forward` returns the loss.  What is made from the call of `head` on counts as logits and loss.
    The highest moment of a phase is the one with the most `cost`.

    Raises:
        ValueError: nothing trains, or the loss is no single number.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("predict_memory: no parameter of the model trains")
    live = _Step(device_type, cost)
    live.use = MODEL
    for tensor in (*model.parameters(), *model.buffers()):
        live.follow(tensor)
    handles: list[Any] = [
        p.register_post_accumulate_grad_hook(lambda p: live.follow(p.grad, GRADIENTS))  # type: ignore[no-untyped-call]
        for p in trained
    ]
    if head is not None:
        handles.append(head.register_forward_pre_hook(lambda *_: setattr(live, "use", LOSS)))
    try:
        with FusedAttention(device_type), live:
            optimizer = make_optimizer(trained)
            for _ in range(2):
                live.restart()
                live.use = FORWARD
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
        for handle in handles:
            handle.remove()
    peaks = {phase: dict(+Counter(bytes_)) for phase, bytes_ in live.peaks.items()}
    return Traced(
        gradients, sum(s.nbytes() for s in storages(moments).values()), activations, of_loss,
        live.largest_freed, live.panels, peaks,
    )  # fmt: skip


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of the optimiser's state."""
    return [t for own in optimizer.state.values() for t in own.values() if isinstance(t, Tensor)]


@dataclass(frozen=True)
class Held:
    """Bytes of a model's tensors, by what they are."""

    dense: int
    codes: int
    scales: int
    adapters: int


def held(model: nn.Module, share: Callable[[Tensor], int] | None = None) -> Held:
    """Count the memory of the model's tensors, each storage once; buffers are dense.

    Views of one storage are that storage, and a buffer that was expanded is as small as it was.
    `share` says how many bytes of a parameter a device has, where it is not all.
    """
    of: dict[int, tuple[str, int]] = {}

    def count(kind: str, tensor: Tensor, *, divided: bool = True) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes() if share is None or not divided else share(tensor)
        of.setdefault(storage._cdata, (kind, size))

    for adapter in named_adapters(model).values():
        for parameter in adapter.adapter_parameters().values():
            count("adapters", parameter)
    for module in model.modules():
        if is_packed(module):
            for name, parameter in module.packed_parameters().items():
                count("codes" if name == "packed" else "scales", parameter)
    for parameter in model.parameters():
        count("dense", parameter)
    for buffer in model.buffers():
        count("dense", buffer, divided=False)
    sums: Counter[str] = Counter()
    for kind, size in of.values():
        sums[kind] += size
    return Held(sums["dense"], sums["codes"], sums["scales"], sums["adapters"])


def size_of(tensor: Tensor) -> int:
    """Bytes of the tensor's numbers."""
    return tensor.numel() * tensor.element_size()


def storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages of these tensors, each once."""
    return {s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors)}
