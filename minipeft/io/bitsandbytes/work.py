"""What becomes of each tensor of a checkpoint that is made 4-bit, decided before the work."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import is_conv1d
from minipeft.adapters.targets import Head, survey
from minipeft.integrations.transformers.file_names import Joined, may_lack, read_names
from minipeft.io.bitsandbytes.plan import Ignore, unwanted
from minipeft.io.bitsandbytes.weight import Settings, specs
from minipeft.io.header import Spec
from minipeft.io.shards import Reader
from minipeft.model.quantize import Skip, quantizable

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Work(NamedTuple):
    """What is to be written: in steps, by the first key of each in the source."""

    steps: dict[str, list[str]]  # the keys that a step reads: one, or those of a Joined
    joined: dict[str, Joined]  # steps that join or split
    weights: dict[str, tuple[Settings, bool]]  # what becomes 4-bit, and whether it is turned first
    becomes: dict[str, dict[str, Spec]]  # what a step writes
    wanted: list[str]  # modules that become 4-bit
    left_out: dict[str, str]


def work_for(
    model: nn.Module, reader: Reader, skip: Skip, block_size: int, double_quant: bool, head: Head,
    ignore: Ignore,
) -> Work:  # fmt: skip
    """Find every tensor of the source in the model, and decide what becomes of it.

    A tensor keeps its name in the source.  Where transformers splits or joins tensors of which one
    becomes 4-bit, the model's own names are written, which are read as well.
    """
    folder = next(iter(reader.file_of.values())).parent
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    chosen, left_out = quantizable(survey(model, head), skip=skip)
    modules = {f"{name}.weight": module for name, module in chosen.items()}
    ignored = unwanted(reader.specs, ignore)
    try:
        keys_left = [key for key in reader.specs if key not in ignored]
        found = read_names(model, own, keys_left, lambda key: reader.specs[key][1])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    shapes = {name: reader.specs[key][1] for key, name in found.names.items()}
    keys = {name: key for key, name in found.names.items()}
    joins = {join.keys[0]: join for join in found.joined}
    made = {first: _joined_specs(join, reader) for first, join in joins.items()}
    for first, specs_made in made.items():
        shapes |= {name: shape for name, (_, shape) in specs_made.items()}
        keys |= dict.fromkeys(specs_made, first)
    for name, shape in shapes.items():
        if name not in own or shape != tuple(own[name].shape):
            raise ValueError(
                f"{reader.file_of[keys[name]]}: {keys[name]} has shape {shape}; the model's is "
                f"{tuple(own[name].shape) if name in own else None}"
                + ("" if keys[name] == name else f" ({name})")
            )
    _check_all_there(folder, model, own, set(shapes), found.unknown, sorted(reader.specs))
    weights: dict[str, tuple[Settings, bool]] = {}
    work = Work({}, {}, weights, {}, [], left_out)
    for key, spec in reader.specs.items():
        if key in found.names:
            name = found.names[key]
            codes = _codes_for(key, modules.get(name), spec, block_size, double_quant, reader)
            if codes is not None:
                weights[key] = codes
                work.wanted.append(name.removesuffix(".weight"))
            work.steps[key] = [key]
            work.becomes[key] = {key: spec} if codes is None else specs(key, codes[0])
        elif key in made and any(name in modules for name in made[key]):
            work.steps[key], work.joined[key] = joins[key].keys, joins[key]
            work.becomes[key] = {}
            for name, made_spec in made[key].items():
                codes = _codes_for(key, modules.get(name), made_spec, block_size, double_quant,
                                   reader)  # fmt: skip
                if codes is not None:
                    weights[name] = codes
                    work.wanted.append(name.removesuffix(".weight"))
                work.becomes[key] |= {name: made_spec} if codes is None else specs(name, codes[0])
    inside = {key for keys in work.steps.values() for key in keys} | set(ignored)
    for key in reader.specs:  # experts that stay dense, and what the model's class ignores
        if key not in inside:
            work.steps[key], work.becomes[key] = [key], {key: reader.specs[key]}
    order = {name.removesuffix(".weight"): place for place, name in enumerate(modules)}
    work.wanted.sort(key=order.__getitem__)  # as the model has them, not the files
    left_out |= ignored
    if not weights:
        raise ValueError(f"quantize_checkpoint: nothing to quantise; left out: {left_out}")
    return work


def _joined_specs(join: Joined, reader: Reader) -> dict[str, Spec]:
    """What transformers makes of several tensors: dtypes and shapes by the model's names."""
    parts = {key: torch.empty(reader.specs[key][1], dtype=reader.specs[key][0], device="meta")
             for key in join.keys}  # fmt: skip
    try:
        return {name: (value.dtype, tuple(value.shape)) for name, value in join(parts).items()}
    except ValueError as error:
        raise ValueError(f"{reader.file_of[join.keys[0]]}: {error}") from error


def _check_all_there(
    folder: Path, model: nn.Module, own: Mapping[str, Tensor], names: set[str],
    unknown: Mapping[str, str], keys: list[str],
) -> None:  # fmt: skip
    """Raise ValueError unless source and model have the same tensors, a tied one at least once."""
    held = {id(own[name]) for name in names}
    lacking = [name for name, value in own.items() if id(value) not in held]
    missing = sorted(set(lacking) - set(may_lack(model, lacking)))
    if missing:
        raise ValueError(
            f"{folder}: no {missing[:3]} ({len(missing)} in all); the files have {keys[:3]}: pass "
            "the model that they belong to"
        )
    if unknown:
        raise ValueError(
            f"{folder}: {sorted(unknown)[:3]} ({len(unknown)} in all) are nowhere in the model; "
            "pass the model that they belong to, or leave them out by ignore="
        )


def _codes_for(
    key: str, module: object, spec: Spec, block_size: int, double_quant: bool, reader: Reader
) -> tuple[Settings, bool] | None:
    """How a module's weight is coded, and whether it is turned first; None if it stays dense."""
    if not isinstance(module, nn.Module):  # 3-D parameters are taken on request only
        return None
    dtype, shape = spec
    if dtype not in _FLOATS:
        raise ValueError(f"{reader.file_of[key]}: {key} is {dtype}; expected a 16-bit float")
    turned = is_conv1d(module)
    return Settings(
        shape[::-1] if turned else shape, dtype, block_size, "nf4", double_quant
    ), turned


def not_theirs(model: nn.Module, names: list[str]) -> dict[str, str]:
    """A note for layers that become 4-bit and that transformers with bitsandbytes leaves dense."""
    kinds = {name: type(model.get_submodule(name)) for name in names}
    return {
        name: f"a {kind.__name__}: transformers with bitsandbytes has 4-bit layers for nn.Linear "
        "and Conv1D only, and will not load this checkpoint"
        for name, kind in kinds.items() if kind is not nn.Linear and kind.__name__ != "Conv1D"
    }  # fmt: skip
