"""A 16-bit checkpoint made a 4-bit one, tensor by tensor: memory does not grow with the model.

The work is done shard by shard in `<destination>.unfinished`, see unfinished.py.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from minipeft.adapters.progress import Progress
from minipeft.adapters.protocol import linear_shape
from minipeft.adapters.targets import Head, HeadWarning, Names, likely_head, survey
from minipeft.io.bitsandbytes import checkpoint
from minipeft.io.bitsandbytes.plan import Ignore
from minipeft.io.bitsandbytes.weight import entries
from minipeft.io.bitsandbytes.work import Work, not_theirs, work_for
from minipeft.io.header import Spec, nbytes
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
from minipeft.model.peft_words import in_our_words
from minipeft.model.quantize import Skip
from minipeft.nf4 import check_block_size
from minipeft.qlora import NF4Linear

PROGRESS = ".quantize_checkpoint.json"


@in_our_words
def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    skip: Skip = (),
    block_size: int = 64,
    double_quant: bool = True,
    max_shard_bytes: int = 10**9,
    progress: bool | None = None,
    mmap: bool = True,
    head: Head = None,
    ignore: Ignore = (),
) -> Names:
    """Write the 4-bit copy of a checkpoint in 16 or 32 bits, one tensor in memory at a time.

    `source` is a directory with config.json and safetensors files.  `model`, on the meta device,
    says which weights `quantize_model` would quantise, `head` as there; by default it is built from
    config.json with transformers.  The result is what `save_quantized` writes: it loads with
    `load_quantized` and with transformers + bitsandbytes, but for layers that `.notes` names (a
    subclass of nn.Linear).  Other files (tokeniser, licence) are copied.

    Tensors keep the source's names, which transformers' own tables lead to the model's; where these
    split or join a weight that becomes 4-bit, the model's names are written, which are read too.
    `ignore` leaves out tensors that the model lacks: as in `load_quantized`.

    Interrupted, the same call goes on after the last whole shard (`max_shard_bytes` each) and ends
    with the same bytes.  `destination` appears when all is done; until then the work lies in
    `<destination>.unfinished`.  Needs about the largest packed tensor and 64 MiB of memory beside
    the mapped source; with `mmap=False`, for disks on a network, nothing is mapped, and it needs
    the largest tensor of the source too.  `progress` shows a bar; None: on a terminal.  Returns
    the names of the 4-bit layers; `.left_out` says what stayed dense and why.

    Raises:
        ValueError: a source that is damaged, quantised already or another model's: it lacks tensors
            of the model, or has others (those that the model's class ignores are copied); weights
            that are not finite (file, tensor and index are named); a destination that exists.
        OSError: the disk is full, and the like; the destination does not exist then.
    """
    source, destination = Path(source), Path(destination)
    check_block_size("quantize_checkpoint", block_size)
    if max_shard_bytes < 1:
        raise ValueError(f"quantize_checkpoint: max_shard_bytes={max_shard_bytes}")
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory; expected the local folder of a checkpoint")
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{destination}: lies in {source}, which is never written to")
    config = checkpoint.config_of(source)
    if config.get("quantization_config") is not None:
        raise ValueError(f"{source / checkpoint.CONFIG}: is quantised already")
    if model is None:
        from minipeft.integrations.transformers.meta import meta_model

        model = meta_model(source)
    with checkpoint.open_weights(source, mmap=mmap) as reader:
        work = work_for(model, reader, skip, block_size, double_quant, head, ignore)
        notes = likely_head(survey(model, head), work.wanted)
        for name, note in notes.items():
            warnings.warn(f"{name} is made 4-bit, and {note}", HeadWarning, stacklevel=3)
        notes |= not_theirs(model, work.wanted)
        sizes = {key: sum(map(nbytes, made.values())) for key, made in work.becomes.items()}
        files = split(sizes, max_shard_bytes)
        expected = {
            file: {name: spec for key in keys for name, spec in work.becomes[key].items()}
            for file, keys in files.items()
        }
        described = hashlib.sha256(
            repr((sorted(work.weights.items()), expected)).encode()
        ).hexdigest()
        record: dict[str, object] = {
            "source": state_of(set(reader.file_of.values())),
            "settings": described,
        }
        names = Names(work.wanted, work.left_out, notes=notes)
        if is_finished(destination, PROGRESS, record):
            return names
        with (
            working_for(destination, PROGRESS, record) as directory,
            Progress(total=sum(map(nbytes, reader.specs.values())), desc="quantising", unit="B",
                     unit_scale=True, shown=progress) as bar,
        ):  # fmt: skip
            left = {file for file in files
                    if not is_done(directory / file, expected[file], mmap=mmap)}  # fmt: skip
            check_room(directory, sum(sizes[key] for file in left for key in files[file]))
            for file, keys in files.items():
                if file in left:
                    _write(directory / file, expected[file], keys, work, reader, bar)
                else:
                    bar.update(sum(nbytes(reader.specs[own]) for key in keys
                                   for own in work.steps[key]))  # fmt: skip
            _finish(directory, source, config, model, work, expected)
    return names


def _write(
    path: Path,
    expected: Mapping[str, Spec],
    keys: list[str],
    work: Work,
    reader: Reader,
    bar: Progress,
) -> None:
    with ShardWriter(path, expected) as writer:
        for key in keys:
            found = {own: reader.view(own) for own in work.steps[key]}
            made = work.joined[key](found) if key in work.joined else found
            for name, tensor in made.items():
                if name not in work.weights:
                    writer.write(name, tensor)
                    continue
                settings, turned = work.weights[name]
                try:
                    layer = NF4Linear.from_weight(
                        tensor.T if turned else tensor, block_size=settings.block_size,
                        double_quant=settings.double_quant,
                    )  # fmt: skip
                except ValueError as error:
                    raise ValueError(f"{reader.file_of[key]}: {name}: {error}") from error
                for own, value in entries(name, layer).items():
                    writer.write(own, value)
            bar.update(sum(nbytes(reader.specs[own]) for own in work.steps[key]))
        writer.finish()


def _finish(
    directory: Path,
    source: Path,
    config: dict[str, object],
    model: nn.Module,
    work: Work,
    expected: Mapping[str, Mapping[str, Spec]],
) -> None:
    """Everything but the weights, config.json last."""
    copy_others(source, directory, but=(checkpoint.CONFIG, PROGRESS))
    if len(expected) > 1:
        sizes = {name: nbytes(spec) for own in expected.values() for name, spec in own.items()}
        write_file(directory / checkpoint.INDEX, checkpoint.index_text(expected, sizes))
    dense = [n for n, m in model.named_modules() if n not in work.wanted and linear_shape(m)]
    first = next(iter(work.weights.values()))[0]
    config["quantization_config"] = checkpoint.quantization_config(
        quant_type="nf4", double_quant=first.double_quant, dense=dense, compute_dtype=first.dtype
    )
    write_file(directory / checkpoint.CONFIG, checkpoint.config_text(config))
