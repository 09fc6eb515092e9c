"""The columns of a mask that belong to prefixes: which query of which row sees which.

    keys        | prefix A: 3 | prefix B: 2 | tokens |
    row 0, of A | 1  1  1     | 0  0        | its own mask
    row 1, none | 0  0  0     | 0  0        | ...
    row 2, of B | 0  0  0     | 1  1        |

All rows share the keys and values of all prefixes; only the mask differs.  So rows may use
prefixes of different lengths, several, or none, and another choice compiles nothing again.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minipeft.prefix import pad_mask

MaskFunction = Callable[[Any, Any, Any, Any], Any]  # of batch, head, query and key, as numbers


class Query(NamedTuple):
    """The queries for which a mask is built: what matters here of a mask function's arguments."""

    batch: int
    length: int
    offset: Any  # slots before the first query: a number, or a tensor where the cache is static
    mask: Tensor | None  # (batch, slots): True where there is a token and no padding
    window: int | None  # of sliding-window attention, or the size of chunks
    device: torch.device
    chunked: bool = False  # attention within chunks of this size: a text's first, second, ...

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Query":
        """From the keyword arguments that transformers gives a mask function."""
        window = arguments.get("local_size")
        chunk = getattr(arguments.get("config"), "attention_chunk_size", None)
        return cls(
            arguments["batch_size"], arguments["q_length"], arguments.get("q_offset", 0),
            arguments.get("attention_mask"), window, torch.device(arguments.get("device", "cpu")),
            window is not None and window == chunk,
        )  # fmt: skip

    def token_index(self) -> Int[Tensor, "batch queries"]:
        """The number of tokens before each query in its row, padding not counted."""
        slots: Tensor = torch.arange(self.length, device=self.device) + self.offset
        slots = slots.expand(self.batch, -1)
        if self.mask is None:
            return slots
        count = self.mask.to(self.device).long().cumsum(1) - 1
        return count.gather(1, slots).clamp(min=0)


def of_rows(rows: Bool[Tensor, "rows columns"], batch: int) -> Bool[Tensor, "batch columns"]:
    """The rows' columns for a batch that repeats each row: beams, several answers to one prompt.

    Raises:
        ValueError: the batch is not a multiple of the rows.
    """
    if batch % len(rows):
        raise ValueError(
            f"a batch of {batch} rows, but prefixes were chosen for {len(rows)} "
            "(use_adapters with rows=)"
        )
    return rows.repeat_interleave(batch // len(rows), 0)


def within_window(
    visible: Bool[Tensor, "batch columns"], token_index: Int[Tensor, "batch queries"], window: int,
    *, chunked: bool = False,
) -> Bool[Tensor, "batch queries columns"]:  # fmt: skip
    """The columns that a sliding window reaches, as if the prefix were tokens.

    A row's visible columns are its first tokens, one after the other; a query sees the last
    `window` tokens up to itself, or, `chunked`, those of its own `window` tokens.
    """
    position = (visible.long().cumsum(1) - 1)[:, None, :]
    query = (token_index + visible.sum(1, keepdim=True))[:, :, None]
    near = query // window == position // window if chunked else query - position < window
    return near & visible[:, None, :]


def moved(mask_function: MaskFunction, by: Int[Tensor, " batch"]) -> MaskFunction:
    """Who sees whom, if each row's tokens stood `by` slots further."""

    def inner(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask_function(batch, head, query + by[batch], key + by[batch])

    return inner


def put_in_front(mask: Any, visible: Tensor | None, columns: int) -> Any:
    """The mask (batch or 1, 1, queries, keys) with the prefix columns in front.

    `visible` broadcasts to (batch, 1, queries, columns); None: all are visible.  Bool masks say who
    sees whom, others are added to the scores.
    """
    if mask is None:
        return None
    if visible is None:
        return pad_mask(mask, columns)
    batch, queries = max(len(mask), len(visible)), mask.shape[-2]
    visible = visible.to(mask.device).expand(batch, mask.shape[1], queries, columns)
    if mask.dtype != torch.bool:
        hidden = torch.finfo(mask.dtype).min
        visible = torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, hidden)
    return torch.cat([visible, mask.expand(batch, -1, -1, -1)], dim=-1)


def before_tokens(
    mask: Tensor, visible: Bool[Tensor, "batch columns"], rank: Int[Tensor, " columns"]
) -> tuple[Tensor, Int[Tensor, "batch slots"]]:
    """Move a row's prefix right before its first token, behind padding and hidden columns.

    For attention that counts distance in slots (ALiBi).  Columns of a higher `rank` (at most 0)
    stand nearer to the text.  Returns the mask (batch, columns + slots) and the order in which to
    take the keys, which come as [prefix columns, slots].
    """
    whole = torch.cat([visible.to(mask.device, mask.dtype), mask], dim=1)
    columns = visible.shape[1]
    leading = mask.bool().long().cumsum(1) == 0  # left padding
    hidden = -columns - 1
    place = torch.full_like(whole, 1, dtype=torch.long)  # of text
    place[:, :columns] = torch.where(visible, rank, hidden).to(mask.device)
    place[:, columns:][leading] = hidden
    order = torch.argsort(place, dim=1, stable=True)
    return whole.gather(1, order), order


def all_slots(order: Int[Tensor, "batch slots"], slots: int) -> Int[Tensor, "batch slots2"]:
    """The order with the slots behind it: a static cache has some that no mask covers yet."""
    if order.shape[1] == slots:
        return order
    more = torch.arange(order.shape[1], slots, device=order.device)
    return torch.cat([order, more.expand(len(order), -1)], 1)


def reorder(x: Tensor, order: Int[Tensor, "batch slots"]) -> Tensor:
    """Keys or values (batch, heads, slots', dim) with their first slots in this order."""
    return taken(x, all_slots(order, x.shape[2]), 2)


def taken(x: Tensor, index: Int[Tensor, "rows slots"], axis: int) -> Tensor:
    """The entries of x along an axis whose numbers are in `index`, for each row of the batch.

    The first axis of x has the rows of `index`, one for all of them, or several (heads, say) to
    each; one row of `index` is for all of x.
    """
    if len(index) == 1:
        return x.index_select(axis, index[0])
    if len(x) == 1:
        x = x.expand(len(index), *x.shape[1:])
    sizes = [1] * x.dim()
    sizes[0], sizes[axis] = len(x), index.shape[1]
    chosen = index.repeat_interleave(len(x) // len(index), 0).view(sizes)
    return x.gather(axis, chosen.expand(*(n if i != axis % x.dim() else -1
                                          for i, n in enumerate(x.shape))))  # fmt: skip
