"""Checkpointing computes a forward again in backward: are the rows still those of that forward?

Nothing that checkpointing keeps says which adapters the rows used, so other rows would give wrong
gradients without a word.  Each result therefore gets a hook that holds a note of its rows, until
its backward has come or its graph is gone.
"""

import weakref

import torch
from torch import Tensor

from minipeft.layers.row_groups import RowGroups


class _Note:
    """The rows of one forward."""

    def __init__(self, groups: RowGroups) -> None:
        self.groups: RowGroups | None = groups

    def done(self, _: Tensor) -> None:
        """Its backward is here."""
        self.groups = None


class Pending:
    """The forwards of one layer whose backward may still come."""

    def __init__(self) -> None:
        self._notes: weakref.WeakSet[_Note] = weakref.WeakSet()
        self._latest: RowGroups | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (Pending, ())  # a copy has had no forward

    def check(self, groups: RowGroups) -> None:
        """Before a call: where it computes again, raise RuntimeError if its rows were others.

        Re-entrant checkpointing runs its forward without a graph: there the latest forward counts.
        """
        if torch.compiler.is_compiling():  # checkpointing is part of the graph
            return
        if torch._C._current_graph_task_id() == -1:  # not within a backward
            self._latest = groups
            return
        waiting = [note.groups for note in self._notes] + [self._latest]
        if any(own is not None and not own.same_as(groups) for own in waiting):
            raise RuntimeError(
                "use_adapters(rows=): the rows were changed after a forward, before checkpointing "
                "computed it again in backward; call backward first, then use_adapters (and let go "
                "of a loss that needs no backward)"
            )

    def note(self, groups: RowGroups, made: Tensor) -> None:
        """After a call: remember its rows until its backward."""
        if torch.compiler.is_compiling() or not made.requires_grad:
            return
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(made)
        if wrapped or torch._C._current_graph_task_id() != -1:
            return
        note = _Note(groups)
        self._notes.add(note)
        made.register_hook(note.done)  # type: ignore[no-untyped-call]
