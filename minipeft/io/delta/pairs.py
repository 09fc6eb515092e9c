"""Two checkpoints side by side: which tensors belong together, checked before a value is read."""

from collections.abc import Iterable
from pathlib import Path

from minipeft.io.bitsandbytes.plan import Ignore, unwanted
from minipeft.io.shards import Reader

POLICIES = ("zeros", "mean")


def paired(
    base: Reader, other: Reader, rows: str | None, ignore: Ignore, *, what: str,
    may_have_rows: bool = False,
) -> list[str]:  # fmt: skip
    """The names that both have, in the other's order; `what` the other is: "delta", "tuned model".

    `may_have_rows`: the base may have the rows already, which is found out later.

    Raises:
        ValueError: a name that one of them lacks and `ignore` does not name; another shape or kind
            of numbers; more rows than the base has, without `rows`; `rows` without such.
    """
    if rows is not None and rows not in POLICIES:
        raise ValueError(f"rows={rows!r:.40}; choose one of {POLICIES}, or None where none are new")
    left_out = unwanted([*base.specs, *(n for n in other.specs if n not in base.specs)], ignore)
    ours, theirs = (_names(reader, left_out) for reader in (base, other))
    if lost := [name for name in ours if name not in theirs]:
        raise ValueError(_lacking(other, lost, base, f"the {what}"))
    if lost := [name for name in theirs if name not in ours]:
        raise ValueError(_lacking(base, lost, other, "the base"))
    if not theirs:
        raise ValueError(f"the {what} has no tensors")
    grown = [name for name in theirs if _grows(base, other, name, rows, what)]
    if rows is not None and not grown and not may_have_rows:
        raise ValueError(
            f"rows={rows!r}: no tensor of the {what} has more rows than the base's: leave it out; "
            "or is the base a result already?"
        )
    return list(theirs)


def _names(reader: Reader, left_out: Iterable[str]) -> dict[str, None]:
    out = set(left_out)
    return dict.fromkeys(name for name in reader.specs if name not in out)


def _lacking(reader: Reader, lost: list[str], other: Reader, which: str) -> str:
    return (
        f"{place_of(reader)}: no {lost[0]:.80} ({len(lost)} such names in all), which "
        f"{other.file_of[lost[0]]} has; expected the same names in both: is {which} complete, and "
        "of the same model? ignore= leaves tensors out that nobody needs (rotary_emb.inv_freq)"
    )


def place_of(reader: Reader) -> Path:
    """The folder of a reader's files, or its one file."""
    paths = set(reader.file_of.values()) or set(reader.metadata)
    first = min(paths, default=Path())
    return first if len(paths) == 1 else first.parent


def _grows(base: Reader, other: Reader, name: str, rows: str | None, what: str) -> bool:
    """Whether a tensor has more rows than the base's, which `rows` allows."""
    (own_dtype, own), (dtype, shape) = base.specs[name], other.specs[name]
    where = f"{other.file_of[name]}: {name:.80} is {dtype} of shape {shape}"
    expected = f"expected {own_dtype} of shape {own}, as in {base.file_of[name]}"
    floats = dtype.is_floating_point
    if floats != own_dtype.is_floating_point or (not floats and dtype != own_dtype):
        raise ValueError(f"{where}; {expected}: is the {what} of this base?")
    if shape == own:
        return False
    more = (
        floats and 0 < len(own) == len(shape) and shape[1:] == own[1:] and shape[0] > own[0] > 0
    )  # fmt: skip
    if not more:
        raise ValueError(f"{where}; {expected}: is the {what} of this base?")
    if rows is None:
        raise ValueError(
            f"{where}; {expected}: say what the {shape[0] - own[0]} new rows were in the base by "
            "rows='zeros' (Vicuna's first delta) or rows='mean' of the others (Alpaca)"
        )
    return True
