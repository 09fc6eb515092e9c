"""Makes a delta of two checkpoints, tensor by tensor."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minipeft.adapters.progress import Progress
from minipeft.io.bitsandbytes import checkpoint
from minipeft.io.bitsandbytes.plan import Ignore
from minipeft.io.delta.chunks import (
    CHUNK,
    Base,
    chunks_of,
    difference,
    is_finite,
    total,
    where_bits_differ,
)
from minipeft.io.delta.pairs import paired, place_of
from minipeft.io.delta.record import (
    KEY,
    CorrectionWriter,
    DeltaReport,
    Entry,
    entries_in,
    report_of,
    text_of,
)
from minipeft.io.header import Spec, digest, nbytes
from minipeft.io.replace import write_file
from minipeft.io.shards import Reader, ShardWriter, split
from minipeft.io.unfinished import (
    check_room,
    copy_others,
    is_done,
    is_finished,
    state_of,
    working_for,
)

RECORD = ".make_delta.json"
Path_ = str | os.PathLike[str]


def make_delta(
    base: Path_,
    tuned: Path_,
    out: Path_,
    *,
    dtype: torch.dtype | None = None,
    rows: str | None = None,
    ignore: Ignore = (),
    max_shard_bytes: int = 10**9,
    progress: bool | None = None,
) -> DeltaReport:
    """Write tuned - base, from which `apply_delta` and the base make the tuned model in every bit.

    `base` and `tuned` are folders or files: safetensors, or pickled (io/pickled.py) where there are
    no such; of several files the index says which.  `out` becomes a folder of safetensors files
    with an index, and with the tuned model's other files (config, tokeniser, licence).  The
    difference is taken in float32 (float64 where the weights are) and rounded to `dtype`, None: the
    tuned tensor's own, as published deltas are.  Numbers that base + delta does not give are kept
    beside it (record.py): the report says how many, and by how much they are off for programs that
    only add.  Of 16-bit weights those are up to some percent (of numbers that more than double or
    change their sign), which dtype=torch.float32 leaves away at twice the size; of float32 weights
    few or none.

    `rows` says what rows count as that a grown vocabulary has beyond the base's: "zeros" (Vicuna's
    first delta) or the "mean" of the others (Alpaca).  `ignore` leaves tensors out of both.
    Interrupted, the same call goes on after the last whole shard (`max_shard_bytes` each) and ends
    with the same bytes; until then the work lies in `<out>.unfinished`.  Memory: a tensor of either
    checkpoint and 64 MiB.  `progress` shows a bar; None: on a terminal.

    Raises:
        ValueError: names, shapes or kinds of numbers differ; new rows without `rows`; NaN or Inf,
            or a difference that is so in `dtype`; a file that is missing, cut short or damaged; an
            `out` that exists.
        OSError: the disk is full, and the like.

    `out` does not exist then.  Shards that were whole by then (none, where names, shapes or
    settings are refused) stay in `<out>.unfinished`, for the same call or to be deleted.
    """
    base, tuned, out = Path(base), Path(tuned), Path(out)
    check_places(out, {"base": base, "tuned": tuned}, max_shard_bytes)
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"make_delta: dtype={dtype}; expected float32, float16 or bfloat16")
    with (
        checkpoint.open_weights(base, mmap=False, pickled=True) as bases,
        checkpoint.open_weights(tuned, mmap=False, pickled=True) as others,
    ):
        names = paired(bases, others, rows, ignore, what="tuned model")
        specs: dict[str, Spec] = {}
        for name in names:
            own, shape = others.specs[name]
            specs[name] = dtype if dtype and own.is_floating_point else own, shape
        files = split({name: nbytes(specs[name]) for name in names}, max_shard_bytes)
        expected = {file: {name: specs[name] for name in own} for file, own in files.items()}
        record = record_of({"base": bases, "tuned": others}, (expected, rows))
        if not is_finished(out, RECORD, record):
            with working_for(out, RECORD, record) as folder:
                _write(folder, expected, bases, others, rows, progress)
                if tuned.is_dir():
                    copy_others(tuned, folder, but=(RECORD,))
                write_index(folder, expected)
    with checkpoint.open_weights(out, mmap=False) as made:
        numbers = sum(torch.Size(shape).numel() for _, shape in made.specs.values())
        return report_of(entries_in(made)[0], numbers)


def check_places(out: Path, sources: Mapping[str, Path], max_shard_bytes: int) -> None:
    """Raise ValueError for an `out` inside a source, or shards of no bytes."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}; expected at least 1")
    for name, source in sources.items():
        if out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{out}: lies in {name}={source}, which is never written to")


def record_of(sources: Mapping[str, Reader], settings: object) -> dict[str, object]:
    """What one run does: its sources, by sizes and times of files, and its settings."""
    states = {name: [str(place_of(reader)), state_of(set(reader.file_of.values()))]
              for name, reader in sources.items()}  # fmt: skip
    return {**states, "settings": hashlib.sha256(repr(settings).encode()).hexdigest()}


def write_index(folder: Path, expected: Mapping[str, Mapping[str, Spec]]) -> None:
    """The index, where there are several files."""
    if len(expected) > 1:
        sizes = {name: nbytes(spec) for own in expected.values() for name, spec in own.items()}
        write_file(folder / checkpoint.INDEX, checkpoint.index_text(expected, sizes))


def files_left(
    folder: Path, expected: Mapping[str, Mapping[str, Spec]], bar: Progress
) -> list[str]:
    """The shards that an earlier run has not finished; there is room for them."""
    left = [file for file, own in expected.items() if not is_done(folder / file, own, mmap=False)]
    sizes = {file: sum(map(nbytes, own.values())) for file, own in expected.items()}
    check_room(folder, sum(sizes[file] for file in left))
    bar.update(sum(sizes[file] for file in expected if file not in left))
    return left


def bar_over(expected: Mapping[str, Mapping[str, Spec]], desc: str, shown: bool | None) -> Progress:
    """A progress bar over the bytes to write."""
    total = sum(nbytes(spec) for own in expected.values() for spec in own.values())
    return Progress(total=total, desc=desc, unit="B", unit_scale=True, shown=shown)


def _write(
    folder: Path, expected: Mapping[str, Mapping[str, Spec]], bases: Reader, others: Reader,
    rows: str | None, progress: bool | None,
) -> None:  # fmt: skip
    """The shards that are not there yet, each after its corrections."""
    with bar_over(expected, "making the delta", progress) as bar:
        for file in files_left(folder, expected, bar):
            own = expected[file]
            entries = {n: Entry(others.specs[n][0]) for n in own}
            corrections = CorrectionWriter(folder / file)
            with ShardWriter(folder / file, own, metadata={KEY: text_of(entries, rows)}) as writer:
                for name in own:
                    entries[name] = _write_tensor(writer, corrections, bases, others, name, rows)
                    bar.update(nbytes(own[name]))
                corrections.flush()
                writer.metadata[KEY] = text_of(entries, rows)
                writer.finish()


def _write_tensor(
    writer: ShardWriter, corrections: CorrectionWriter, bases: Reader, others: Reader, name: str,
    rows: str | None,
) -> Entry:  # fmt: skip
    """One tensor's difference and corrections; the tensors that it reads go with its frame."""
    first, tuned = bases.view(name), others.view(name)
    dtype, shape = writer.specs[name]
    base, flat = Base(first, shape, rows), tuned.reshape(-1)
    changed, largest = 0, 0.0

    def parts() -> Iterator[Tensor]:
        nonlocal changed, largest
        for start, stop in chunks_of(len(flat), CHUNK):
            before, after = base.chunk(start, stop), flat[start:stop]
            delta = difference(before, after, dtype)
            if not is_finite(delta):
                raise ValueError(_not_finite(bases, others, name, before, after, dtype))
            again = total(before, delta, tuned.dtype)
            at = where_bits_differ(again, after)
            if len(at):
                places = at.long()
                off = again[places].double() - after[places].double()
                changed, largest = changed + len(at), max(largest, float(off.abs().max()))
                corrections.add(name, start, at, after[places])
            yield delta

    writer.write_parts(name, parts())
    return Entry(
        tuned.dtype, bases.checksum(name) or digest(first),
        others.checksum(name) or digest(tuned), changed, largest,
    )  # fmt: skip


def _not_finite(
    bases: Reader, others: Reader, name: str, before: Tensor, after: Tensor, dtype: torch.dtype
) -> str:
    for reader, chunk in ((bases, before), (others, after)):
        if not is_finite(chunk):
            return f"{reader.file_of[name]}: {name:.80} holds NaN or Inf; is the file damaged?"
    return (
        f"{others.file_of[name]}: {name:.80} differs from the base by more than {dtype} can hold; "
        "pass dtype=torch.float32"
    )
