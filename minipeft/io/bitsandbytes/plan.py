"""What becomes of each tensor of a 4-bit checkpoint, decided before a value is read.

    names    from the file to the model by integrations/transformers/file_names.py
    places   of 4-bit codes: linear layers, Conv1D, 3-D weights of experts
    shapes   of everything, also of what is joined from several tensors
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minipeft.adapters.linearity import why_not_replaceable
from minipeft.adapters.protocol import is_conv1d
from minipeft.adapters.targets import compiled, survey
from minipeft.integrations.transformers.file_names import Joined, read_names
from minipeft.io.bitsandbytes.contents import Contents
from minipeft.model.quantize import check_experts

Ignore = str | Iterable[str]


class Plan(NamedTuple):
    """Where everything goes; names of the model, and of the file."""

    own: dict[str, Tensor]  # the model's tensors
    coded: dict[str, str]  # name in the model: 4-bit weight in the file
    dense: dict[str, str]  # name in the model: other tensor in the file
    joined: list[Joined]
    places: dict[str, nn.Module | nn.Parameter]  # what takes codes, by the name of the weight
    ignored: dict[str, str]  # name in the file: why it goes nowhere


def made(
    path: Path, model: nn.Module, contents: Contents, ignore: Ignore, computed: Iterable[str]
) -> Plan:
    """The plan for one model and one checkpoint; nothing is changed.

    `computed` are names of the model's tensors that it can compute where the file has none.

    Raises:
        ValueError: a tensor of the file is nowhere in the model, or one of the model nowhere in
            the file; two for one; a place that takes no codes; another shape; `ignore` names
            nothing.
    """
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    ignored = _named(contents.keys, ignore)
    found = read_names(model, own, [key for key in contents.keys if key not in ignored])
    coded = {name: key for key, name in found.names.items() if key in contents.coded_keys}
    dense = {name: key for key, name in found.names.items() if name not in coded}
    experts = survey(model).experts
    places: dict[str, nn.Module | nn.Parameter] = {}
    for key in [key for key in found.unknown if key in contents.coded_keys]:
        module, _, _ = found.unknown[key].rpartition(".")
        raise ValueError(
            f"{contents.file(key)}: {key}: the model has no module {module!r} with such a weight; "
            "is it another model's? ignore=[...] names what is not wanted"
        )
    for name, key in coded.items():
        places[name] = _place(model, experts, name, key)
        _check_shape(contents, places[name], name, key, own[name])
    for name, key in dense.items():
        _check_equal(contents, key, name, contents.shape(key), own[name])
    for join in found.joined:
        for name, value in _tried(contents, join, own).items():
            with_codes = name in experts or name.endswith(".weight")
            if with_codes and any(key in contents.coded_keys for key in join.keys):
                places[name] = _place(model, experts, name, join.keys[0])
            dense.setdefault(name, join.keys[0]) if name not in places else None
            _check_equal(contents, join.keys[0], name, tuple(value.shape), own[name])
    raise NotImplementedError(path, computed)
