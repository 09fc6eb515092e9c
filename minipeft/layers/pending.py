"""Checkpointing computes a forward again in backward: are the rows still those of that forward?

Nothing that checkpointing keeps says which adapters the rows used, so other rows would give wrong
gradients without a word.  Each result therefore gets a hook that holds a note of its rows, until
its backward has come or its graph is gone.  The notes belong to the innermost module: the layers
over it may be replaced in between, by those of other rows, or by none while names are used.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.layers.row_groups import RowGroups


class _Note:
    """The rows of one forward, and which backward has come."""

    def __init__(self, groups: RowGroups) -> None:
        self.groups, self.backward = groups, -1

    def done(self, _: Tensor) -> None:
        """Its backward is here; in it, the forward may still be computed again."""
        self.backward = _backward()

    def waits(self) -> bool:
        return self.backward in (-1, _backward())


def _backward() -> int:
    """The number of the backward that this call is in; -1 outside."""
    number: int = torch._C._current_graph_task_id()
    return number


class Pending:
    """The forwards over one module whose backward may still come.

    While no rows are served it is a hook of that module, until nothing can come any more.
    """

    def __init__(self) -> None:
        self._notes: weakref.WeakSet[_Note] = weakref.WeakSet()
        self._latest: RowGroups | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (Pending, ())  # a copy has had no forward

    def _waiting(self) -> list[RowGroups]:
        return [note.groups for note in self._notes if note.waits()]

    def check(self, groups: RowGroups | None) -> None:
        """Before a call: where it computes again, raise RuntimeError if its rows were others.

        Re-entrant checkpointing runs its forward without a graph, so that nothing waits: there the
        latest forward counts, one under no_grad too.  None stands for names.
        """
        if torch.compiler.is_compiling():  # checkpointing is part of the graph
            return
        if _backward() == -1:  # not within a backward
            self._latest = groups
            return
        then = self._waiting() or ([self._latest] if self._latest is not None else [])
        if any(groups is None or not own.same_as(groups) for own in then):
            raise RuntimeError(
                "use_adapters: the rows were changed after a forward, before checkpointing "
                "computed it again in backward; call backward first, then use_adapters (and let go "
                "of a loss that needs no backward)"
            )

    def note(self, groups: RowGroups, made: Tensor) -> None:
        """After a call: remember its rows until its backward."""
        if torch.compiler.is_compiling() or not made.requires_grad:
            return
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(made)
        if wrapped or _backward() != -1:
            return
        note = _Note(groups)
        self._notes.add(note)
        made.register_hook(note.done)  # type: ignore[no-untyped-call]

    def watch(self, plain: nn.Module) -> None:
        """Check the calls of the module itself: no layer over it serves rows any more."""
        waits = self._latest is not None or bool(self._waiting())
        if waits and self not in plain._forward_pre_hooks.values():
            plain.register_forward_pre_hook(self)

    def __call__(self, plain: nn.Module, _: Any) -> None:
        """The hook; a new forward after which nothing waits takes it off."""
        self.check(None)
        if self._latest is None and not self._waiting():
            _take_off(plain)


def pending_of(plain: nn.Module) -> Pending:
    """The notes that watch this module, which do so no more; or none yet."""
    return _take_off(plain) or Pending()


def _take_off(plain: nn.Module) -> Pending | None:
    hooks = plain._forward_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(hook, Pending):
            del hooks[key]
            return hook
    return None
