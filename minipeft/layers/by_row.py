"""The layer that lies over a stack of adapter layers while rows of a batch use different ones.

A gate (rows, adapters) says which row uses which adapter.  It is one tensor for the whole model,
changed in place to serve other rows.  There are two kinds: bank.py joins the factors of linear
layers into one product; stack.py asks one layer after the other, of any kind.  Both compute so in
inference, from copies of what they need; where gradients are wanted, the layers themselves compute
(row_groups.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import innermost
from minipeft.adapters.wrapper import Wrapper
from minipeft.layers.pending import Pending, pending_of
from minipeft.layers.row_groups import RowGroups

Row = str | None | Sequence[str]  # an adapter, none, or several that add up


class ByRow(Wrapper):
    """A layer whose rows use different adapters among those of the layers below.

    `gate` (rows, capacity) has a 1 where a row uses an adapter; (1, capacity) is for all rows
    alike.  In a batch of n times as many rows, each row of the gate stands for n rows side by side,
    as `generate` has beams.  `groups` are the layers by row, None for a layer that serves copies
    alone.
    """

    nameless = True  # it is no adapter of its own
    gate: Tensor
    groups: RowGroups | None = None
    slots: list[int]
    mixing = ""  # what mixes rows while the model trains (model/rows/mixing.py)

    def __init__(self, base: nn.Module, gate: Tensor) -> None:
        super().__init__(base)
        # not a buffer: it is shared by all layers of a model, and casting one would part them
        self.gate = gate
        self.slots = []
        self._ready = True  # whether the copies are of the layers' present values
        # the notes of the layer that was there before are still those of this module
        self._pending: Pending = pending_of(innermost(base))

    def copies(self, groups: RowGroups, slots: list[int]) -> Any:
        """What inference needs of the layers' present values; None: it must ask them.

        Changes nothing.
        """
        return True

    def take(self, copies: Any) -> None:
        """Serve what `copies` returned."""

    def drop_copies(self) -> None:
        """Free the copies: the layers train."""

    def follow(self, groups: RowGroups, slots: list[int], mixing: str, copies: Any = None) -> None:
        """Serve these rows from now on; `slots` are the columns of the gate by layer.

        `copies` are those of these rows, for a layer that does not train.
        """
        self.groups, self.slots, self.mixing = groups, slots, mixing
        self._serve(copies)

    def _serve(self, copies: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():  # changed in place later, in any mode
            if self.training:
                self.drop_copies()
            elif copies is not None:
                self.take(copies)
        self._ready = not self.training and copies is not None

    def copies_now(self, groups: RowGroups, slots: list[int]) -> Any:
        """`copies`, unless the layers train: those compute themselves."""
        with torch.inference_mode(False), torch.no_grad():
            return None if self.training else self.copies(groups, slots)

    def taken_off(self) -> None:
        """No rows are served: let the module itself refuse to compute theirs again."""
        self._pending.watch(innermost(self))

    def train(self, mode: bool = True) -> "ByRow":
        """Set the mode; leaving training copies what was trained."""
        super().train(mode)
        if self.groups is not None:
            self.groups.train(mode)
            self._serve(self.copies_now(self.groups, self.slots))
        return self

    def asks_layers(self) -> bool:
        """Whether the layers themselves compute in this call: it trains, or copies may be stale.

        They may be once a call had gradients, until the mode is set or rows are chosen again:
        an optimiser need not leave a trace in what it changes.

        Raises:
            RuntimeError: it trains, and there are no layers to train.
            ValueError: it trains, and something in the model mixes rows.
        """
        if self.groups is None:
            self.refuse_training()
            return False
        learns = torch.is_grad_enabled() and (self.training or self.groups.trains())
        if learns and self.training and self.mixing:
            raise ValueError(f"use_adapters(rows=): {self.mixing}")
        if learns:
            self._ready = False
        # while training under no_grad too: that is the first pass of checkpointing
        return learns or self.training or not self._ready

    def ask_layers(self, out: Tensor, x: Tensor, each: int) -> Tensor:
        """The base's output with what each row's own layers add.

        Raises:
            RuntimeError: checkpointing computes it again, and the rows were changed since.
        """
        assert self.groups is not None
        if not self._enabled:
            return out
        self._pending.check(self.groups)
        made = self.groups(out, x, each)
        self._pending.note(self.groups, made)
        return made

    def refuse_training(self) -> None:
        """Raise RuntimeError if this call would train copies."""
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: it serves copies of factors, which do not train; call "
                "model.eval(), or let minipeft.use_adapters(model, rows=) put it over their layers"
            )

    def rows_of_each(self, x: Tensor, least_axes: int = 2) -> int:
        """How many rows of the batch belong to each row of the gate.

        Raises:
            ValueError: another number of rows, or fewer axes than a batch has.
        """
        if len(self.gate) == 1:
            return x.shape[0] if x.dim() else 1
        if x.dim() < least_axes or x.shape[0] % len(self.gate):
            raise ValueError(
                f"{type(self).__name__}: a batch of shape {tuple(x.shape)} for {len(self.gate)} "
                "rows; use_adapters(rows=) takes one name for each row of the batch"
            )
        return x.shape[0] // len(self.gate)

    def _set_strength(self) -> None:
        self.strength.fill_(float(self._enabled))  # the layers' own scales are kept elsewhere

    @property
    def weight(self) -> Tensor:
        """No weight that all rows share: a meta tensor of the right shape and dtype.

        Models that look at those work, and nn.TransformerEncoderLayer calls this layer.
        """
        plain: Any = innermost(self)
        own = plain._parameters.get("weight")
        if own is not None:
            return torch.empty_like(own, device="meta")
        dtype = getattr(plain, "weight_dtype", None) or plain.weight.dtype
        if hasattr(plain, "num_embeddings"):
            shape = (plain.num_embeddings, plain.embedding_dim)
        else:
            shape = (plain.out_features, plain.in_features)
        shape = shape[::-1] if getattr(plain, "transposed", False) else shape
        return torch.empty(shape, dtype=dtype, device="meta")

    def exact_parameters(self) -> dict[str, Tensor]:
        """Rows use different weights, so there is no weight to merge."""
        raise ValueError(
            f"{type(self).__name__}: rows of a batch use different adapters; use_adapters first"
        )
