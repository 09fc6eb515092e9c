"""A configuration and the weights that were saved with it: the file of weights holds both.

The metadata of a weights file holds the configuration as it was written.  A reader reads the
configuration, then the weights, and compares: it notices when another save came between the two,
and when somebody edited the configuration.  Fields that only say where an adapter comes from may
be edited.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.io.fields import ORIGIN, ORIGIN_ELSEWHERE, is_off, parse_object
from minipeft.io.files import encoded, read_all
from minipeft.io.header import AS_PLAIN
from minipeft.io.replace import NotOneSave, Replacement

_FREE = ORIGIN | ORIGIN_ELSEWHERE | {"model"}  # may be edited
CONFIG, TRAINING = "minipeft_config", "minipeft_training"
_SETS = {"exclude_modules", "modules_to_save", "target_modules", "target_parameters"}


def stage(
    unit: Replacement,
    names: tuple[str, str],
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    training: Mapping[str, object] | None = None,
) -> None:
    """Write a configuration and weights that belong together; `names` are those of the two files.

    `training` is what only further training needs: other readers pass over it.
    """
    more = {CONFIG: json.dumps(config, sort_keys=True)}
    if training:
        more[TRAINING] = json.dumps(training, sort_keys=True)
    unit.write(names[1], encoded(tensors, more))
    unit.write(names[0], json.dumps(config, indent=2, sort_keys=True).encode())


def read_sealed(
    path: Path, config: Mapping[str, Any], config_name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a weights file, and what it says for training (empty: nothing).

    `config` is the content of the configuration beside it, which was read before.

    Raises:
        NotOneSave: the weights were saved with another configuration.
        ValueError: no such file, or a damaged one.
    """
    tensors, metadata = read_all(path)
    if CONFIG in metadata:
        _compare(path, parse_object(metadata[CONFIG].encode(), f"{path}: {CONFIG}"), config,
                 config_name)  # fmt: skip
    if TRAINING not in metadata:
        return tensors, {}
    return tensors, parse_object(metadata[TRAINING].encode(), f"{path}: {TRAINING}")


def _compare(
    path: Path, saved: Mapping[str, object], found: Mapping[str, object], config_name: str
) -> None:
    for key in sorted(saved.keys() | found.keys() - _FREE):
        here, there = found.get(key), saved.get(key)
        if key in _FREE or (is_off(here) and is_off(there)) or _same(key, here, there):
            continue
        raise NotOneSave(
            f"{path}: was saved with {key:.40} = {there!r:.60}, and {config_name} says "
            f"{here!r:.60}: they are of two saves, or the configuration was edited. Take both from "
            f"one save; to load an edited configuration as it is, {AS_PLAIN}"
        )


def _same(key: str, here: object, there: object) -> bool:
    """Whether two values are one; names that PEFT keeps as a set have no order."""
    if key in _SETS and isinstance(here, list) and isinstance(there, list):
        return sorted(map(repr, here)) == sorted(map(repr, there))
    return here == there
