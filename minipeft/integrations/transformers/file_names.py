"""Names of tensors in checkpoint files, and the names that the model has for them.

transformers renames tensors while it loads a checkpoint, and joins or splits some: one tensor for
each expert becomes one for all.  What it does is in its own tables (`conversion_mapping`), which
are asked here for the model at hand.  A model that is none of transformers' has one name for both.

    found = read_names(model, own, keys)      what becomes of a file's tensors
    found.names                               {name in the file: name in the model}
    found.joined                              tensors of the model that are made of several, or one
    write_names(model, own, names)            {name in the model: name in the file}
    ModuleNames(model, names).find(name)      the module that the file of an adapter calls so
"""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Joined:
    """Tensors of the model that transformers computes from one or more tensors of the file."""

    first: str  # the model's name for the first of them
    sources: dict[str, list[str]]  # transformers' pattern: names in the file, in their order
    converter: Any  # transformers' WeightConverter, never changed
    model: Any

    @property
    def keys(self) -> list[str]:
        """The names in the file."""
        return [key for keys in self.sources.values() for key in keys]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move the values of the file's tensors into the model's, as transformers does.

        Works on any dtype and on the meta device: values are moved, and none is computed.

        Raises:
            ValueError: transformers cannot: tensors are missing, or have other shapes.
        """
        converter = deepcopy(self.converter)
        for pattern, keys in self.sources.items():
            for key in keys:
                converter.add_tensor(self.first, key, pattern, tensors[key])
        try:
            made = converter.convert(self.first, model=self.model, config=self.model.config)
        except Exception as error:  # whatever the operations of transformers meet
            counts = {pattern: len(keys) for pattern, keys in self.sources.items()}
            raise ValueError(
                f"{self.first}: transformers cannot make it of {self.keys[0]} and the like "
                f"({counts}): {error}; is a tensor missing?"
            ) from error
        return {n: v[0] if isinstance(v, list) else v for n, v in made.items()}

    def keeps(
        self, shape: Sequence[int], shapes: Mapping[str, Sequence[int]] | None = None
    ) -> bool:
        """Whether this is one tensor that stays as it is if its shape in the file is this one.

        transformers turns some weights only where a file has them the other way round.  `shapes`
        are those of the model's tensors, where the model itself holds codes in their place.
        """
        if len(self.keys) != 1:
            return False
        join = self if shapes is None else replace(self, model=_Shapes(self.model.config, shapes))
        tensor = torch.empty(tuple(shape), device="meta")
        try:
            made = join({self.keys[0]: tensor})
            return made.keys() == {self.first} and made[self.first] is tensor
        except ValueError:
            return False


class _Shapes:
    """As much of a model as transformers' converters ask for: its configuration, and shapes."""

    def __init__(self, config: Any, shapes: Mapping[str, Sequence[int]]) -> None:
        self.config, self._shapes = config, shapes

    def get_parameter(self, name: str) -> Tensor:
        """A tensor of this parameter's shape."""
        return torch.empty(tuple(self._shapes[name]), device="meta")


class Reading(NamedTuple):
    """What becomes of a file's tensors."""

    names: dict[str, str]  # name in the file: name in the model
    joined: list[Joined]
    ignored: dict[str, str]  # name in the file: why the model can do without it
    unknown: dict[str, str]  # name in the file: the name looked for, which the model lacks


def _is_transformers_own(model: nn.Module) -> bool:
    """Whether the model is one of transformers' classes, asked without importing transformers."""
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def read_names(
    model: nn.Module, own: Collection[str], keys: Iterable[str],
    shape: Callable[[str], Sequence[int]] | None = None,
) -> Reading:  # fmt: skip
    """What becomes of the tensors called `keys`; `own` are the names of the model's own tensors.

    With `shape`, of a key, a tensor that transformers would only look at is in `names`.

    Raises:
        ValueError: two tensors of the file would become the same one of the model.
    """
    if not _is_transformers_own(model):
        names = {key: key for key in keys if key in own}
        return Reading(names, [], {}, {key: key for key in keys if key not in own})
    from transformers.core_model_loading import dot_natural_key

    table, own = _table(model), dict.fromkeys(own, True)
    found = Reading({}, [], {}, {})
    groups: dict[str, dict[str, list[str]]] = {}
    for key in sorted(keys, key=dot_natural_key):  # experts in the order of their numbers
        name, pattern = _renamed(model, own, key, table)
        if name not in own:
            found.unknown[key] = name
        elif pattern is None:
            found.names[key] = name
        else:
            groups.setdefault(name, {}).setdefault(pattern, []).append(key)
    for name, sources in groups.items():
        converter = table.by_pattern[next(iter(sources))]
        join = Joined(name, sources, converter, model)
        if shape is not None and len(join.keys) == 1 and join.keeps(shape(join.keys[0])):
            found.names[join.keys[0]] = name
        else:
            found.joined.append(join)
    _refuse_two_for_one(found)
    for key, reason in _ignorable(model, own, found.unknown).items():
        found.ignored[key] = reason
        del found.unknown[key]
    return found


class _Table(NamedTuple):
    """transformers' table for one model."""

    renamings: list[Any]
    converters: list[Any]
    by_pattern: dict[str, Any]  # the converter of each pattern


def _table(model: Any) -> _Table:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    table = _Table([], [], {})
    for transform in _transforms(model):
        if isinstance(transform, WeightRenaming):
            table.renamings.append(transform)
        elif isinstance(transform, WeightConverter):
            table.converters.append(transform)
            table.by_pattern.update(dict.fromkeys(transform.source_patterns, transform))
    return table


def _transforms(model: Any, *, legacy: bool = True) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model, add_legacy=legacy))


def _renamed(model: Any, own: dict[str, bool], key: str, table: _Table) -> tuple[str, str | None]:
    """The model's name for a key, and the pattern of the converter that takes it, if one does."""
    from transformers.core_model_loading import rename_source_key

    found: tuple[str, str | None] = rename_source_key(
        key, table.renamings, table.converters, model.base_model_prefix, own
    )
    # transformers' rule: a name that the model has is taken as it is where the tables lead nowhere
    return (key, None) if found[0] not in own and key in own else found


def _refuse_two_for_one(found: Reading) -> None:
    taken: dict[str, str] = {}
    pairs = [*found.names.items(), *((join.keys[0], join.first) for join in found.joined)]
    for key, name in pairs:
        if name in taken:
            raise ValueError(
                f"{taken[name]} and {key} are both {name} in the model; name the one that is not "
                "wanted in ignore="
            )
        taken[name] = key


def _ignorable(model: Any, own: Collection[str], unknown: Mapping[str, str]) -> dict[str, str]:
    """Tensors of the file that the model can do without, and why."""
    declared = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    computed = {name for name, _ in model.named_buffers() if name not in own}
    # layers of older versions had a copy each of what the model now computes once
    declared += [
        rf"(^|\.){re.escape(end)}$" for end in ("rotary_emb.inv_freq", "position_ids")
        if any(name.endswith(end) for name, _ in model.named_buffers())
    ]  # fmt: skip
    expression = re.compile("|".join(f"({pattern})" for pattern in declared)) if declared else None
    reasons = {}
    for key, name in unknown.items():
        if name in computed:
            reasons[key] = "a buffer that the model computes"
        elif expression is not None and expression.search(name):
            reasons[key] = f"{type(model).__name__} declares it ignorable"
    return reasons


def write_names(
    model: nn.Module, own: Collection[str], names: Iterable[str],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, str]:  # fmt: skip
    """The names in a file for `names`, some of the model's own: those that transformers writes.

    A tensor that transformers would split or join keeps the model's name, which transformers and
    minipeft read as well.  Each name is proved: read again, it is the tensor that it stands for.
    `shapes` of the dense tensors are needed for those that transformers may turn.

    Raises:
        ValueError: no name for a tensor leads back to it.
    """
    plain = {name: name for name in names}
    if not _is_transformers_own(model):
        return plain
    failed = ""
    for candidates in (_reverted(model, plain), plain):
        keys = dict(candidates)
        for _ in range(2):  # the second time with the model's own names where the first failed
            try:
                found = read_names(model, own, keys.values())
            except ValueError as error:
                failed = str(error)
                break
            kept = {
                join.first for join in found.joined
                if shapes and keys.get(join.first) == join.keys[0]
                and join.first in shapes and join.keeps(shapes[join.first], shapes)
            }  # fmt: skip
            wrong = [name for name, key in keys.items()
                     if found.names.get(key) != name and name not in kept]  # fmt: skip
            if not wrong:
                return keys
            read = found.names.get(keys[wrong[0]], "nothing alone")
            failed = f"{wrong[0]}, written as {keys[wrong[0]]}, would be read as {read}"
            keys |= {name: name for name in wrong}
    raise ValueError(
        f"{type(model).__name__}: transformers' table of names cannot be inverted ({failed}); "
        "keep the state dict under the model's own names instead"
    )


def _reverted(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The names that transformers' tables, read backwards, give; not proved."""
    from transformers.core_model_loading import PrefixChange, WeightConverter

    keys = {name: name for name in names}
    try:
        backwards = [transform.reverse_transform()
                     for transform in reversed(_transforms(model, legacy=False))
                     if not isinstance(transform, PrefixChange)]  # fmt: skip
    except Exception:  # a table with no way back; the model's own names are tried next
        return keys
    converters = [t for t in backwards if isinstance(t, WeightConverter)]
    renamings = [t for t in backwards if not isinstance(t, WeightConverter)]
    for name in keys:
        if any(converter.rename_source_key(name)[1] is not None for converter in converters):
            continue
        for renaming in renamings:
            keys[name] = renaming.rename_source_key(keys[name])[0]
    return keys


def may_lack(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the model's tensors that its class says a file may lack: it can compute them."""
    declared = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    if not declared or not _is_transformers_own(model):
        return []
    expression = re.compile("|".join(f"({pattern})" for pattern in declared))
    return [name for name in names if expression.search(name)]


class ModuleNames:
    """Names of modules in files that hold no whole weights, as adapters' files: by their weights.

    `names` are the model's own modules.  A module whose weight transformers joins with others has
    no name of its own in the model, so it is not found.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model, self._own = model, {f"{name}.weight": True for name in names}
        self._table: _Table | None = None

    def find(self, name: str) -> str | None:
        """The model's module that a file calls `name`, by transformers' table; None: there is none.

        The table is asked only for names that the model lacks.
        """
        found, pattern = self._asked(name)
        return found.removesuffix(".weight") if pattern is None and found in self._own else None

    def joined(self, name: str) -> str | None:
        """The model's tensor that the weight of module `name` is a part of, if it is in the table.

        transformers joins experts so: `experts.3.w1` is a part of `experts.gate_up_proj`.
        """
        found, pattern = self._asked(name)
        return None if pattern is None else found

    def _asked(self, name: str) -> tuple[str, str | None]:
        key = f"{name}.weight"
        if not _is_transformers_own(self._model) or key in self._own:
            return "", None
        if self._table is None:
            self._table = _table(self._model)
        return _renamed(self._model, self._own, key, self._table)

    def in_files(self) -> dict[str, str]:
        """For the model's modules whose name in files differs: {name in the model: in files}.

        Modules that hold others are left out.

        Raises:
            ValueError: transformers' table cannot be inverted.
        """
        if not _is_transformers_own(self._model):
            return {}
        modules = [name.removesuffix(".weight") for name in self._own]
        holders = {name.rpartition(".")[0] for name in modules}
        own = {f"{name}.weight": True for name in modules if name not in holders}
        return {
            name.removesuffix(".weight"): key.removesuffix(".weight")
            for name, key in write_names(self._model, own, own).items() if name != key
        }  # fmt: skip
