"""Gates on route A: attention runs without the prefix too, and its heads are blended.

`gated_attention` goes from attention without a prefix to attention with it, for each head.  Where a
model looks up no attention, both come from the attention module itself: it runs once for each
gated prefix, and last without any.  A run gets the keys and values of its prefixes alone, and masks
without the columns of the others.  The module that projects the heads' outputs gets, in the last
run, the blend of what it got in all of them.  gate_search.py finds that module by trying.
"""

from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers.attention import Owner, Part
from minipeft.integrations.transformers.cache import PrefixedCache
from minipeft.integrations.transformers.masks import all_slots, taken
from minipeft.integrations.transformers.positions import Arguments, names_of


class Place(NamedTuple):
    """Where one layer's heads are: its attention, and the module that projects their outputs."""

    module: nn.Module
    projection: str  # its name in `module`
    heads: Tensor  # (columns,): the key/value head to which each column of its input belongs
    by_key: list[str]  # arguments of `module` whose last axis has an entry for each key


class Runs:
    """The runs of one attention module for one call; `hide` says which prefixes take no part."""

    def __init__(self, owner: "Gates", parts: list[Part], cache: PrefixedCache) -> None:
        self.owner, self.parts, self.cache = owner, parts, cache
        self.tokens: tuple[Tensor, Tensor] | None = None
        self.hidden = [False] * len(parts)
        self.seen: list[Tensor] = []  # what the projection got in each run

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """x without the slots of prefixes that take no part in this run."""
        if not any(self.hidden):
            return x
        slots = x.shape[axis]
        sizes = [part.columns for part in self.parts]
        both = list(zip(sizes, self.hidden, strict=True))
        both.append((slots - sum(sizes), False))  # of tokens
        gone = torch.cat([torch.full((n,), hide, device=x.device) for n, hide in both])
        order = self.cache.order
        found = gone[None] if order is None else gone[all_slots(order, slots)]
        left = sum(n for n, hide in both if not hide)  # in every row
        index = torch.argsort(found.long(), dim=1, stable=True)[:, :left]  # traced as it is
        return taken(x, index, axis)


_running: ContextVar[Runs | None] = ContextVar("running", default=None)


class Gates:
    """The two hooks of one layer: a class, so that it can be copied and pickled."""

    def __init__(self, owner: Owner, number: int, place: Place) -> None:
        self.owner, self.number, self.place = owner, number, place
        self.names = names_of(place.module)
        self.projection: nn.Module | None = None  # that is hooked
        self.traced: Runs | None = None  # tracing cannot read context variables
        self.handles: list[Any] = []

    def hook(self) -> None:
        """Put the hooks on."""
        module = self.place.module
        self.handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
        self.follow()

    def follow(self) -> None:
        """Hook the module that projects now: LoRA may have come around it, or gone."""
        before, now = self.projection, self._projects()
        if before is not None and before is not now:
            self._unhook(before)
        if now is not before or not self._hooks_of(now):
            self._unhook(now)
            now.register_forward_pre_hook(self.blend)
        self.projection = now

    def come_last(self) -> None:
        """Let hooks that came later act first: every run gets what they make of the input."""
        hooks: Any = self.place.module._forward_pre_hooks
        if hooks and getattr(next(reversed(hooks.values())), "__self__", None) is not self:
            for key in self._hooks_of(self.place.module):
                hooks.move_to_end(key)

    def remove(self) -> None:
        """Take both hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._unhook(self._projects())

    def _projects(self) -> nn.Module:
        return self.place.module.get_submodule(self.place.projection)

    def _hooks_of(self, module: nn.Module) -> list[int]:
        hooks = module._forward_pre_hooks
        return [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]

    def _unhook(self, module: nn.Module) -> None:
        """Also what `restoring` put back after an error, of which no handle knows."""
        for key in self._hooks_of(module):
            del module._forward_pre_hooks[key]

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run attention for each gated prefix; the module's own run, without them, comes last."""
        self._set(None)  # where an error left one
        caches = (a for a in (*args, *kwargs.values()) if isinstance(a, PrefixedCache))
        if (cache := next(caches, None)) is None:
            return None
        cache.turn = None
        parts = self.owner.layer(self.number)
        gated = [number for number, part in enumerate(parts) if part.gate is not None]
        if not gated:
            return None
        if not torch.compiler.is_compiling():
            self.follow()
        cache.turn = runs = Runs(self, parts, cache)
        self._set(runs)
        for number in gated:
            runs.hidden = [n in gated and n != number for n in range(len(parts))]
            given = self._cut(args, kwargs, runs)
            with ExitStack() as stack:
                if module.training and not torch.compiler.is_compiling():
                    stack.enter_context(_same_dropout(given))
                module.forward(*given.args, **given.kwargs)
        runs.hidden = [n in gated for n in range(len(parts))]
        given = self._cut(args, kwargs, runs)
        return given.args, given.kwargs

    def _cut(self, args: Any, kwargs: Any, runs: Runs) -> Arguments:
        """The arguments without the keys of prefixes that take no part."""
        given = Arguments(self.names, args, kwargs)
        for name in self.place.by_key:
            if isinstance(given[name], Tensor):
                given[name] = runs.cut(given[name], given[name].dim() - 1)
        return given

    def blend(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the projection: note what it gets; in the last run, blend."""
        runs = self.traced if torch.compiler.is_compiling() else _running.get()
        if runs is None or runs.owner is not self:
            return None
        runs.seen.append(args[0])
        gates = [part.gate for part in runs.parts if part.gate is not None]
        if len(runs.seen) <= len(gates):
            return None
        self._set(None)
        runs.cache.turn = None
        *joined, alone = runs.seen
        out, heads = alone, self.place.heads.to(alone.device)
        for gate, whole in zip(gates, joined, strict=True):
            out = out + gate.to(out.device, out.dtype)[heads] * (whole - alone)
        return (out, *args[1:])

    def _set(self, runs: Runs | None) -> None:
        if torch.compiler.is_compiling():
            self.traced = runs
        else:
            _running.set(runs)


def _same_dropout(given: Arguments) -> Any:
    """A context whose random state is put back, so that the next run drops the same."""
    tensors = (v for v in (*given.args, *given.kwargs.values()) if isinstance(v, Tensor))
    device = next(tensors).device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
