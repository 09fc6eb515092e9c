"""Rows of a batch that train different adapters: each adapter's layers over its own rows alone.

    y = base(x)                                 once, for all rows
    the batch is split where adapters change, and rows with the same adapters are taken together:
        y = layer.on_top(y, x, strength)        for each of their layers, the innermost first
    the parts are put together in the batch's order

So the frozen product, and the decoding of a 4-bit weight, are paid once for all adapters, and each
branch costs what it costs in a run of its own.  The layers' own parameters compute: gradients reach
them as in runs of their own.  No number of an adapter reaches another's rows, forward or backward:
NaN in one that diverged stays there.  An adapter without a row gets no gradient (None).

Rows of an adapter that lie side by side are views; those that lie apart are copied.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.layers.trained import spatial_axes

Lengths = tuple[Tensor, ...]  # each (rows, channels); empty for a layer that has none


class Placed(NamedTuple):
    """One of the layers over a module, and how strongly it acts on the rows that use it."""

    name: str  # the adapter's
    layer: Any
    strength: float


class Link(NamedTuple):
    """A layer in the chain that a row goes through; `number` is its place among all layers."""

    number: int
    layer: Any
    strength: float


def has_lengths(layer: object) -> bool:
    """Whether each row of this layer needs numbers of its own, as DoRA's do."""
    return callable(getattr(type(layer), "lengths", None))


# of a view: where it lies, and how strongly it acts on rows
_ITS_OWN = {"_modules", "_enabled", "_scale", "scaling", "strength"}


def over(layer: Any, below: nn.Module) -> Any:
    """The layer as it is with `below` for its base: on, and with the same parameters.

    DoRA's norms are of all that lies below, and in a stack other adapters lie there.
    """
    view = layer.__new__(type(layer))
    vars(view).update(vars(layer), _modules={**layer._modules, "base": below}, _enabled=True)
    vars(view)["keeps_norms"] = False  # an optimiser need not leave a trace in what it changes
    with torch.inference_mode(False):  # compiled code reads it
        vars(view)["strength"] = torch.tensor(float(layer.full_strength), device="cpu")
    return view


def refresh(view: Any, layer: Any) -> None:
    """Give a view what the layer's attributes are now, such as its mode and its dropout."""
    there = vars(view)
    for name, value in vars(layer).items():
        if name not in _ITS_OWN and (name not in there or there[name] is not value):
            setattr(view, name, value)


def as_if_alone(plain: nn.Module, layers: Sequence[Any]) -> list[Any]:
    """These layers, one over the other and over `plain`, without any that lies between."""
    made, below = [], plain
    for layer in layers:
        below = over(layer, below)
        made.append(below)
    return made


class RowGroups:
    """Which layers over one module each row of a batch goes through.

    `placed` are the layers that rows may use, the innermost first, and `rows` has the names of each
    row's adapters.
    """

    def __init__(
        self, plain: nn.Module, placed: Sequence[Placed], rows: Sequence[tuple[str, ...]]
    ) -> None:
        self.plain, self.placed = plain, list(placed)
        numbers: dict[tuple[int, ...], int] = {}
        self.of_row: list[int] = []  # the group of each row
        for row in rows:
            used = tuple(i for i, own in enumerate(self.placed) if own.name in row)
            self.of_row.append(numbers.setdefault(used, len(numbers)))
        self.chains = [self._chain(used) for used in numbers]
        self.runs = [(group, len([*run])) for group, run in itertools.groupby(self.of_row)]
        self.spatial = spatial_axes(plain)

    def _chain(self, used: tuple[int, ...]) -> list[Link]:
        layers = [self.placed[i].layer for i in used]
        if any(has_lengths(layer) for layer in layers):
            alone = as_if_alone(self.plain, layers)
            layers = [b if has_lengths(a) else a for a, b in zip(layers, alone, strict=True)]
        strengths = [self.placed[i].strength for i in used]
        return [Link(*link) for link in zip(used, layers, strengths, strict=True)]

    def used(self) -> list[Any]:
        """The layers that some row uses."""
        numbers = {link.number for chain in self.chains for link in chain}
        return [self.placed[i].layer for i in sorted(numbers)]

    def using(self, number: int) -> list[int]:
        """The rows that use the layer with this number."""
        groups = {g for g, chain in enumerate(self.chains) if any(n == number for n, _, _ in chain)}
        return [row for row, group in enumerate(self.of_row) if group in groups]

    def trains(self) -> bool:
        """Whether a layer that is used has a parameter that takes a gradient."""
        return any(
            p.requires_grad for layer in self.used() for p in layer.adapter_parameters().values()
        )

    def same_as(self, other: "RowGroups") -> bool:
        """Whether each row goes through the same layers at the same strength."""
        mine, its = ([[(groups.placed[n].layer, s) for n, _, s in chain] for chain in groups.chains]
                     for groups in (self, other))  # fmt: skip
        return self.of_row == other.of_row and mine == its

    def train(self, mode: bool) -> None:
        """Set the mode of layers that lie in no module's tree."""
        for chain in self.chains:
            for number, layer, _ in chain:
                if layer is not self.placed[number].layer:
                    layer.train(mode)

    def lengths(self) -> list[Lengths]:
        """The present lengths of each layer."""
        return [self._lengths(number) for number in range(len(self.placed))]

    def _lengths(self, number: int) -> Lengths:
        """The present lengths of one layer by row, (rows, channels) each.

        A row that does not use the layer gets those of any other row.
        """
        if not has_lengths(self.placed[number].layer):
            return ()
        with torch.no_grad():
            made = {g: layer.lengths() for g, chain in enumerate(self.chains)
                    for n, layer, _ in chain if n == number}  # fmt: skip
            other = next(iter(made.values()), None)
            if other is None:
                other = over(self.placed[number].layer, self.plain).lengths()
            each = [made.get(group, other) for group in self.of_row]
            return tuple(torch.stack(values) for values in zip(*each, strict=True))

    def __call__(self, out: Tensor, x: Tensor, each: int) -> Tensor:
        """What the adapters make of the base's output `out` for the input `x`.

        `each` rows of the batch, side by side, belong to one entry of the list of rows.
        """
        if len(self.runs) == 1:
            return self._through(self.chains[0], out, x)
        sizes = [count * each for _, count in self.runs]
        outs, inputs = list(torch.split(out, sizes)), torch.split(x, sizes)
        for number, chain in enumerate(self.chains):
            parts = [i for i, (group, _) in enumerate(self.runs) if group == number]
            own, its_inputs = ([t[i] for i in parts] for t in (outs, inputs))
            made = self._through(chain, _joined(own), _joined(its_inputs))
            for i, part in zip(parts, torch.split(made, [sizes[i] for i in parts]), strict=True):
                outs[i] = part
        return torch.cat(outs)

    def _through(self, chain: list[Link], out: Tensor, x: Tensor) -> Tensor:
        for number, layer, strength in chain:
            if layer is not self.placed[number].layer:  # a view
                refresh(layer, self.placed[number].layer)
            now = getattr(layer, "on_top_now", None)
            if now is None:
                after = (1,) * self.spatial
                lengths = layer.lengths() if has_lengths(layer) else ()
                shaped = (value.view(-1, *after) for value in lengths)
                made = layer.on_top(out, x, strength, *shaped)
            else:
                made = now(out, x, strength)
            out = made.to(out.dtype)
        return out


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
