"""Adapters merged one after the other, each onto what those before it made.

Chinese-Alpaca is two LoRAs over LLaMA: the first brings a vocabulary of 49,953 rows, the second one
of 49,954.  Merged in another order, or one of them twice, the model computes something else and
nothing raises.  So all that the files say is compared before the first number changes.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import stacks
from minipeft.adapters.protocol import innermost, is_packed
from minipeft.adapters.ready import check_model
from minipeft.adapters.state import named_adapters
from minipeft.adapters.targets import shared_parameters, survey
from minipeft.adapters.wrapper import stored_parameter
from minipeft.inject import restoring
from minipeft.io.fields import read_config
from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME, checked
from minipeft.io.peft.folder import read_weights
from minipeft.io.peft.load import load_peft
from minipeft.io.peft.located import Located, locate
from minipeft.io.peft.matched import matched
from minipeft.io.peft.training import PLAIN, parsed
from minipeft.io.replace import read_whole
from minipeft.model.merge import remove
from minipeft.model.vocabulary import Tables, extend_vocabulary, find_tables, owners

_SUM = "any order gives the same sum"
_UNKNOWN = "not known: nothing in the files says what came first"
_FACTORS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}


@dataclass(frozen=True)
class MergeStep:
    """One adapter that was merged.

    `largest_change` is that of any number in the weights, as they are stored; of new rows, the
    largest number.  Rows are None where the model has no table of tokens.
    """

    folder: str
    layers: int
    largest_change: float
    rows_before: int | None
    rows_after: int | None
    order: str  # how the order was checked, or that it cannot be


@dataclass(frozen=True)
class MergeReport:
    """What `merge_in_order` did; as text, a table."""

    steps: tuple[MergeStep, ...]

    def __str__(self) -> str:
        rows = [("folder", "layers", "largest change", "vocabulary", "order")]
        for step in self.steps:
            sizes = "-" if step.rows_before is None else f"{step.rows_before} > {step.rows_after}"
            rows.append((step.folder, str(step.layers), f"{step.largest_change:.3g}", sizes,
                         step.order))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


@dataclass(frozen=True)
class _File:
    """What a folder says, without its tensors."""

    folder: Path
    digest: str  # of the factors; of all tensors where there are none
    sums: bool  # low-rank factors alone, which add up in any order
    nothing: bool  # all products are zero
    base: str  # the name of the base model, where it is recorded
    rows_before: int | None  # of a table that these new rows lie behind, where it is recorded
    rows_after: int | None  # of its table: exact, or the least for the ids of trained tokens
    exact: bool
    whole: frozenset[str]  # tables that are in it with all rows, or new rows alone


def merge_in_order(
    model: nn.Module, folders: Sequence[str | os.PathLike[str]], *, same_base: bool = True
) -> MergeReport:
    """Merge adapters that PEFT or minipeft saved into the model, the first of `folders` first.

    Where a file has tables of more rows than the model, or rows for new tokens, the model's table
    and head grow first, and its numbers (`vocab_size`) with them.  Each adapter is rounded to the
    weights' dtype before the next one comes, as if it were merged and saved; 4-bit layers that an
    adapter changes become dense.  The report says of each what it changed, and whether the order
    could be checked: sizes of the vocabulary tell it, low-rank sums alone have none.  While it runs
    the weights that adapters change are there twice.

    Raises:
        TypeError: model is no module.
        ValueError: no folder; a file that load_peft would refuse; the same LoRA twice; one that
            changes nothing; a vocabulary that is smaller than the one before; rows of new tokens
            that the file lacks; names of different base models (`same_base=False` goes on); a model
            that has adapters.  The model is then as it was.
    """
    check_model("merge_in_order", model)
    if isinstance(folders, str | os.PathLike) or not list(folders):
        raise ValueError(f"merge_in_order: folders={folders!r}; expected a list of folders")
    if has := list(named_adapters(model)):
        raise ValueError(
            f"merge_in_order: the model has an adapter already ({has[0]}); merge it "
            "(minipeft.remove(model, merge=True)) or take it off first"
        )
    paths = [Path(folder) for folder in folders]
    files = [read_whole(path, lambda path=path: _read(model, path)) for path in paths]  # type: ignore[misc]
    _check(files, same_base=same_base)
    tables = _tables(model)
    sizes = _check_sizes(files, tables, None if tables is None else _rows(model, tables))
    before = [(owner, dict(vars(owner))) for _, way, owner in owners(model) if way]
    try:
        with restoring(model):
            own = {id(parameter) for parameter in model.parameters()}
            steps = [
                _merge(model, files, number, sizes[number], own) for number in range(len(files))
            ]
    except BaseException:
        for config, values in before:
            vars(config).clear()
            vars(config).update(values)
        raise
    return MergeReport(tuple(steps))


def _tables(model: nn.Module) -> Tables | None:
    try:
        return find_tables("merge_in_order", survey(model))
    except ValueError:  # no table of tokens, or a head that is none
        return None


def _rows(model: nn.Module, tables: Tables) -> int:
    count: int = innermost(model.get_submodule(tables.table)).num_embeddings  # type: ignore[assignment]
    return count


def _read(model: nn.Module, folder: Path) -> _File:
    content = read_config(folder / CONFIG_NAME, "PEFT or save_peft", "prefix_config.json",
                          "load_prefix")  # fmt: skip
    config = checked(content)
    tensors, training = read_weights(folder, content)
    where = str(folder / WEIGHTS_NAME)
    found = locate(model, tensors, where)
    ids = matched(config, found, CONFIG_NAME)
    training_of = parsed(training, where)
    roles = {name: found.keys[name].role for name in tensors}
    factors = {name: t for name, t in tensors.items() if roles[name] in _FACTORS}
    exact, least, whole = set[int](), set[int](), set[str]()
    before: int | None = None
    for name, key in found.keys.items():
        if not _is_table(found, key.module):
            continue
        value = tensors[name]
        if key.role == "tokens":
            numbers = ids.token_ids(key.module) or [0]
            least.add(max(numbers) + 1)
            own = training_of.get(key.module, PLAIN).rows_before
            before = own if own is not None else before
            if numbers == list(range(min(numbers), max(numbers) + 1)):
                whole.add(key.module)
        elif key.role in ("plain", "base") and key.part == "weight":
            exact.add(len(value))
            if key.role == "plain":
                whole.add(key.module)
        elif key.role == "lora_embedding_A":
            exact.add(value.shape[1])
        elif key.role == "lora_B":
            exact.add(len(value))
    if len(exact) > 1:
        raise ValueError(f"{where}: tables of {sorted(exact)} rows; expected one vocabulary")
    if config.tied:
        whole |= {other for name in list(whole) for other in found.tied(name)}
    sizes = exact or least
    return _File(
        folder, _digest(factors or tensors),
        sums=len(factors) == len(tensors) and not config.dora,
        nothing=len(factors) == len(tensors) and not _products(found, factors),
        base=str(content.get("base_model_name_or_path") or ""),
        rows_before=before, rows_after=max(sizes, default=None), exact=bool(exact),
        whole=frozenset(whole),
    )  # fmt: skip


def _is_table(found: Located, name: str) -> bool:
    return bool(name) and name in found.modules and (
        id(innermost(found.modules[name])) in found.vocabulary
    )  # fmt: skip


def _digest(tensors: dict[str, Tensor]) -> str:
    sum_of = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sum_of.update(f"{name.removeprefix('base_model.model.')} {tuple(value.shape)}".encode())
        sum_of.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sum_of.hexdigest()


def _products(found: Located, factors: dict[str, Tensor]) -> bool:
    """Whether any product of factors may differ from zero: one factor of each is not all zero."""
    pairs: dict[Any, list[bool]] = {}
    for name, value in factors.items():
        key = found.keys[name]
        place = (key.module, key.part, key.depth)
        pairs.setdefault(place, []).append(bool(value.any()))
    return any(all(pair) for pair in pairs.values())


def _check(files: Sequence[_File], *, same_base: bool) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        if file.nothing:
            raise ValueError(
                f"merge_in_order: {file.folder} changes nothing: each of its products is zero (B "
                "is zero before training); is it the adapter that was trained?"
            )
        if file.digest in seen:
            raise ValueError(
                f"merge_in_order: {file.folder} holds the same LoRA as {seen[file.digest]}; merged "
                "twice it would count twice: name it once"
            )
        seen[file.digest] = file.folder
    bases = {file.base: file.folder for file in files if file.base}
    if same_base and len(bases) > 1:
        (one, first), (two, second), *_ = bases.items()
        raise ValueError(
            f"merge_in_order: {first} was trained over {one!r} and {second} over {two!r}; if these "
            "are copies of one model, or the second came from merging the first, pass "
            "same_base=False"
        )


def _check_sizes(
    files: Sequence[_File], tables: Tables | None, rows: int | None
) -> list[tuple[int | None, int | None]]:
    """The rows before and after each file."""
    if tables is None or rows is None:
        return [(None, None)] * len(files)
    sizes: list[tuple[int | None, int | None]] = []
    start = rows
    for file in files:
        before, after = file.rows_before, file.rows_after
        resized = rows == start and after is not None and after <= rows  # before it all
        if before is not None and before != rows and not resized:
            raise ValueError(_out_of_order(file, files, f"new rows behind {before}", rows))
        if after is None or (not file.exact and after <= rows):
            sizes.append((rows, rows))
            continue
        if after < rows:
            raise ValueError(_out_of_order(file, files, f"a vocabulary of {after} rows", rows))
        wanted = {tables.table, *([tables.head] if tables.head else [])}
        if after > rows and (lacks := sorted(wanted - file.whole - _follows(file, tables))):
            raise ValueError(
                f"merge_in_order: {file.folder} has {after} rows, the model {rows}, and the file "
                f"lacks the new rows of {lacks}; call model.resize_token_embeddings({after}) first"
            )
        sizes.append((rows, after))
        rows = after
    return sizes


def _follows(file: _File, tables: Tables) -> set[str]:
    """The tied head, where the file's new rows are trained tokens: PEFT's follow the table."""
    trains_tokens = not file.exact and tables.table in file.whole
    return {str(tables.head)} if tables.tied and trains_tokens else set()


def _out_of_order(file: _File, files: Sequence[_File], has: str, rows: int) -> str:
    known = [other for other in files if other.rows_after is not None]
    by_size = [str(f.folder) for f in sorted(known, key=lambda f: f.rows_after or 0)]
    remedy = f"by their sizes the order is {by_size}"
    if by_size == [str(f.folder) for f in files]:
        remedy = "an adapter is missing before it, or the model is another"
    return (
        f"merge_in_order: {file.folder} has {has}, and when its turn comes the model has {rows} "
        f"rows: it follows a model of another size; {remedy}"
    )


def _merge(
    model: nn.Module, files: Sequence[_File], number: int, sizes: tuple[int | None, int | None],
    own: set[int],
) -> MergeStep:  # fmt: skip
    file, (before, after) = files[number], sizes
    if before is not None and after is not None and after > before and file.rows_before is None:
        extend_vocabulary(model, after - before)  # the file has values for all of them
        if file.exact:
            _alone(model, own)
            remove(model, merge=True)
    layers = load_peft(model, file.folder)
    change = _largest_change(model)
    if change == 0:
        raise ValueError(
            f"merge_in_order: {file.folder} changes no number of the weights, as they are stored"
        )
    _alone(model, own)
    remove(model, merge=True)
    if before is not None and before != after:
        order = "known by its vocabulary"
    elif len(files) == 1 or all(other.sums for other in files):
        order = _SUM if len(files) > 1 else "the only one"
    else:
        order = _UNKNOWN
    return MergeStep(str(file.folder), len(layers), change, before, after, order)


def _alone(model: nn.Module, own: set[int]) -> None:
    """Give dense bases parameters that folding may write to: the model's own come back on errors.

    A weight that two modules share stays, for `remove` to refuse.
    """
    shared = shared_parameters(model)
    for stack in stacks(model).values():
        plain = innermost(stack[0])  # type: ignore[arg-type]
        if is_packed(plain):
            continue
        for module in plain.modules():
            for name, value in module._parameters.items():
                if value is not None and id(value) in own and id(value) not in shared:
                    copied = nn.Parameter(value.detach().clone(), requires_grad=False)
                    module._parameters[name] = copied


def _largest_change(model: nn.Module) -> float:
    largest = 0.0
    with torch.no_grad():
        for stack in stacks(model).values():
            layer: Any = stack[0]
            plain = innermost(layer)
            for name, value in layer.effective_parameters().items():
                old = stored_parameter("merge_in_order", plain, name)
                shared = value[: len(old)].float() - old.float()
                parts = [shared, value[len(old) :].float()]
                largest = max(largest, *(float(p.abs().max()) for p in parts if p.numel()))
    return largest
