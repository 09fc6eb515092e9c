"""What the module that holds a model's prefixes offers, so that others need not know its class."""

from collections.abc import Sequence
from typing import Protocol, TypeGuard, runtime_checkable

from torch import nn


@runtime_checkable
class PrefixHolder(Protocol):
    """The module that holds the prefixes of a model, each an adapter with a name of its own."""

    encoders: nn.ModuleDict

    def serve_rows(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Let row i of each batch use the prefixes in rows[i]; other names are passed over."""
        ...

    def stop_rows(self) -> None:
        """Let all rows use what is on."""
        ...

    def run_by_the_model(self) -> list[str]:
        """The names of those that run through the model once for all rows."""
        ...

    def remove(self, *, name: str | None = None, heads: bool = True) -> None:
        """Take one off, or all; the heads that came with them too, unless `heads` is False."""
        ...


def holds_prefixes(module: object) -> TypeGuard[PrefixHolder]:
    """Whether the module holds the prefixes of a model; asked of its class, as in `is_adapter`."""
    return callable(getattr(type(module), "run_by_the_model", None))
