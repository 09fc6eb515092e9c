"""Adds a delta to its base, tensor by tensor."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from minipeft.io.bitsandbytes import checkpoint
from minipeft.io.bitsandbytes.plan import Ignore
from minipeft.io.delta.chunks import Base, chunks_of, is_finite, is_zero, total, wider
from minipeft.io.delta.make import (
    Path_,
    bar_over,
    check_places,
    files_left,
    record_of,
    write_index,
)
from minipeft.io.delta.pairs import paired
from minipeft.io.delta.record import (
    KEY,
    Corrections,
    DeltaReport,
    entries_in,
    report_of,
)
from minipeft.io.fields import parse_object
from minipeft.io.header import Spec, bytes_of, digest, digest_of, nbytes
from minipeft.io.shards import Reader, ShardWriter, split
from minipeft.io.unfinished import copy_others, is_finished, working_for

RECORD = ".apply_delta.json"
APPLIED = "minipeft_applied"  # in the result's metadata: the sha256 of each tensor's delta


def apply_delta(
    base: Path_,
    delta: Path_,
    out: Path_,
    *,
    rows: str | None = None,
    published_sum: float | None = None,
    tolerance: float = 0.01,
    ignore: Ignore = (),
    max_shard_bytes: int = 10**9,
    progress: bool | None = None,
) -> DeltaReport:
    """Write base + delta, the tuned model: in every bit, if `make_delta` made the delta.

    `base` and `delta` are folders or files, as for make_delta; so are `out`, `rows`, `ignore`, the
    memory and what becomes of an interrupted call.  The other files (config, tokeniser) are the
    delta's.  Sums are taken in float32 (float64 where the weights are).

    A delta of ours holds the sha256 of each tensor of base and result: a base of another version,
    or one that the delta was added to already, is refused, and so is a result that is not the tuned
    model.  It knows its `rows` itself.  A foreign delta (Vicuna, Alpaca) holds no such thing:
    names, shapes, NaN and Inf are checked, the result has the wider dtype of the two, and `rows`
    must be named where rows are new.  A base that `apply_delta` wrote with the same delta is
    refused then too; one that was saved by another program since cannot be told from the true base:
    compare the published sum of all numbers, `published_sum` within `tolerance` (Alpaca-7B:
    50637.1836, 0.01), taken in float64 or, as Alpaca's script does, in float32, tensor by tensor.

    Raises:
        ValueError: as of make_delta; another base, a delta added already, another sum.
        OSError: the disk is full, and the like.

    `out` does not exist then; whole shards stay in `<out>.unfinished`, as of make_delta.
    """
    base, delta, out = Path(base), Path(delta), Path(out)
    check_places(out, {"base": base, "delta": delta}, max_shard_bytes)
    with _Sums(base, delta, rows, ignore) as sums:
        sizes = {name: nbytes(spec) for name, spec in sums.specs.items()}
        expected = {file: {name: sums.specs[name] for name in own}
                    for file, own in split(sizes, max_shard_bytes).items()}  # fmt: skip
        sources = {"base": sums.bases, "delta": sums.deltas}
        record = record_of(sources, (expected, sums.rows))
        if is_finished(out, RECORD, record):
            found = _check_sum(out, published_sum, tolerance)
        else:
            with working_for(out, RECORD, record) as folder:
                with bar_over(expected, "adding the delta", progress) as bar:
                    for file in files_left(folder, expected, bar):
                        own = expected[file]
                        applied = dict.fromkeys(own, "0" * 64)
                        with ShardWriter(
                            folder / file, own, metadata={APPLIED: json.dumps(applied)}
                        ) as writer:
                            for name in own:
                                applied[name] = sums.write(name, writer)
                                bar.update(sizes[name])
                            writer.metadata[APPLIED] = json.dumps(applied)
                            writer.finish()
                if delta.is_dir():
                    copy_others(delta, folder, but=(RECORD,))
                write_index(folder, expected)
                found = _check_sum(folder, published_sum, tolerance)
        return sums.report(found)


def check_delta(
    base: Path_, delta: Path_, *, rows: str | None = None, ignore: Ignore = ()
) -> DeltaReport:
    """Do all that `apply_delta` does but writing: whether the delta is whole and of this base.

    Raises:
        ValueError: as of apply_delta.
    """
    with _Sums(Path(base), Path(delta), rows, ignore) as sums:
        for name in sums.specs:
            sums.write(name, None)
        return sums.report(None)


class _Sums:
    """A base and a delta, checked side by side, and the sum of each tensor.

    Raises:
        ValueError: they do not belong together.
    """

    def __init__(self, base: Path, delta: Path, rows: str | None, ignore: Ignore) -> None:
        with ExitStack() as held:
            self.bases = held.enter_context(
                checkpoint.open_weights(base, mmap=False, pickled=True)
            )  # fmt: skip
            self.deltas = held.enter_context(
                checkpoint.open_weights(delta, mmap=False, pickled=True)
            )  # fmt: skip
            self.entries, said, self._chunk = entries_in(self.deltas)
            if self.entries:
                if rows is not None and rows != said:
                    raise ValueError(f"{delta}: was made with rows={said!r}; rows={rows!r} given")
                rows = said
            self.rows = rows
            if swapped := [path for path, own in self.bases.metadata.items() if KEY in own]:
                raise ValueError(f"{swapped[0]}: is a delta; expected the base; are they swapped?")
            names = paired(self.bases, self.deltas, rows, ignore, what="delta",
                           may_have_rows=bool(self.entries))  # fmt: skip
            self.specs = {name: self._spec(name) for name in names}
            self._applied: dict[Path, dict[str, object]] = {}
            for path, metadata in self.bases.metadata.items():
                text = metadata.get(APPLIED, "{}").encode()
                self._applied[path] = parse_object(text, f"{path}: {APPLIED}")
            self._held, self._beside = held.pop_all(), ExitStack()
            self._shard: Path | None = None  # whose corrections are open

    def __enter__(self) -> "_Sums":
        return self

    def __exit__(self, *error: object) -> None:
        self._beside.close()
        self._held.close()

    def _spec(self, name: str) -> Spec:
        """dtype and shape of a result."""
        dtype, shape = self.deltas.specs[name]
        if name in self.entries:
            return self.entries[name].dtype, shape
        return wider(self.bases.specs[name][0], dtype), shape

    def report(self, found: float | None) -> DeltaReport:
        """What was done; `found`: the sum of all numbers, if it was asked for."""
        numbers = sum(math.prod(shape) for _, shape in self.specs.values())
        if not self.entries:
            return DeltaReport(len(self.specs), numbers, exact=False, total=found)
        entries = {name: self.entries[name] for name in self.specs}
        done = report_of(entries, numbers)
        return DeltaReport(done.tensors, numbers, True, done.changed, done.largest, found)

    def write(self, name: str, writer: ShardWriter | None) -> str:
        """Write one tensor's sum, or only compute it; returns the digest of its delta."""
        first, delta = self.bases.view(name), self.deltas.view(name)
        added = self._check_base(name, first, delta)
        spec, base = self.specs[name], Base(first, self.specs[name][1], self.rows)
        parts = self._parts(name, base, delta.reshape(-1), spec[0])
        if writer is None:
            total_of = digest_of(spec)
            for part in parts:
                total_of.update(bytes_of(part))
            made = total_of.hexdigest()
        else:
            made = writer.write_parts(name, parts)
        if name in self.entries and made != self.entries[name].tuned:
            raise ValueError(
                f"{self.deltas.file_of[name]}: {name:.80}: base + delta has the sha256 {made}; "
                f"expected the tuned model's, {self.entries[name].tuned}: a file of corrections is "
                "missing or of another delta; get the delta again"
            )
        return added

    def _check_base(self, name: str, first: Tensor, delta: Tensor) -> str:
        """Refuse another base, and one that has the delta already; returns the delta's digest."""
        added = self.deltas.checksum(name) or digest(delta)
        file = self.bases.file_of[name]
        twice = (
            f"{file}: {name:.80} is the result of adding this delta already; pass the base that it "
            "was made from"
        )
        if self._applied[file].get(name) == added and not is_zero(delta):
            raise ValueError(twice)
        if name in self.entries:
            entry, found = self.entries[name], self.bases.checksum(name) or digest(first)
            if found != entry.base:
                if found == entry.tuned:
                    raise ValueError(twice)
                raise ValueError(
                    f"{file}: {name:.80} has the sha256 {found}; {self.deltas.file_of[name]} was "
                    f"made from {entry.base}: the base is of another version or dtype, or damaged; "
                    "get the one that the delta was made from"
                )
        return added

    def _corrections(self, name: str) -> Corrections:
        """The corrections beside the shard of a tensor; those of one shard are open at a time."""
        shard = self.deltas.file_of[name]
        if shard != self._shard:
            self._beside.close()
            self._open, self._shard = self._beside.enter_context(Corrections(shard)), shard
        return self._open

    def _parts(self, name: str, base: Base, delta: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        corrections = self._corrections(name) if name in self.entries else None
        for start, stop in chunks_of(len(delta), self._chunk):
            made = total(base.chunk(start, stop), delta[start:stop], dtype)
            if corrections is not None:
                corrections.apply(name, start, made)
            if not is_finite(made):
                raise ValueError(
                    f"{self.deltas.file_of[name]}: {name:.80}: base + delta is NaN or Inf; the "
                    f"base is in {self.bases.file_of[name]}; one of the two is damaged"
                )
            yield made


def _check_sum(folder: Path, published: float | None, tolerance: float) -> float | None:
    """The sum of all numbers of a result, in float64, where one was published.

    Raises:
        ValueError: neither that nor the sum in float32 is the published one.
    """
    if published is None:
        return None
    exact, plain = 0.0, torch.zeros((), dtype=torch.float32, device="cpu")
    with checkpoint.open_weights(folder, mmap=False) as reader:
        for name in reader.specs:
            found = _sum(reader, name)
            exact += found
            plain += found
    if min(abs(exact - published), abs(float(plain) - published)) <= tolerance:
        return exact
    raise ValueError(
        f"{folder}: the sum of all numbers is {exact:.4f} ({float(plain):.4f} added in float32); "
        f"expected published_sum={published} within {tolerance}: the base or the delta is another "
        "one, the delta was added already, or rows= is not what its authors did; delete this "
        "folder, and call again with the right ones"
    )


def _sum(reader: Reader, name: str) -> float:
    flat = reader.view(name).reshape(-1)
    return math.fsum(float(flat[a:b].double().sum()) for a, b in chunks_of(len(flat)))
