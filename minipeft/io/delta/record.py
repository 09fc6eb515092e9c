"""What a delta of ours says of itself, and its corrections.

Each shard's metadata holds, under "minipeft_delta", for each tensor the sha256 of the base and of
the tuned tensor, see `Entry`.  Beside a shard model-00001-of-00002.safetensors there may be

    model-00001-of-00002.corrections-001.safetensors, ...-002...

which hold the numbers that base + delta does not give: for a chunk of a tensor, its first number
being number 0 of `start`, int32 places "<name>/<start>/at" and values "<name>/<start>/is".  Other
programs read the shards and leave the corrections out.
"""

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minipeft.io.delta.chunks import CHUNK
from minipeft.io.fields import TEXT, Kind, check, one_of, parse_object, whole
from minipeft.io.header import DAMAGED, DTYPES, NAMES
from minipeft.io.shards import Reader, ShardWriter

KEY = "minipeft_delta"
_FLUSH = 2**23  # bytes of corrections in one file, about
_HASH = Kind("a sha256", lambda value: isinstance(value, str) and len(value) == 64)
_HEAD = {
    "version": one_of(1), "rows": one_of(None, "zeros", "mean"), "chunk": whole(16, 2**24),
    "tensors": Kind("an object", lambda value: isinstance(value, dict)),
}  # fmt: skip
_FIELDS = {
    "dtype": one_of(*DTYPES), "base": _HASH, "tuned": _HASH,
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
    """What is known of one tensor; dtype: the tuned one's.  A sha256 covers dtype and shape too."""

    dtype: torch.dtype
    base: str = "0" * 64
    tuned: str = "0" * 64
    corrections: int = 0
    largest: float = 0.0


def text_of(entries: Mapping[str, Entry], rows: str | None) -> str:
    """The metadata of a shard; its length does not depend on sums and counts."""
    tensors = {
        name: {
            "dtype": NAMES[entry.dtype], "base": entry.base, "tuned": entry.tuned,
            "corrections": f"{entry.corrections:015d}",
            "largest": f"{entry.largest:.9e}".ljust(16),
        }
        for name, entry in entries.items()
    }  # fmt: skip
    return json.dumps({"version": 1, "rows": rows, "chunk": CHUNK, "tensors": tensors})


def entries_in(reader: Reader) -> tuple[dict[str, Entry], str | None, int]:
    """What the files of a delta say of each tensor, of new rows, and the numbers of a chunk.

    No entries for a foreign delta.

    Raises:
        ValueError: a file says it and another does not, or two contradict each other.
    """
    said = {path: found[KEY] for path, found in reader.metadata.items() if KEY in found}
    if not said:
        for path in reader.metadata:
            if beside := _corrections_of(path):
                raise ValueError(
                    f"{path}: {beside[0].name} corrects it, and its own record of the delta is "
                    "gone: it was written again; get the delta again"
                )
        return {}, None, CHUNK
    entries: dict[str, Entry] = {}
    settings = set[tuple[object, object]]()
    for path in reader.metadata:
        if path not in said:
            raise ValueError(f"{path}: is no part of the delta that {min(said)} is of; {DAMAGED}")
        found = parse_object(said[path].encode(), f"{path}: {KEY}")
        check(f"{path}: {KEY}", found, _HEAD, needed=_HEAD)
        settings.add((found["rows"], found["chunk"]))
        for name, fields in found["tensors"].items():  # type: ignore[attr-defined]  # checked
            entries[name] = _entry(f"{path}: {name:.80}", fields)
    if len(settings) > 1 or entries.keys() != reader.specs.keys():
        raise ValueError(f"{min(said)}: its files are of several deltas; {DAMAGED}")
    rows, chunk = settings.pop()
    return entries, None if rows is None else str(rows), int(str(chunk))


def _entry(where: str, fields: object) -> Entry:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: {KEY} holds no object")
    check(where, fields, _FIELDS, needed=_FIELDS)
    try:
        count, largest = int(fields["corrections"]), float(fields["largest"])
    except ValueError as error:
        raise ValueError(f"{where}: {KEY}: {error}") from error
    return Entry(DTYPES[fields["dtype"]], fields["base"], fields["tuned"], count, largest)


def report_of(entries: Mapping[str, Entry], numbers: int) -> DeltaReport:
    """The report of a delta of ours."""
    return DeltaReport(
        len(entries), numbers, exact=True, changed=sum(e.corrections for e in entries.values()),
        largest=max((e.largest for e in entries.values()), default=0.0),
    )  # fmt: skip


def _corrections_of(shard: Path) -> list[Path]:
    return sorted(shard.parent.glob(f"{glob.escape(shard.stem)}.corrections-*.safetensors"))


class CorrectionWriter:
    """The corrections of one shard, in files of some MiB: each is written when it is full."""

    def __init__(self, shard: Path) -> None:
        self._shard, self._files, self._held = shard, 0, 0
        self._tensors: dict[str, Tensor] = {}
        # one block: small tensors kept between large ones that go would scatter the heap
        self._room = torch.empty(_FLUSH, dtype=torch.uint8, device="cpu")

    def add(self, name: str, start: int, at: Tensor, values: Tensor) -> None:
        """Values of a chunk that the sum does not give, and their places in the chunk."""
        if not len(at):
            return
        needed = at.nbytes + values.nbytes + 16
        if self._held + needed > len(self._room):
            self.flush()
            if needed > len(self._room):
                self._room = self._room.new_empty(needed)
        self._tensors[f"{name}/{start}/at"] = self._kept(at)
        self._tensors[f"{name}/{start}/is"] = self._kept(values)

    def _kept(self, value: Tensor) -> Tensor:
        """A copy in the block, which begins at a multiple of 8 bytes."""
        room = self._room[self._held : self._held + value.nbytes]
        room.copy_(value.view(torch.uint8))
        self._held += -(-value.nbytes // 8) * 8
        return room.view(value.dtype)

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
    """The corrections beside one shard, read.  Use as a context.

    Raises:
        ValueError: a damaged file.
    """

    def __init__(self, shard: Path) -> None:
        paths = _corrections_of(shard)
        self._reader = Reader(paths, mmap=False)

    def __enter__(self) -> "Corrections":
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.close()

    def apply(self, name: str, start: int, chunk: Tensor) -> None:
        """Put a chunk right, in place.

        Raises:
            ValueError: places or values that do not fit the chunk.
        """
        key = f"{name}/{start}"
        if f"{key}/at" not in self._reader.specs or f"{key}/is" not in self._reader.specs:
            return
        at, values = (self._reader.read(f"{key}/{own}") for own in ("at", "is"))
        fits = at.dtype == torch.int32 and values.dtype == chunk.dtype and at.shape == values.shape
        if not fits or at.dim() != 1 or not bool(((at >= 0) & (at < len(chunk))).all()):
            raise ValueError(f"{self._reader.file_of[key + '/at']}: {key:.80} fits no chunk of it")
        chunk[at.long()] = values
