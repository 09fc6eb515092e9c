"""JSON that somebody else wrote: read from a file, and its fields checked against a table.

A table gives each field a `Kind`: what is expected in words, and a test of the value.

>>> check("a.json", {"rank": 8}, {"rank": whole(1)})
>>> check("a.json", {"rank": True}, {"rank": whole(1)})
Traceback (most recent call last):
ValueError: a.json: rank is True, expected a whole number of at least 1
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from minipeft.io.replace import current

# PEFT's fields that say where an adapter is from and how it was made; they change no number.
ORIGIN = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Such fields of other trainers (Unsloth, ms-swift, PEFT before 0.3, LoRA+).
ORIGIN_ELSEWHERE = {
    "unsloth_fixed", "unsloth_version", "lora_dtype", "merge_weights", "lorap_lr_ratio",
    "lorap_emb_lr", "loraplus_lr_ratio", "loraplus_lr_embedding", "base_model_class",
    "parent_library", "torch_dtype", "transformers_version", "library_name",
}  # fmt: skip
LARGEST = 2**24  # bytes of a configuration; real ones have a few thousand
_LARGEST_NUMBER = 2**31


class Kind(NamedTuple):
    """Values that a field may have."""

    expected: str
    fits: Callable[[object], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str))
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind(
    "a number", lambda value: type(value) in (int, float) and abs(value) < _LARGEST_NUMBER  # type: ignore[arg-type]
)  # fmt: skip
NAMES = Kind(
    "a list of names",
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
)


def whole(least: int, below: int = _LARGEST_NUMBER) -> Kind:
    """Whole numbers from `least` to below `below`, written without a fraction: 4.0 is refused."""
    upper = "" if below == _LARGEST_NUMBER else f" and below {below}"
    return Kind(
        f"a whole number of at least {least}{upper}",
        lambda value: type(value) is int and least <= value < below,
    )


def one_of(*values: object) -> Kind:
    """These values, of the same types: `true` is not 1."""
    return Kind(
        f"one of {list(values)}" if len(values) > 1 else repr(values[0]),
        lambda found: any(type(found) is type(value) and found == value for value in values),
    )


def list_of(kind: Kind) -> Kind:
    """Lists of such values."""
    return Kind(
        f"a list, each {kind.expected}",
        lambda value: isinstance(value, list) and all(map(kind.fits, value)),
    )


def either(*kinds: Kind) -> Kind:
    """Values of any of these kinds."""
    return Kind(
        " or ".join(kind.expected for kind in kinds),
        lambda value: any(kind.fits(value) for kind in kinds),
    )


def optional(kind: Kind) -> Kind:
    """Values of this kind, and null."""
    return Kind(kind.expected, lambda value: value is None or kind.fits(value))


def is_off(value: object) -> bool:
    """Whether a field with this value is not used: null, false, or empty."""
    return value is None or value is False or value in ([], {}, "")


def check(
    where: str, found: Mapping[str, object], table: Mapping[str, Kind], needed: Iterable[str] = ()
) -> None:
    """Check those fields of the table that `found` has; fields outside the table are not looked at.

    Raises:
        ValueError: a field is of another kind, or one of those `needed` is absent.
    """
    for key, kind in table.items():
        if (key in found or key in needed) and not kind.fits(value := found.get(key)):
            raise ValueError(f"{where}: {key:.80} is {value!r:.80}, expected {kind.expected}")


def read_object(path: Path, *, largest: int = LARGEST) -> dict[str, object]:
    """The JSON object in a file, in its place or in a commit that is not finished (replace.py).

    Raises:
        ValueError: no such file, one that cannot be read or has more than `largest` bytes, or no
            JSON object (see parse_object).
    """
    place = current(path)
    try:
        if not place.is_file():
            raise ValueError(f"{path}: no such file")
        if (size := place.stat().st_size) > largest:
            raise ValueError(f"{path}: {size} bytes are too many for such a file")
        return parse_object(place.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


def read_config(path: Path, writer: str, other: str, reader: str) -> dict[str, object]:
    """The JSON object in a configuration, its fields not checked yet.

    Raises:
        ValueError: as of read_object; where there is no such file, the message says who writes it,
            who reads the `other` configuration if that is there, and which folders in it have one.
    """
    if not current(path).is_file():
        hint, folder = "", path.parent
        inner = sorted(found.parent.name for found in folder.glob(f"*/{path.name}"))
        if not folder.exists():
            hint = "; there is no such folder on this machine, and nothing is downloaded"
            hint += " (huggingface_hub.snapshot_download does that)"
        elif (folder / other).is_file():
            hint = f"; it holds {other}: use {reader}"
        elif inner:
            hint = f"; its folders {inner[:8]} do hold one: pass {str(folder / inner[0])!r}"
        raise ValueError(f"{path}: no such file; expected a directory that {writer} wrote{hint}")
    return read_object(path)


def parse_object(data: bytes, what: str) -> dict[str, object]:
    """A JSON object from bytes.

    Raises:
        ValueError: not JSON, not an object, nested too deeply, or a name that comes twice: readers
            would not agree on its value.
    """
    try:
        value = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found
