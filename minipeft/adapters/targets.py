"""Which modules of a model a `target` names; an error says what is wrong with it.

"all-linear"                 every linear layer but the output head
r".*\\.(q|v)_proj"            a regular expression that matches the full name
["q_proj", "layers.0.up"]    names, or dotted ends of names; an entry that is the full name of a
                             module means that module alone: ["1"] does not mean 0.1
lambda name, module: ...     a predicate

"all-linear" and quantising leave out the output head: what `get_output_embeddings` returns, or in a
model of your own what `head=` names.
"""

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Set
from typing import Any, NamedTuple, TypeVar

from torch import nn

from minipeft.adapters.protocol import LinearShape, innermost, is_adapter, is_packed, linear_shape

Target = str | Iterable[str] | Callable[[str, nn.Module], bool]
# names (or modules) of the output head: one, several, () for none; None: not said
Head = str | nn.Module | Iterable[str | nn.Module] | None
Number = TypeVar("Number", int, float)

# what transformers calls the new, untrained heads of its classes
NEW_HEADS = ("score", "classifier", "classification_head", "qa_outputs", "lm_head", "cls")
NEW_HEAD = "a new head; train_modules trains it as a whole"


class Names(list[str]):
    """Names of modules that were touched; `left_out` says which others were not, and why.

    `made` says what was made in the place of each name, and by which patterns; `notes` says of some
    names what you may want otherwise; `report()` shows everything.
    """

    def __init__(
        self,
        names: Iterable[str],
        left_out: Mapping[str, str] | None = None,
        made: Mapping[str, str] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(names)
        self.left_out, self.made = dict(left_out or {}), dict(made or {})
        self.notes = dict(notes or {})

    def report(self) -> str:
        """A line for each name, for each one left out, and for each note."""
        rows = [(name, self.made.get(name, "")) for name in self]
        rows += [(name, f"left out: {why}") for name, why in self.left_out.items()]
        rows += [(name, f"note: {note}") for name, note in self.notes.items()]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in rows)


def visible_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every submodule by each of its names, but nothing inside an adapter layer."""
    found: dict[str, nn.Module] = {}
    hidden: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if hidden and name.startswith(hidden):
            continue
        if name:
            found[name] = module
        if is_adapter(module):
            hidden = (f"{name}." if name else "",)
    return found


class HeadWarning(UserWarning):
    """A layer that looks like the output head was made 4-bit, or a new head stays frozen."""


class Survey(NamedTuple):
    """What there is in a model to choose from: asked once, then handed on to all who choose."""

    model: nn.Module
    modules: dict[str, nn.Module]  # `visible_modules`
    shapes: dict[str, LinearShape]  # of those that are linear layers
    experts: dict[str, nn.Parameter]  # 3-D weights of mixtures of experts: (experts, rows, columns)
    everything: dict[str, Any]  # modules and experts
    in_attention: dict[str, str]  # linear layers that nn.MultiheadAttention never calls
    heads: dict[str, str]  # output heads, and why each is one
    naming: list[str]  # modules that have get_output_embeddings
    shared: set[int]  # `shared_parameters`
    head: Head  # what the caller said of heads


def survey(model: nn.Module, head: Head = None) -> Survey:
    """Look over a model once; ask again after modules were swapped.

    An output head is what `get_output_embeddings()` returns; in models that have that method,
    modules with one of transformers' names for new heads count too.  `head` names others: of each,
    with all that is inside, and none for ().

    Raises:
        ValueError: `head` names no module of the model.
    """
    modules = visible_modules(model)
    parts = {"": model, **modules}
    naming = [n for n, m in parts.items() if callable(getattr(m, "get_output_embeddings", None))]
    experts, heads = _expert_weights(parts), _heads_known(parts, naming)
    inside = "inside nn.MultiheadAttention, which never calls it"
    return Survey(
        model, modules, {n: shape for n, m in modules.items() if (shape := linear_shape(m))},
        experts, {**modules, **experts},
        {_path(name, "out_proj"): inside for name, module in parts.items()
         if isinstance(module, nn.MultiheadAttention)},
        {**heads, **_heads_said(modules, head), **heads}, naming,
        shared_parameters(model), head,
    )  # fmt: skip


def shared_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters that two or more modules hold (tied embeddings)."""
    held = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {number for number, holders in held.items() if holders > 1}


def _path(name: str, own: str) -> str:
    return f"{name}.{own}" if name else own


def _expert_weights(parts: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {
        _path(name, own): parameter
        for name, module in parts.items()
        if not type(module).__module__.startswith("torch.nn")  # convolutions, attention
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
        and parameter.shape[0] > 1
        and parameter.is_floating_point()
        and not is_adapter(module)
    }


def _heads_known(parts: Mapping[str, Any], naming: Iterable[str]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for path in naming:
        output, within = parts[path].get_output_embeddings(), _path(path, "")
        for name, module in parts.items():
            if output is not None and module is output:
                reasons[name] = "the output head (get_output_embeddings)"
            elif name.startswith(within) and name[len(within) :].split(".")[0] in NEW_HEADS:
                reasons.setdefault(name, NEW_HEAD)
    return reasons


def _heads_said(modules: Mapping[str, nn.Module], head: Head) -> dict[str, str]:
    entries = () if head is None else [head] if isinstance(head, str | nn.Module) else list(head)
    chosen: set[str] = set()
    for entry in entries:
        if isinstance(entry, nn.Module):
            what, found = f"a {type(entry).__name__}", [n for n, m in modules.items() if m is entry]
        else:
            what, found = repr(entry), [n for n in modules if entry in ends_of(n)]
            found = [entry] if entry in modules else found
        if not found:
            raise ValueError(f"head: {what} is no module of the model; {_hint(modules)}")
        chosen.update(found)
    return {name: "the output head (head=)" for name in modules if is_within(name, chosen)}


def likely_head(places: Survey, touched: Iterable[str]) -> dict[str, str]:
    """A note for a layer among these names that looks like the head of a model that names none.

    Layers of a trunk feed each other, so their sizes recur.  A head has as many outputs as no other
    layer has inputs or outputs, and is the last linear layer, or has one for each row of a table.
    """
    if places.head is not None or "" in places.naming:
        return {}
    modules = places.modules
    shapes = {id(modules[name]): shape for name, shape in places.shapes.items()}
    tables = {
        (m.num_embeddings, m.embedding_dim)
        for m in map(innermost, modules.values()) if isinstance(m, nn.Embedding)
    }  # fmt: skip
    sizes = Counter(size for s in shapes.values() for size in {s.in_features, s.out_features})
    last = next(reversed(shapes), None) if len(shapes) > 1 else None
    notes = {}
    for name in touched:
        own = shapes.get(id(modules.get(name)))
        if own is None or is_within(name, places.naming):
            continue
        recurs = sizes[own.out_features] > 1
        is_last = id(modules[name]) == last
        if not recurs and (is_last or (own.out_features, own.in_features) in tables):
            notes[name] = (
                f"looks like the output head: {own.out_features} outputs, as no other layer has; "
                f"pass head={name!r} to leave it as it is, or head=() if the model has none"
            )
    return notes


def frozen_heads(places: Survey, chosen: Set[str]) -> dict[str, str]:
    """A note for each new head of a model with a task that no adapter trains, by name.

    transformers starts such a head at random, so that its model is of no use until it is trained.
    None where the model has an adapter already, or `head=` was given: the caller knows the head.
    """
    modules, heads = places.modules, places.heads
    if places.head is not None or any(map(is_adapter, modules.values())):
        return {}
    notes = {}
    for name, why in heads.items():
        own, inside = name.rpartition(".")[2], [n for n in modules if is_within(n, [name])]
        is_new = why == NEW_HEAD and own in NEW_HEADS and own != "lm_head"
        pretrained = any(heads.get(n, why) != why for n in inside)  # the output head is in it
        if is_new and not pretrained and chosen.isdisjoint(inside):
            notes[name] = (
                f"is a new head, and stays frozen: minipeft.train_modules(model, [{own!r}]) trains "
                f"it, and head={own!r} says that it is to stay as it is"
            )
    return notes


def matches(target: Target, name: str, module: nn.Module | nn.Parameter) -> bool:
    """Whether one name is meant: full-match expression, name or dotted end, or predicate."""
    if callable(target):
        return bool(target(name, module))  # type: ignore[arg-type]
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in target)


def ends_of(name: str) -> list[str]:
    """The name and its dotted ends: of "a.b.c" also "b.c" and "c"."""
    return [name, *(name[i + 1 :] for i, letter in enumerate(name) if letter == ".")]


def is_within(name: str, outer: Container[str]) -> bool:
    """Whether the module of this name, or one that it lies in, is among these names."""
    return name in outer or any(name[:i] in outer for i, c in enumerate(name) if c == ".")


def compiled(caller: str, expression: str) -> re.Pattern[str]:
    """The regular expression; ValueError if this is not one."""
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{caller}: {expression!r} is no regular expression ({error}); names go in a list"
        ) from None


class Targets(NamedTuple):
    """What a target stands for, by name."""

    chosen: dict[str, Any]
    left_out: dict[str, str]  # by "all-linear", with the reason
    notes: dict[str, str]  # what the caller may want otherwise


def find(places: Survey, target: Target, *, caller: str = "target") -> Targets:
    """Every module, and every 3-D weight of experts, that `target` names, by name.

    In PEFT's lists each entry is the end of names; here an entry that is a full name means that
    module alone, and a note says which names end in it.

    Raises:
        ValueError: nothing matches, a list entry matches nothing, or the expression is broken.
        TypeError: target is neither string, list of strings nor callable.
    """
    modules = places.everything
    if isinstance(target, str):
        compiled(caller, target)
    elif not callable(target):
        return _find_listed(modules, list(target), caller)
    found = {name: module for name, module in modules.items() if matches(target, name, module)}
    if not found:
        hint = _hint(modules)
        if isinstance(target, str) and any(target in ends_of(name) for name in modules):
            hint = f"a string must match the whole name: use [{target!r}] or r'.*\\.{target}'"
        raise ValueError(f"{caller}: {target!r} matches no module of the model; {hint}")
    return Targets(found, {}, {})


def _find_listed(modules: Mapping[str, Any], entries: list[str], caller: str) -> Targets:
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise TypeError(f"{caller}: expected a non-empty list of names, got {entries!r}")
    by_end: dict[str, list[str]] = {}
    for name in modules:
        for end in ends_of(name):
            by_end.setdefault(end, []).append(name)
    if unmatched := [entry for entry in entries if entry not in by_end]:
        raise ValueError(f"{caller}: {unmatched} match no module; {_hint(modules)}")
    chosen, notes = set(), {}
    for entry in entries:
        chosen.update([entry] if entry in modules else by_end[entry])
        if entry in modules and len(by_end[entry]) > 1:
            others = [name for name in by_end[entry] if name != entry]
            notes[entry] = (
                f"{entry!r} is the full name of a module and means that alone, not {others[:3]} "
                f"({len(others)} in all); r'(.*\\.)?{re.escape(entry)}' means all of them"
            )
    return Targets({name: m for name, m in modules.items() if name in chosen}, {}, notes)


def _hint(modules: Mapping[str, Any]) -> str:
    ends = sorted({name.split(".")[-1] for name, module in modules.items()
                   if isinstance(module, nn.Module) and linear_shape(module)})  # fmt: skip
    return f"its linear layers are called {ends}" if ends else "it has no linear layers"


def adapter_targets(
    places: Survey, target: Target, exclude: Target | None = None, *, stack: bool = False
) -> Targets:
    """Which modules get an adapter.

    "all-linear" takes linear layers and nn.MultiheadAttention, whose projections are linear, but
    no output head and no 3-D weights of experts.  `stack` allows modules that have an adapter.

    Raises:
        ValueError: as `find`; a target that is wrapped already, or belongs to
            nn.MultiheadAttention; `exclude` leaves nothing.
    """
    excluded = {} if exclude is None else find(places, exclude, caller="exclude").chosen
    left_out: dict[str, str] = {}
    if isinstance(target, str) and target.lower() == "all-linear":
        chosen = {}
        for name, module in places.modules.items():
            attention = isinstance(innermost(module), nn.MultiheadAttention)
            if name not in places.shapes and not attention:
                continue
            reason = "excluded" if name in excluded else places.heads.get(name)
            if name in places.in_attention and name.rpartition(".")[0] not in excluded:
                continue  # with its attention
            if name.endswith("._orig_mod") and name.removesuffix("._orig_mod") in chosen:
                continue  # what torch.compile made a callable of, which is wrapped as a whole
            if reason:
                left_out[name] = reason
            else:
                chosen[name] = module
        packed = [n for n, m in places.modules.items()
                  if is_packed(m) and len(getattr(m, "shape", ())) == 3]  # fmt: skip
        for name in (*places.experts, *packed):
            left_out[name] = "excluded" if name in excluded else (
                "a 3-D weight of experts, which stays frozen; name it as a target to wrap it"
            )  # fmt: skip
        if not chosen:
            raise ValueError(f"target: 'all-linear' finds none; left out: {left_out}")
        notes = likely_head(places, chosen)
    else:
        try:
            found, _, notes = find(places, target)
        except ValueError:
            if re.sub("[^a-z]", "", str(target).lower()) != "alllinear":
                raise
            raise ValueError(
                f"target: {target!r} matches no module; did you mean 'all-linear', as a string?"
            ) from None
        chosen = {n: m for n, m in found.items() if n not in excluded}
        if not chosen:
            raise ValueError(f"target: exclude={exclude!r} leaves nothing of {target!r}")
    for name, module in chosen.items():
        if is_adapter(module) and not stack:
            raise ValueError(
                f"target: {name!r} already has an adapter ({type(module).__name__}); remove it "
                "first, leave it out with exclude=, or give the new one a name= of its own"
            )
        if name in places.in_attention:
            raise ValueError(
                f"target: {name!r} is {places.in_attention[name]}; name the attention itself"
            )
    return Targets(chosen, left_out, notes)


def settled(caller: str, places: Survey, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen modules under every name that the model has for them.

    Raises:
        ValueError: one of them lies inside another.
    """
    nested = [name for name in chosen if is_within(name.rpartition(".")[0], chosen)]
    if nested:
        raise ValueError(
            f"{caller}: {nested} lie inside other targets; name one or the other (exclude=, skip=)"
        )
    ids = {id(module) for module in chosen.values()}
    return {n: module for n, module in places.everything.items() if id(module) in ids}


class Chosen(NamedTuple):
    """A number for one module, and the pattern that chose it (None: the same for all)."""

    value: Any
    pattern: str | None = None


def per_name(
    what: str, value: Number | Mapping[str, Number] | None, names: Iterable[str]
) -> dict[str, Chosen]:
    """One number for each name: the same for all, or by the first pattern that fits a name.

    A pattern is a full-match expression, a name, or a dotted end of names (if it is no name).

    Raises:
        ValueError: a pattern fits no name, or a name no pattern.
    """
    names = list(names)
    if not isinstance(value, Mapping):
        return {name: Chosen(value) for name in names}
    chosen: dict[str, Chosen] = {}
    used: set[str] = set()
    full = set(names)
    patterns = {pattern: compiled(what, pattern) for pattern in value}
    for name in names:
        ends = {end for end in ends_of(name) if end == name or end not in full}
        fitting = [p for p, pattern in patterns.items() if p in ends or pattern.fullmatch(name)]
        if not fitting:
            raise ValueError(
                f"{what}: no pattern of {list(value)} fits {name!r}; add '.*' last as the default"
            )
        chosen[name] = Chosen(value[fitting[0]], fitting[0])
        used.update(fitting)
    if unused := [pattern for pattern in value if pattern not in used]:
        raise ValueError(f"{what}: patterns {unused} fit none of the targets {names[:5]}...")
    return chosen
