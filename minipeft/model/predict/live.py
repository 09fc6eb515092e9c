"""Which memory is alive while operators run, and how much it was at most.

Every operator of PyTorch goes through a dispatch mode.  It sees what the operator returns, and asks
the storage of each result to tell when it is freed.  On the meta device nothing is computed, yet
storages have their sizes and live as long as real ones.  torch.distributed._tools.MemTracker works
in the same way; it is private, imports torch.distributed, and divides memory by modules instead of
by what it is for.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Cost = Callable[[str, Mapping[str, int]], int]  # of a moment: its phase, and bytes by use


def in_all(phase: str, uses: Mapping[str, int]) -> int:
    """All bytes of a moment."""
    return sum(uses.values())


class Storage:
    """One block of memory: its bytes and what it is for."""

    def __init__(self, size: int, use: str) -> None:
        self.size, self.use = size, use


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, storages of one device type are followed from their making to their end.

    `use` is what new storages are for, until they are said to be for something else.  `now` is in
    bytes, by use.  `peaks` has, for each phase, the bytes by use at its highest moment; a phase is
    the `use` of that moment, and how high a moment is `cost` says.  `kernel_bytes` may say how much
    an operator takes inside itself, which its results do not show.
    """

    def __init__(self, device_type: str = "meta", cost: Cost = in_all) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type, self.cost = device_type, cost
        self.use = "other"
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._heights: dict[str, int] = {}  # the costs of these
        self.largest_freed = 0  # of the storages that were made and freed since `restart`
        self._alive: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self._new: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self.follow(tensor)
        inside = self.kernel_bytes(func, args)
        self._mark(inside)
        self.largest_freed = max(self.largest_freed, inside)
        return out

    def kernel_bytes(self, func: Any, args: Any) -> int:
        """Bytes that this operator takes and frees again, beside what it returns."""
        return 0

    def follow(self, tensor: Tensor, use: str | None = None) -> None:
        """Count the tensor's storage, if it is new; with `use` say what it is for."""
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        number = id(storage)  # torch keeps the Python object of a storage as long as its memory
        known = self._alive.get(number)
        if known is None:
            entry = Storage(storage.nbytes(), use or self.use)
            self._alive[number] = (weakref.ref(storage, lambda _: self._end(number)), entry)
            self._new.add(number)
            self.now[entry.use] += entry.size
            self._mark(0)
        elif use is not None:
            entry = known[1]
            self.now[entry.use] -= entry.size
            self.now[use] += entry.size
            entry.use = use
            self._new.discard(number)

    def restart(self) -> None:
        """Forget the peaks so far; what is alive now is not new."""
        self.peaks, self.largest_freed = {}, 0
        self._new.clear()

    def keep_new(self, use: str | None = None) -> None:
        """What is alive now is no temporary; with `use`, what is new is for that."""
        for number in self._new:
            entry = self._alive[number][1]
            if use is not None:
                self.now[entry.use] -= entry.size
                self.now[use] += entry.size
                entry.use = use
        self._new.clear()

    @property
    def total(self) -> int:
        """Bytes that are alive."""
        return sum(self.now.values())

    def _mark(self, more: int) -> None:
        uses = Counter(self.now)
        if more:
            uses["kernel"] += more
        height = self.cost(self.use, uses)
        if self.use not in self.peaks or self._heights[self.use] < height:
            self.peaks[self.use], self._heights[self.use] = uses, height

    def _end(self, number: int) -> None:
        _, entry = self._alive.pop(number)
        self.now[entry.use] -= entry.size
        if number in self._new:
            self._new.discard(number)
            self.largest_freed = max(self.largest_freed, entry.size)


def _tensors(out: Any) -> Iterable[Tensor]:
    """The tensors that an operator returned: one, none, or some in (lists in) a tuple or list."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for part in out:
            yield from _tensors(part)
