"""What one of several devices has of a step that was traced on one.

DDP keeps a second copy of the gradients, in the buckets that it sends.  FSDP2 (fully_shard of each
block, then of the model) cuts parameters, gradients and moments into rows.  Beside its rows, a
device holds for a while, in bytes of whole parameters:

    phase      parameters                      gradients of what trains
    forward    two blocks, those in no block   none
    backward   two blocks, those in no block   of two blocks, of those in no block
    update     none                            none

Two blocks: while one is computed, the next one is gathered.  While the gradients of one block are
computed, those of the block before are being added up over the devices and still have their memory.
What is in no block is gathered once, and its gradients go last, by a copy of them all.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from minipeft.model.predict.prediction import MemoryPrediction
from minipeft.model.predict.step import (
    BACKWARD,
    GRADIENTS,
    MOMENTS,
    UPDATE,
    Held,
    Traced,
    held,
    size_of,
)


class Device:
    """One of `world_size` devices; `sharding` is None, "ddp" or "fsdp2".

    It is made from the model on the meta device, in the state that it is trained in.
    """

    def __init__(self, model: nn.Module, world_size: int, sharding: str | None) -> None:
        self.whole, share = held(model), None
        self.gathered = self.whole_outside = self.blocks = self.outside = self.buckets = 0
        self.part: float = 1.0  # of the gradients and moments
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained = sum(map(size_of, trained))
        if sharding == "fsdp2":
            share = shard_of(world_size)
            block, self.whole_outside = largest_block(model)
            self.gathered = 2 * block + self.whole_outside
            block, self.outside = largest_block(model, trained=True)
            self.blocks = 2 * block
            self.part = sum(map(share, trained)) / max(1, self.trained)
        elif sharding == "ddp":
            self.buckets = self.trained
        self.is_sharded = share is not None
        self.own: Held = held(model, share)
        self.less: int = sum(vars(self.whole).values()) - sum(vars(self.own).values())

    def bytes_of(self, phase: str, uses: Mapping[str, int]) -> int:
        """Bytes on this device at a moment when one device alone would have these, by use."""
        total = sum(uses.values()) + self.buckets
        if not self.is_sharded:
            return total
        gradients, moments = uses.get(GRADIENTS, 0), uses.get(MOMENTS, 0)
        rest = total - gradients - moments - self.less
        if phase == UPDATE:  # its temporaries have the sizes of shards
            temporary = uses.get(UPDATE, 0)
            divided = gradients + moments + temporary
            return rest - temporary + int(divided * self.part)
        if phase != BACKWARD:
            return rest + int((gradients + moments) * self.part) + self.gathered
        recent = min(gradients, self.blocks + self.outside)
        beside = self.gathered + recent
        if gradients >= self.trained:  # the end: a copy of what is in no block is sent
            beside = max(beside, self.whole_outside + 2 * self.outside)
        return rest + int((gradients - recent + moments) * self.part) + beside


def per_device(device: Device, traced: Traced, settings: dict[str, Any]) -> MemoryPrediction:
    """The prediction for this device, from the peaks that it told `trace` to look for."""
    totals: Counter[str] = Counter()
    for phase, uses in traced.peaks.items():
        totals[phase] = device.bytes_of(phase, uses) + traced.kernels
    (phase, peak), *_ = totals.most_common(1)
    return MemoryPrediction(
        **settings, **vars(device.own), gradients=int(traced.gradients * device.part),
        moments=int(traced.moments * device.part), gathered=device.gathered,
        whole_gradients=device.blocks + device.outside, buckets=device.buckets,
        activations=traced.activations, logits_and_loss=traced.logits_and_loss,
        largest_temporary=traced.largest_temporary, kernels=traced.kernels, peak=peak,
        at_peak=phase,
    )  # fmt: skip


def shard_of(world_size: int) -> Callable[[Tensor], int]:
    """How many bytes of a parameter the first of so many devices has: its rows, rounded up."""

    def share(tensor: Tensor) -> int:
        if tensor.dim() == 0:
            return size_of(tensor)
        rest = math.prod(tensor.shape[1:]) * tensor.element_size()
        return math.ceil(tensor.shape[0] / world_size) * rest

    return share


def largest_block(model: nn.Module, *, trained: bool = False) -> tuple[int, int]:
    """Bytes of the largest block's parameters, and of those that are in no block.

    A block is a module in an nn.ModuleList that is in no other; without any, all are in no block.
    `trained`: of those parameters alone that train.
    """

    def of(parameters: Iterable[nn.Parameter]) -> dict[int, int]:
        return {id(p): size_of(p) for p in parameters if p.requires_grad or not trained}

    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [m for n, m in lists if not any(n.startswith(f"{o}.") for o, _ in lists)]
    blocks = [of(block.parameters()) for found in outer for block in found]
    everything = of(model.parameters())
    inside = {key for block in blocks for key in block}
    largest = max((sum(block.values()) for block in blocks), default=0)
    return largest, sum(size for key, size in everything.items() if key not in inside)
