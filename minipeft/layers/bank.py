"""Linear layers whose rows use different adapters: one product for all of them.

The factors of all adapters lie side by side, as if they were one adapter of a high rank; a gate
says which of its columns a row of the batch uses:

    hidden = x [A_1; A_2; ...]^T       (rows, ..., capacity * rank)
    hidden = hidden * gate[row]        1 on the columns of the row's adapters, 0 elsewhere
    y      = base(x) + hidden [B_1, B_2, ...]^T

Lower ranks are padded with zeros.  Costs grow with the number of adapters that are loaded, not with
how many a batch uses, and stay below the base's while capacity * rank is below its sizes.  On a GPU
a kernel of kernels/ multiplies each row by the factors of its own adapters alone.  Choosing
other rows, strengths or factors changes tensors in place: a compiled model stays compiled.

These are copies, for inference.  In training the layers compute themselves (row_groups.py), and the
copies are freed until then.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minipeft import ops
from minipeft.adapters.products import call
from minipeft.adapters.protocol import innermost
from minipeft.layers.by_row import ByRow
from minipeft.layers.row_groups import RowGroups
from minipeft.lora import add_lora, checked_linear


@ops.plain_row("lora_rows")
def add_rows(out: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """out + sum over slots of gate[row, slot] * x a[slot]^T b[slot], in out's dtype.

    `out` (*batch, out_features) and `x` (*batch, in_features) have as many rows as the gate, or n
    times as many; `a` is (capacity, rank, in_features), `b` (capacity, rank, out_features).
    """
    rows, rank = len(gate), a.shape[1]
    if rows > 1:
        gate = gate.repeat_interleave(x.shape[0] // rows, dim=0)
    columns = gate.to(out.device, out.dtype).repeat_interleave(rank, dim=1)
    if x.dim() == 1:
        columns = columns[0]
    else:
        columns = columns.view(len(gate), *(1,) * (x.dim() - 2), columns.shape[-1])
    return add_lora(out, x, a.flatten(0, 1), b.flatten(0, 1).T, columns)


def _adder(out: Tensor, *given: Tensor) -> Any:
    """What computes `add_rows` here: the plain form wherever torch has to see its operations."""
    tensors = (out, *given)
    if torch.compiler.is_compiling() or not ops.nobody_listens(out, tensors):
        return add_rows
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return add_rows  # kernels have no gradient
    if any(t.is_neg() for t in given):
        return add_rows
    return ops.OPERATORS["lora_rows"].choose(out.device, out.dtype, out.shape)


class LoRABank(ByRow):
    """Up to `capacity` LoRA adapters of at most `rank` over one linear layer, gated by row.

    `a` (capacity, rank, in_features) and `b` (capacity, rank, out_features) are buffers that no
    state dict holds, zero at first; `load` fills a slot.  `gate` as in ByRow, with a column for
    each slot; banks of a model may share one tensor.  Rows whose gate is 0 equal the base bit for
    bit, whatever else is loaded.  A bank that was made by hand has no layers: training it raises.

    Raises:
        TypeError, ValueError: as LoRALinear; capacity or rank below 1.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self,
        base: nn.Module,
        capacity: int,
        rank: int,
        *,
        gate: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = checked_linear("LoRABank", base)
        if capacity < 1 or rank < 1:
            raise ValueError(f"LoRABank: capacity={capacity}, rank={rank}; expected at least 1")
        device = next(innermost(base).parameters()).device
        with torch.inference_mode(False):  # its tensors could not be changed outside
            gate = torch.zeros(1, capacity, device=device) if gate is None else gate
            super().__init__(base, gate)
            self.capacity, self.rank = capacity, rank
            self.in_features, self.out_features, self.transposed = shape
            for name, size in (("a", shape.in_features), ("b", shape.out_features)):
                none = torch.zeros(capacity, 0, size, dtype=dtype, device=device)
                self.register_buffer(name, none, persistent=False)
            self._allocate()
        self.take_over()

    def _allocate(self) -> None:
        """Zeros for every slot, where there are none."""
        for name in ("a", "b"):
            old = self._buffers[name]
            assert old is not None
            if old.shape[1] < self.rank:
                shape = (self.capacity, self.rank, old.shape[2])
                setattr(self, name, torch.zeros(shape, dtype=old.dtype, device=old.device))

    def drop_copies(self) -> None:
        """Free the factors."""
        if self.a.shape[1]:
            self.a, self.b = self.a[:, :0].clone(), self.b[:, :0].clone()

    def copies(
        self, groups: RowGroups, slots: list[int]
    ) -> list[tuple[int, Tensor, Tensor]] | None:
        """Slots and factors; None where one holds NaN or Inf, which would reach all rows."""
        found = []
        for slot, own in zip(slots, groups.placed, strict=True):
            a, b = own.layer.factors()
            found.append((slot, a, b * own.strength))
        return found if all(finite(a, b) for _, a, b in found) else None

    def take(self, copies: list[tuple[int, Tensor, Tensor]]) -> None:
        """Load the factors, and nothing into other slots."""
        self._allocate()
        for slot in range(self.capacity):
            self.clear(slot)
        for slot, a, b in copies:
            self._put(slot, a, b)

    def _put(self, slot: int, a: Tensor, b: Tensor) -> None:
        self.a[slot, : len(a)] = a.to(self.a.dtype)
        self.b[slot, : len(a)] = b.T.to(self.b.dtype)

    def load(self, slot: int, a: Float[Tensor, "r inner"], b: Float[Tensor, "outer r"]) -> None:
        """Copy the factors of one adapter into a slot, padded with zeros to the bank's rank.

        Raises:
            ValueError: no such slot, a rank above the bank's, other sizes, or NaN or Inf, which
                would reach every row (0 * NaN is NaN); nothing changes.
        """
        rank = a.shape[0]
        if not 0 <= slot < self.capacity:
            raise ValueError(f"LoRABank: slot {slot} of {self.capacity}")
        sizes = (a.shape[1], b.shape[0], b.shape[1])
        if rank > self.rank or sizes != (self.in_features, self.out_features, rank):
            raise ValueError(
                f"LoRABank: factors {tuple(a.shape)} and {tuple(b.shape)}; expected (r, "
                f"{self.in_features}) and ({self.out_features}, r) with r at most {self.rank}"
            )
        if not finite(a, b):
            raise ValueError("LoRABank: the factors hold NaN or Inf; look for a diverged adapter")
        with torch.no_grad():
            self.clear(slot)
            self._put(slot, a, b)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.a[slot].zero_()
        self.b[slot].zero_()

    def forward(self, x: Tensor) -> Tensor:
        asks = self.asks_layers()
        out: Tensor = call(innermost(self), x)
        if asks:
            return self.ask_layers(out, x, self.rows_of_each(x))
        if (strength := self.strength_now()) is None:
            return out
        gate = self.gate
        if isinstance(strength, Tensor):  # compiled: 0 while off
            gate = gate * strength.to(gate.device)
        self.rows_of_each(x)  # raises where there are other rows
        made: Tensor = _adder(out, x, self.a, self.b, gate)(out, x, self.a, self.b, gate)
        return made

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, rank={self.rank}"


def finite(*factors: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    return all(bool(factor.isfinite().all()) for factor in factors)
