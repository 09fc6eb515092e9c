"""What a delta of ours says of itself, and its corrections.

Each shard's metadata holds, under "minipeft_delta", for each tensor the sha256 of the base and of
the tuned tensor, see `Entry`.  Beside a shard model-00001-of-00002.safetensors there may be

    model-00001-of-00002.corrections-001.safetensors, ...-002...

which hold the numbers that base + delta does not give: for a chunk of a tensor, its first number
being number 0 of `start`, int32 places "<name>/<start>/at" and values "<name>/<start>/is".  Other
programs read the shards and leave the corrections out.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minipeft.io.fields import TEXT, Kind, check, list_of, one_of, parse_object, whole
from minipeft.io.header import DAMAGED, DTYPES, NAMES
from minipeft.io.shards import Reader, ShardWriter

KEY = "minipeft_delta"
_FLUSH = 2**23  # bytes of corrections in one file, about
_HASH = Kind("a sha256", lambda value: isinstance(value, str) and len(value) == 64)
_FIELDS = {
    "dtype": one_of(*DTYPES), "shape": list_of(whole(0)), "base": _HASH, "tuned": _HASH,
    "corrections": TEXT, "largest": TEXT,
}  # fmt: skip


@dataclass(frozen=True)
class DeltaReport:
    """What a delta holds.

    `changed` numbers are not what base + delta gives alone, by at most `largest`: other programs
    (FastChat) get them so.  apply_delta puts them right, so its result is the tuned model in every
    bit (`exact`).  Of a foreign delta nobody knows: None.  `total` is the sum of all numbers of the
    result, in float64, where published_sum= asked for it.
    """

    tensors: int
    numbers: int
    exact: bool
    changed: int | None = None
    largest: float | None = None
    total: float | None = None


class Entry(NamedTuple):
    """What is known of one tensor: of the tuned one its dtype, of the base one its shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    base: str = "0" * 64
    tuned: str = "0" * 64
    corrections: int = 0
    largest: float = 0.0


def text_of(entries: Mapping[str, Entry], rows: str | None) -> str:
    """The metadata of a shard; its length does not depend on sums and counts."""
    tensors = {
        name: {
            "dtype": NAMES[entry.dtype], "shape": list(entry.shape), "base": entry.base,
            "tuned": entry.tuned, "corrections": f"{entry.corrections:015d}",
            "largest": f"{entry.largest:.9e}".ljust(16),
        }
        for name, entry in entries.items()
    }  # fmt: skip
    return json.dumps({"version": 1, "rows": rows, "tensors": tensors})


def entries_in(reader: Reader) -> tuple[dict[str, Entry], str | None]:
    """What the files of a delta say of each tensor, and of new rows; empty for a foreign delta.

    Raises:
        ValueError: a file says it and another does not, or two contradict each other.
    """
    said = {path: found[KEY] for path, found in reader.metadata.items() if KEY in found}
    if not said:
        return {}, None
    entries: dict[str, Entry] = {}
    all_rows = set[object]()
    for path in reader.metadata:
        if path not in said:
            raise ValueError(f"{path}: is no part of the delta that {min(said)} is of; {DAMAGED}")
        found = parse_object(said[path].encode(), f"{path}: {KEY}")
        check(f"{path}: {KEY}", found, {"version": one_of(1), "rows": one_of(None, "zeros", "mean"),
              "tensors": Kind("an object", lambda v: isinstance(v, dict))},
              needed=("version", "rows", "tensors"))  # fmt: skip
        all_rows.add(found["rows"])
        for name, fields in found["tensors"].items():  # type: ignore[attr-defined]  # checked
            entries[name] = _entry(f"{path}: {name:.80}", fields)
    if len(all_rows) > 1 or entries.keys() != reader.specs.keys():
        raise ValueError(f"{min(said)}: its files are of several deltas; {DAMAGED}")
    rows = all_rows.pop()
    return entries, None if rows is None else str(rows)


def _entry(where: str, fields: object) -> Entry:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: {KEY} holds no object")
    check(where, fields, _FIELDS, needed=_FIELDS)
    try:
        count, largest = int(fields["corrections"]), float(fields["largest"])
    except ValueError as error:
        raise ValueError(f"{where}: {KEY}: {error}") from error
    return Entry(DTYPES[fields["dtype"]], tuple(fields["shape"]), fields["base"], fields["tuned"],
                 count, largest)  # fmt: skip


def report_of(entries: Mapping[str, Entry], numbers: int) -> DeltaReport:
    """The report of a delta of ours."""
    return DeltaReport(
        len(entries), numbers, exact=True, changed=sum(e.corrections for e in entries.values()),
        largest=max((e.largest for e in entries.values()), default=0.0),
    )  # fmt: skip


class CorrectionWriter:
    """The corrections of one shard, in files of some MiB: each is written when it is full."""

    def __init__(self, shard: Path) -> None:
        self._shard, self._files, self._held = shard, 0, 0
        self._tensors: dict[str, Tensor] = {}

    def add(self, name: str, start: int, at: Tensor, values: Tensor) -> None:
        """Values of a chunk that the sum does not give, and their places in the chunk."""
        if len(at):
            self._tensors |= {f"{name}/{start}/at": at, f"{name}/{start}/is": values}
            self._held += at.nbytes + values.nbytes
        if self._held > _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self._tensors:
            self._files += 1
            name = f"{self._shard.stem}.corrections-{self._files:03d}.safetensors"
            specs = {own: (t.dtype, tuple(t.shape)) for own, t in self._tensors.items()}
            with ShardWriter(self._shard.with_name(name), specs) as writer:
                for own, tensor in self._tensors.items():
                    writer.write(own, tensor)
                writer.finish()
        self._tensors, self._held = {}, 0


class Corrections:
    """The corrections beside a delta's shards, read."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def apply(self, name: str, start: int, chunk: Tensor) -> int:
        """Put a chunk right, in place; returns how many numbers that changes.

        Raises:
            ValueError: places or values that do not fit the chunk.
        """
        key = f"{name}/{start}"
        if f"{key}/at" not in self._reader.specs:
            return 0
        at, values = (self._reader.read(f"{key}/{own}") for own in ("at", "is"))
        fits = at.dtype == torch.int32 and values.dtype == chunk.dtype and at.shape == values.shape
        if not fits or at.dim() != 1 or not bool(((at >= 0) & (at < len(chunk))).all()):
            raise ValueError(f"{self._reader.file_of[key + '/at']}: {key:.80} fits no chunk of it")
        chunk[at.long()] = values
        return len(at)


@contextmanager
def corrections_beside(shards: Iterable[Path]) -> Iterator[Corrections]:
    """The corrections beside these files.

    Raises:
        ValueError: a damaged file.
    """
    paths = [
        path for shard in shards
        for path in sorted(shard.parent.glob(f"{shard.stem}.corrections-*.safetensors"))
    ]  # fmt: skip
    with Reader(paths, mmap=False) as found:
        yield Corrections(found)
