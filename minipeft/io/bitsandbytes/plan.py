"""What becomes of each tensor of a 4-bit checkpoint, decided before a value is read.

names    from the file to the model, by integrations/transformers/file_names.py
places   of 4-bit codes: linear layers, Conv1D, 3-D weights of experts
shapes   of everything, also of what is joined from several tensors
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.adapters.linearity import why_not_replaceable
from minipeft.adapters.protocol import is_conv1d
from minipeft.adapters.targets import compiled, ends_of, survey
from minipeft.integrations.transformers.file_names import Joined, may_lack, read_names
from minipeft.io.bitsandbytes.contents import Contents
from minipeft.io.bitsandbytes.prepared import Prepared, is_sharded
from minipeft.model.quantize import check_experts
from minipeft.qlora import NF4Linear, PackedModule
from minipeft.quantized.experts import NF4Experts

Ignore = str | Iterable[str]
Shape = tuple[int, ...]


class Plan(NamedTuple):
    """Where everything goes.  A name is the model's, a key is the file's."""

    model: Prepared
    own: dict[str, Tensor]  # the model's tensors
    names: dict[str, str]  # of what becomes one tensor of the model: {name: key}
    joined: list[Joined]  # of what becomes others
    places: dict[str, nn.Module | nn.Parameter]  # name of a weight: what takes its codes
    computed: list[str]  # names that no file has, and that the model computes
    ignored: dict[str, str]  # key: why it goes nowhere


def planned(path: Path, model: nn.Module, contents: Contents, ignore: Ignore) -> Plan:
    """The plan for one model and one checkpoint; nothing is changed.

    Raises:
        ValueError: a key has no place in the model, or a name none in the file; two keys for one
            name; a place that takes no codes; another shape; `ignore` fits no key.
    """
    here = Prepared(model)
    own = here.own
    ignored = unwanted(contents.keys, ignore)
    in_model = {key: contents.model_shape(key) for key in contents.keys if key not in ignored}
    try:
        found = read_names(model, own, in_model, in_model.__getitem__)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    experts = survey(model).experts
    for key, name in found.unknown.items():
        if key in contents.coded_keys:
            raise ValueError(
                f"{contents.file(key)}: {key}: the model has no module "
                f"{name.rpartition('.')[0]!r} that takes it; is it another model's? ignore= names "
                "what the model can do without"
            )
    places: dict[str, nn.Module | nn.Parameter] = {}
    shapes: dict[str, tuple[str, Shape]] = {}  # name: a key that it comes from, its shape there
    for key, name in found.names.items():
        shapes[name] = key, contents.shape(key)
        if key in contents.coded_keys:
            places[name] = _place(here, experts, contents, key, name)
        elif name in here.coded:
            raise ValueError(
                f"{contents.file(key)}: {key} is dense, and the model's layer is 4-bit; leave it "
                "dense (skip=, embeddings=), or quantise after a plain load"
            )
    for join in found.joined:
        coded = all(key in contents.coded_keys for key in join.keys)
        for name, shape in _tried(contents, join, own).items():
            if name in here.coded:
                raise ValueError(
                    f"{contents.file(join.keys[0])}: {name}, 4-bit in the model, is made of "
                    f"{join.keys[0]} and the like, whose codes move; inject after load_quantized"
                )
            if name in shapes:
                raise ValueError(
                    f"{contents.file(join.keys[0])}: {name} is made of {join.keys[0]} and the "
                    f"like, and {shapes[name][0]} is {name} too; name one of them in ignore="
                )
            shapes[name] = join.keys[0], shape
            if coded and (name in experts or _is_linear(here, name)):
                places[name] = experts[name] if name in experts else here.owner(name)
    for name, (key, shape) in shapes.items():
        _check_shape(contents, key, name, shape, own[name], places.get(name))
    check_experts("load_quantized", model, [name for name in places if name in experts])
    held = {id(own[name]) for name in shapes if name not in places}
    held |= {id(own[other]) for other in _same_modules(here, places)}
    lacking = [n for n, value in own.items() if n not in places and id(value) not in held]
    computed = may_lack(model, lacking)
    missing, unexpected = sorted(set(lacking) - set(computed)), sorted(found.unknown)
    if missing or unexpected:
        raise ValueError(
            f"{path}: missing {missing[:5]} ({len(missing)} in all), unexpected {unexpected[:5]} "
            f"({len(unexpected)} in all); is the checkpoint another model's? ignore= names what "
            "the model can do without"
        )
    names = {name: key for key, name in found.names.items()}
    return Plan(here, own, names, found.joined, places, computed, {**ignored, **found.ignored})


def unwanted(keys: Iterable[str], ignore: Ignore) -> dict[str, str]:
    """The keys that the caller does not want: an expression, or names and beginnings of names."""
    keys = list(keys)
    if isinstance(ignore, str):
        expression = compiled("ignore", ignore)
        chosen = [key for key in keys if expression.fullmatch(key)]
        unused = [] if chosen else [ignore]
    else:
        entries = list(ignore)
        fits = {entry: [k for k in keys if k == entry or k.startswith(f"{entry}.")]
                for entry in entries}  # fmt: skip
        chosen = [key for found in fits.values() for key in found]
        unused = [entry for entry, found in fits.items() if not found]
    if unused:
        raise ValueError(
            f"ignore: {unused} fit no tensor of the file; it has {sorted(keys)[:3]} and others"
        )
    return dict.fromkeys(chosen, "named in ignore=")


def _is_linear(here: Prepared, name: str) -> bool:
    """Whether a name of the model is the weight of a layer that a 4-bit one can replace."""
    owner, _, own = name.rpartition(".")
    module = here.module(owner)
    if own != "weight":
        return False
    if is_conv1d(module):
        return type(module).__name__ == "Conv1D"
    return isinstance(module, nn.Linear) and why_not_replaceable(module) is None


def _place(
    here: Prepared, experts: Mapping[str, nn.Parameter], contents: Contents, key: str, name: str
) -> nn.Module | nn.Parameter:
    """What takes the codes of a key: a layer, which may be 4-bit already, or a 3-D weight."""
    if name in here.coded:
        return _coded_place(here.coded[name], contents, key)
    if is_sharded(here.own[name]):
        raise ValueError(
            f"{contents.file(key)}: {key} is codes, and the model's {name} is sharded as a dense "
            "weight; call quantize_model or inject_qlora on the meta device, before fully_shard"
        )
    if name in experts:
        return experts[name]
    module = here.owner(name)
    if key in contents.mxfp4 or not _is_linear(here, name):
        raise ValueError(
            f"{contents.file(key)}: {key}: 4-bit codes for a {type(module).__name__}; only "
            "nn.Linear, Conv1D and 3-D weights of experts take them"
        )
    return module


def _coded_place(layer: PackedModule, contents: Contents, key: str) -> PackedModule:
    """A layer that is 4-bit already, if it keeps codes as the file does."""
    if key in contents.mxfp4 or not isinstance(layer, NF4Linear | NF4Experts):
        raise ValueError(
            f"{contents.file(key)}: {key}: these codes cannot go into a {type(layer).__name__} "
            "that is there already; quantise and inject after load_quantized"
        )
    said = contents.settings(key)
    found, own = ((s.block_size, s.double_quant) for s in (said, layer))
    if found != own:
        raise ValueError(
            f"{contents.file(key)}: {key} has block_size={found[0]}, double_quant={found[1]}; the "
            f"model's layer has {own[0]} and {own[1]}: give inject_qlora or quantize_model the "
            "file's"
        )
    return layer


def _tried(contents: Contents, join: Joined, own: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shapes of what is made, by name; made of tensors without values."""
    parts = {key: torch.empty(contents.shape(key), device="meta") for key in join.keys}
    where = contents.file(join.keys[0])
    try:
        made = join(parts)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if lost := sorted(made.keys() - own.keys()):
        raise ValueError(
            f"{where}: {join.keys[0]} and the like become {lost[0]}, which the model lacks; name "
            "them in ignore= if the model can do without"
        )
    return {name: tuple(value.shape) for name, value in made.items()}


def _check_shape(
    contents: Contents, key: str, name: str, shape: Shape, value: Tensor, place: Any
) -> None:
    """Raise ValueError unless a weight has the model's shape, in the layout of its codes."""
    expected = tuple(value.shape)
    if isinstance(place, PackedModule):
        expected = getattr(place, "coded_shape", place.shape)
    elif isinstance(place, nn.Module) and is_conv1d(place):
        expected = expected[::-1]
    elif place is not None and key in contents.mxfp4:
        expected = (expected[0], *expected[:0:-1])
    if shape == expected:
        return
    called = key if key == name else f"{key} ({name} in the model)"
    if place is None:
        raise ValueError(
            f"{contents.file(key)}: {called} has shape {shape}; the model's is {expected}"
        )
    raise ValueError(
        f"{contents.file(key)}: {called}: codes of a weight {shape}; the model's is {expected} "
        "(out, in)"
    )


def _same_modules(here: Prepared, places: Mapping[str, object]) -> list[str]:
    """Other names of weights that take codes, where the model has one module under two names."""
    modules = {id(place) for place in places.values() if isinstance(place, nn.Module)}
    return [
        name for name in here.own
        if name not in places and ends_of(name)[-1] == "weight" and id(here.owner(name)) in modules
    ]  # fmt: skip
