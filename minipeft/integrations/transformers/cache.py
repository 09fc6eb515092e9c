"""Route A: a cache that hands each layer its prefix, for models that look up no attention.

Every decoder asks its cache for all keys and values: `k, v = cache.update(k, v, layer)`.  For the
time of one forward this view takes the place of the user's cache.  It stores new keys in the user's
cache (nowhere, if there is none) and returns all of them with the prefix in front.  So the user's
cache holds real tokens only.
"""

from typing import Any, Protocol

from torch import Tensor

from minipeft.integrations.transformers.attention import SWITCHED, Owner, Part, joined
from minipeft.integrations.transformers.masks import reorder
from minipeft.prefix import with_prefix


class Turn(Protocol):
    """One of the runs of an attention module over some of the prefixes."""

    parts: list[Part]
    tokens: tuple[Tensor, Tensor] | None  # the layer's keys and values, once they are stored

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """x without the slots of prefixes that take no part in this run."""
        ...


class PrefixedCache:
    """What transformers asks of a cache, over `inner` (None: nothing is stored).

    `order` is the order of each row's keys (masks.before_tokens), None for the usual one.
    """

    is_compileable = False

    def __init__(self, owner: Owner, inner: Any, order: Tensor | None) -> None:
        self.owner, self.inner, self.order = owner, inner, order
        self.names = owner.names()
        self.turn: Turn | None = None  # of a layer with gates (gates.py)

    def update(
        self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; all of the layer, with the prefix in front."""
        if self.owner.names() != self.names:
            raise ValueError(SWITCHED)
        turn = self.turn
        if turn is not None and turn.tokens is not None:  # they are in the cache already
            k, v = turn.tokens
        elif self.inner is not None:
            k, v = self.inner.update(k, v, layer_idx, *args, **kwargs)
        parts = self.owner.layer(layer_idx) if turn is None else turn.parts
        if turn is not None:
            turn.tokens = (k, v)
        k, v, _ = with_prefix(k, v, *joined(parts))
        if self.order is not None:
            k, v = reorder(k, self.order), reorder(v, self.order)
        if turn is not None:
            k, v = turn.cut(k, 2), turn.cut(v, 2)
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Slots before the next token: the prefix, and the tokens in the cache."""
        seen = 0 if self.inner is None else self.inner.get_seq_length(layer_idx)
        return self.owner.columns() + seen

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The slot of the next token."""
        seen = 0 if self.inner is None else self.inner.get_query_offset(layer_idx)
        return self.owner.columns() + seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The number of slots, and 0: the first of them is slot 0."""
        slots = query_length
        if self.inner is not None:
            slots, skipped = self.inner.get_mask_sizes(query_length, layer_idx)
            if skipped:
                raise ValueError("a cache that forgets its first tokens cannot hold a prefix")
        return self.owner.columns() + slots, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most slots; -1 where the cache grows."""
        most = -1 if self.inner is None else int(self.inner.get_max_length(layer_idx))
        return most if most < 0 else most + self.owner.columns()

    @property
    def is_initialized(self) -> bool:
        """Whether keys and values are there already: the prefix is."""
        return True

    def __len__(self) -> int:
        return 0 if self.inner is None else len(self.inner)

    @property
    def is_sliding(self) -> list[bool]:
        """None of its layers is."""
        return [False] * len(self)
