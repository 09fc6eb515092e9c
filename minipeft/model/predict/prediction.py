"""What a training step will need, in bytes, and whether it fits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

ROWS = (
    ("weights, dense", "dense"), ("weights, 4-bit codes", "codes"), ("scales", "scales"),
    ("adapters", "adapters"), ("gradients", "gradients"), ("moments", "moments"),
    ("gathered for computing", "gathered"), ("gradients, not yet cut", "whole_gradients"),
    ("gradients in buckets", "buckets"),
    ("activations kept", "activations"), ("logits and loss kept", "logits_and_loss"),
    ("largest temporary", "largest_temporary"), ("buffers of kernels", "kernels"),
)  # fmt: skip


class Fit(NamedTuple):
    """Whether it fits, and why; true where it does."""

    fits: bool
    why: str

    def __bool__(self) -> bool:
        return self.fits

    def __str__(self) -> str:
        return f"{'yes' if self.fits else 'no'}, {self.why}"


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes that one device needs for a training step; `print` shows it.

    Parts do not add up to `peak`: kept activations go while gradients come, and temporaries are
    there for a moment.  `peak` is the highest sum at any moment of the second step; `at_peak` says
    in which phase that is.  It is what tensors and the kernels' buffers take: the process with its
    imports, a CUDA context (0.3 to 0.8 GB) and what an allocator keeps back come on top.
    """

    method: str
    batch: int | None  # None where a forward of one's own makes the inputs
    length: int | None
    checkpointing: bool
    device: str
    world_size: int
    sharding: str | None
    dense: int  # weights that are not 4-bit, and buffers
    codes: int
    scales: int
    adapters: int
    gradients: int
    moments: int
    gathered: int  # parameters of at most two blocks, whole (FSDP2), and those in no block
    whole_gradients: int  # of two blocks and of what is in no block (FSDP2, in backward)
    buckets: int  # gradients as DDP sends them
    activations: int  # kept for backward at the end of the forward
    logits_and_loss: int  # the same, of the head and the loss
    largest_temporary: int
    kernels: int
    peak: int
    at_peak: str
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Bytes that are there between two steps: weights, adapters and moments."""
        return self.dense + self.codes + self.scales + self.adapters + self.moments

    def fits(self, gigabytes: float, *, reserved: float = 1.0) -> Fit:
        """Whether the peak fits into so many GB (1e9 bytes), `reserved` of them for all else.

        Raises:
            ValueError: not a positive size.

        """
        if not gigabytes > reserved >= 0:
            raise ValueError(
                f"fits: {gigabytes} GB with {reserved} reserved; expected more than is reserved"
            )
        need, room = self.peak / 1e9, gigabytes - reserved
        said = f"the peak is {need:.1f} GB and {room:.1f} of {gigabytes:g} GB are free for it"
        if need <= room:
            return Fit(True, said)
        sizes = sorted(((getattr(self, f), name) for name, f in ROWS), reverse=True)
        most = ", ".join(f"{name} {size / 1e9:.1f}" for size, name in sizes[:3] if size)
        return Fit(False, f"because {said}; most of it: {most}")

    def __str__(self) -> str:
        where = "" if self.sharding is None else f", {self.world_size} devices by {self.sharding}"
        kept = ", checkpointing" if self.checkpointing else ""
        tokens = (
            "a forward of its own"
            if self.batch is None
            else (f"{self.batch} x {self.length} tokens a device")
        )
        lines = [f"{self.method}: {tokens}{kept}{where}"]
        lines += [f"  {name:24}{size:>20,}" for name, own in ROWS if (size := getattr(self, own))]
        lines.append(f"  {'peak':24}{self.peak:>20,} bytes, in {self.at_peak}")
        lines += [f"  {name}: {note}" for name, note in self.notes.items()]
        for size in (24, 48, 80):
            lines.append(f"fits in {size} GB: {self.fits(size)}")
        return "\n".join(lines)
