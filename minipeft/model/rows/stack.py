"""Layers of any kind whose rows use different adapters: each layer of the stack is asked in turn.

    y = base(x)                                            once, for the whole batch
    for each layer, the innermost first:
        y[its rows] = layer.on_top(y[its rows], x[its rows], strength)

A row that uses no adapter keeps the base's numbers bit for bit, and no number of one adapter
reaches the rows of another.  Compiled code computes each layer for all rows and chooses with the
gate, so that other rows compile nothing again.  That is inference; while gradients are wanted each
layer computes with the numbers it has now, for its own rows (layers/row_groups.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.adapters.products import call
from minipeft.adapters.protocol import innermost
from minipeft.adapters.wrapper import Wrapper
from minipeft.layers.by_row import ByRow
from minipeft.layers.row_groups import Lengths, RowGroups
from minipeft.layers.trained import spatial_axes


def why_not(layer: object) -> str | None:
    """Why the rows of a batch cannot be told apart in this adapter layer; None: they can.

    A layer says what it makes of the output below it by a method `on_top`.  One that inherits the
    method and has another forward is refused: the two need not agree.
    """
    order = type(layer).__mro__
    if (reason := getattr(type(layer), "rows_are_lost", None)) is not None:
        return str(reason)
    defines = {name: next((i for i, cls in enumerate(order) if name in vars(cls)), len(order))
               for name in ("on_top", "forward")}  # fmt: skip
    if defines["on_top"] == len(order):
        return f"{type(layer).__name__} has no method on_top (wrapper.py says what it does)"
    if defines["forward"] < defines["on_top"]:
        return f"{type(layer).__name__} has a forward of its own, and no on_top of its own"
    return None


class _Copies(NamedTuple):
    """What a stack keeps of its layers, by layer."""

    using: list[list[int]]  # rows of the gate
    strengths: list[float]
    lengths: list[Lengths]


class RowStack(ByRow):
    """A stack of adapter layers of any kind over one module, gated by row.

    `layers` are those of the stack that rows may use, the innermost first, and `slots` the columns
    of the gate that belong to them; `serve` says which rows use which.  The module must take one
    tensor, whose first axis is the batch (or the batch and later axes, flattened), and return one
    with the same first axis.  Token ids are (batch, tokens) where rows differ: positions that all
    rows share have no row.

    Raises:
        ValueError: a batch of another shape, in forward.
        TypeError: the module takes or returns something else, in forward.
    """

    def __init__(
        self, base: nn.Module, layers: Sequence[Any], slots: Sequence[int], gate: Tensor
    ) -> None:
        super().__init__(base, gate)
        # lists: the layers are in the stack below, and no state dict holds the tensors
        self.layers, self.slots = list(layers), list(slots)
        self.spatial = spatial_axes(innermost(base))
        self.using: list[list[int]] = [[] for _ in layers]  # rows of the gate, by layer
        self.strengths: list[float] = [0.0 for _ in layers]
        self.lengths: list[Lengths] = [() for _ in layers]
        with torch.inference_mode(False):  # its tensors could not be changed outside
            self.compiled_strengths = [torch.zeros((), device="cpu") for _ in layers]
        self.train(base.training)

    def copies(self, groups: RowGroups, slots: list[int]) -> _Copies:
        """For each layer the rows that use it, its strength and its lengths by row."""
        using = [groups.using(number) for number in range(len(self.layers))]
        return _Copies(using, [own.strength for own in groups.placed], groups.lengths())

    def take(self, copies: _Copies) -> None:
        """Serve these rows; tensors that have the shape already are changed in place."""
        self.using, self.strengths, lengths = copies
        for tensor, strength in zip(self.compiled_strengths, self.strengths, strict=True):
            tensor.fill_(strength)
        for i, new in enumerate(lengths):
            if [t.shape for t in self.lengths[i]] == [t.shape for t in new]:
                for old, value in zip(self.lengths[i], new, strict=True):
                    old.copy_(value)
            else:
                self.lengths[i] = new

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        asks = self.asks_layers()
        out: Tensor = call(innermost(self), x, *others, **named)
        strength = self.strength_now()
        off = not self._enabled if asks else strength is None
        if off:
            return out
        if others or named or not isinstance(out, Tensor) or not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__}: {type(innermost(self)).__name__} takes or returns more "
                "than one tensor with the batch first; use_adapters(rows=) cannot tell its rows "
                "apart: run the rows of each adapter in a batch of their own"
            )
        each = self.rows_of_each(x, 2 + self.spatial)
        if len(self.gate) > 1 and out.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: {type(innermost(self)).__name__} makes {tuple(out.shape)} "
                f"of {tuple(x.shape)}; with another first axis its rows cannot be told apart"
            )
        if asks:
            return self.ask_layers(out, x, each)
        for number in range(len(self.layers)):
            if isinstance(strength, Tensor):  # compiled
                out = self._chosen_by_gate(number, out, x, each)
            else:
                out = self._in_its_rows(number, out, x, each)
        return out

    def _in_its_rows(self, number: int, out: Tensor, x: Tensor, each: int) -> Tensor:
        using, layer = self.using[number], self.layers[number]
        if not using:
            return out
        lengths = self._spread(number, using, each, out)
        if len(using) == len(self.gate):
            return layer.on_top(out, x, self.strengths[number], *lengths).to(out.dtype)
        index = torch.tensor([row * each + i for row in using for i in range(each)])
        there = index.to(out.device)
        made = layer.on_top(out[there], x[index.to(x.device)], self.strengths[number], *lengths)
        return out.index_copy(0, there, made.to(out.dtype))

    def _chosen_by_gate(self, number: int, out: Tensor, x: Tensor, each: int) -> Tensor:
        lengths = self._spread(number, range(len(self.gate)), each, out)
        made = self.layers[number].on_top(out, x, self.compiled_strengths[number], *lengths)
        on = self.gate[:, self.slots[number]] * self.strength.to(self.gate.device)
        if len(on) > 1:
            on = on.repeat_interleave(each).view(-1, *(1,) * (out.dim() - 1))
        return torch.where(on.to(out.device) != 0, made.to(out.dtype), out)

    def _spread(self, number: int, rows: Sequence[int], each: int, out: Tensor) -> list[Tensor]:
        """The lengths of these rows of the gate, with the axes of the output."""
        after = (1,) * self.spatial
        found = []
        for value in self.lengths[number]:
            value = value.to(out.device)
            if len(self.gate) == 1:
                found.append(value.view(-1, *after))
                continue
            if len(rows) < len(self.gate):
                value = value[torch.tensor(list(rows), device=out.device)]
            value = value.repeat_interleave(each, dim=0)
            between = (1,) * (out.dim() - 2 - self.spatial)
            found.append(value.view(len(value), *between, -1, *after))
        return found

    @property
    def bias(self) -> Tensor | None:
        """The base's bias; a meta tensor where a layer has another, which not all rows share."""
        own: Tensor | None = getattr(innermost(self), "bias", None)
        if own is None or all(type(layer).bias is Wrapper.bias for layer in self.layers):
            return own
        return torch.empty_like(own, device="meta")

    def extra_repr(self) -> str:
        return f"layers={[type(layer).__name__ for layer in self.layers]}"
