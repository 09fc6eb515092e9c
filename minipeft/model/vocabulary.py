"""A longer vocabulary: rows for new tokens behind a frozen table and behind its head.

    extend_vocabulary(model, 200)                     200 new rows train, all else is frozen
    extend_vocabulary(model, 200, whole_table=True)   the old rows train too (dense tables)

`model.resize_token_embeddings` of transformers makes new tables instead, whose old rows train with
the new ones or not at all.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT, give_name
from minipeft.adapters.protocol import innermost, is_adapter, is_packed, linear_shape, whole
from minipeft.adapters.ready import check_model
from minipeft.adapters.state import named_adapters, refuse_merged
from minipeft.adapters.targets import Names, Survey, Target, find, survey
from minipeft.adapters.wrapper import Wrapper, stored_parameter
from minipeft.inject import after_swap, freeze, restoring, swap_shared
from minipeft.layers.trained import TrainedModule
from minipeft.layers.vocabulary import LongerHead, LongerTable, set_number
from minipeft.model.peft_words import in_our_words
from minipeft.model.rows import refuse_rows

INITS = ("mean", "normal")
Init = str | Tensor | tuple[Tensor, Tensor]
_CALLER = "extend_vocabulary"


class Tables(NamedTuple):
    """The input table of a model and its output head, by name; no head: None."""

    table: str
    head: str | None
    tied: bool  # one weight, or one set of codes


@in_our_words
def extend_vocabulary(
    model: nn.Module,
    rows: int,
    *,
    init: Init = "mean",
    whole_table: bool = False,
    table: Target | None = None,
    head: Target | None = None,
    name: str = DEFAULT,
) -> Names:
    """Add `rows` rows for new tokens behind the input table and the output head; they train.

    The new ids are n, n + 1, ... behind the n rows of the table.  Old rows and old logits keep
    every bit: the base computes as before, and the new ones are put behind.  Tables may be dense or
    NF4; if table and head share a weight, they share the new rows.  The rows are float32 (or
    better) over a 16-bit base, and belong to the adapter called `name`.

    `init` is where they start: "mean" of the old rows; "normal", numbers with the mean and the
    standard deviation of each column; a tensor (rows, dim) for both; or two tensors, for the table
    and the head.  `whole_table` trains the old rows too, by copies (dense tables only).  A
    transformers model names its table and head; in another model `table` and `head` do, `head=()`
    for a model that has none.  Numbers of the vocabulary in the model and its configuration
    (`vocab_size`) become n + rows, as after model.resize_token_embeddings, and n again when the
    rows are taken off.

    `save_peft` writes the new rows alone, as PEFT's trained tokens; `load_peft` puts them behind
    the tables of a model of n rows, or into one of n + rows.  `remove(model, merge=True)` makes one
    plain table of all rows (of NF4, a dense one; requantize=True keeps 4 bits).  Returns the names
    of the modules.

    Raises:
        TypeError: model is no module.
        ValueError: rows below 1; no table, or a head without one; a head with another number of
            rows; a table that another module shares, or that is longer already; a second table of
            as many rows; another init; `whole_table` over 4-bit codes or adapters.  The model is
            then as it was.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    >>> extend_vocabulary(model, 2, table=["0"], head=["1"])
    ['0', '1']
    >>> model(torch.tensor([[3, 11]])).shape
    torch.Size([1, 2, 12])
    """
    check_model(_CALLER, model)
    refuse_merged(_CALLER, named_adapters(model))
    refuse_rows(_CALLER, model)
    try:
        whole(_CALLER, "rows", rows)
    except ValueError as error:
        raise ValueError(f"{error}: a vocabulary only grows here") from None
    places = survey(model)
    found = find_tables(_CALLER, places, table, head)
    _check_sharing(places, found)
    _check_second_table(places, found)
    with restoring(model):
        made = _made(places, found, rows, init, whole_table=whole_table)
        swap_shared(model, made)
        give_name(name, [part for layer in made.values() for part in _new_parts(layer)])
        freeze(model)
        settle_numbers(model, made[found.table])
    return Names(made)


def _new_parts(layer: nn.Module) -> Iterator[nn.Module]:
    yield layer
    if isinstance(base := layer.base, TrainedModule):
        yield base


def _made(
    places: Survey, found: Tables, rows: int, init: Init, *, whole_table: bool
) -> dict[str, Any]:
    tops = {name: places.modules[name] for name in found[:2] if name is not None}
    if whole_table:
        for name, module in tops.items():
            if is_packed(innermost(module)):
                raise ValueError(
                    f"{_CALLER}: {name} holds 4-bit codes, which cannot train; leave whole_table "
                    "out (the new rows train), or call dequantize_model first"
                )
        memo: dict[int, Any] = {}
        tops = {name: TrainedModule(module, memo=memo) for name, module in tops.items()}
    starts = _starts(tops, found, rows, init)
    made: dict[str, Any] = {found.table: LongerTable(tops[found.table], starts[0])}
    if found.head is not None:
        own = made[found.table] if found.tied else starts[1]
        made[found.head] = LongerHead(tops[found.head], own)
    return made


def _starts(
    tops: dict[str, nn.Module], found: Tables, rows: int, init: Init
) -> tuple[Tensor, Tensor]:
    """The rows that table and head start with; of tied ones the first counts."""
    if isinstance(init, Tensor):
        given = (init, init)
    elif isinstance(init, tuple) and len(init) == 2 and all(isinstance(t, Tensor) for t in init):
        given = init
        if found.tied:
            raise ValueError(f"{_CALLER}: init has two tensors, and table and head are tied")
    elif init in INITS:
        first = _drawn(tops[found.table], rows, str(init))
        own = found.head is not None and not found.tied
        return first, _drawn(tops[str(found.head)], rows, str(init)) if own else first
    else:
        raise ValueError(
            f"{_CALLER}: init={init!r:.60}; choose one of {INITS}, a tensor, or two of them"
        )
    if wrong := [tuple(t.shape) for t in given if t.dim() != 2 or len(t) != rows]:
        raise ValueError(f"{_CALLER}: init of shape {wrong[0]}; expected ({rows}, dim)")
    return given


def _drawn(module: nn.Module, rows: int, init: str) -> Tensor:
    """`rows` rows by the old ones' mean, or by their columns' means and deviations."""
    with torch.no_grad():
        found: dict[str, Tensor] = module.exact_parameters() if isinstance(module, Wrapper) else {}
        exact = found.get("weight")
        if exact is None:
            exact = stored_parameter(_CALLER, innermost(module), "weight")
        exact = exact.to(torch.promote_types(exact.dtype, torch.float32))
        mean = exact.mean(0).expand(rows, -1)
        if init == "mean":
            return mean
        return mean + torch.randn_like(mean) * exact.std(0, correction=0)


def named_by(model: nn.Module, getter: str) -> nn.Module | None:
    """What get_input_embeddings or get_output_embeddings returns; None without such a method."""
    get = getattr(model, getter, None)
    with suppress(NotImplementedError, AttributeError):
        return get() if callable(get) else None
    return None


def _one(caller: str, places: Survey, what: str, target: Target | None, getter: str) -> str | None:
    """The name of the module that a target, or the model itself, names; None: there is none."""
    if target is None:
        module = named_by(places.model, getter)
        names = [n for n, m in places.modules.items() if m is module]
        if module is not None and not names:
            raise ValueError(f"{caller}: {getter}() returns no module of the model; pass {what}=")
        return names[0] if names else None
    if not callable(target) and not isinstance(target, str) and not list(target):
        return None
    chosen = find(places, target, caller=f"{caller}: {what}").chosen
    if len({id(module) for module in chosen.values()}) != 1:
        raise ValueError(f"{caller}: {what} names {list(chosen)[:5]}; expected one module")
    return next(iter(chosen))


def find_tables(
    caller: str, places: Survey, table: Target | None = None, head: Target | None = None
) -> Tables:
    """The table and the head of a model.

    Raises:
        ValueError: no table; a head without one, with another number of rows, or not said.
    """
    own = _one(caller, places, "table", table, "get_input_embeddings")
    top = _one(caller, places, "head", head, "get_output_embeddings")
    if own is None:
        other = "" if top is None else f", only the head {top}"
        raise ValueError(f"{caller}: the model names no input embedding{other}; pass table=")
    inner: Any = innermost(places.modules[own])
    count = getattr(inner, "num_embeddings", None)
    if not isinstance(count, int):
        raise ValueError(f"{caller}: {own} is a {type(inner).__name__}, no embedding")
    if top is None:
        alike = [n for n, s in places.shapes.items() if s.out_features == count]
        if head is None and alike:
            raise ValueError(
                f"{caller}: {alike[0]} has {count} outputs, one for each row of {own}, and the "
                f"model names no head; pass head=[{alike[0]!r}], or head=() if it is none"
            )
        return Tables(own, None, tied=False)
    shape = linear_shape(innermost(places.modules[top]))
    if shape is None or shape.transposed or shape.out_features != count:
        outputs = "no rows for tokens" if shape is None else f"{shape.out_features} outputs"
        raise ValueError(
            f"{caller}: the table {own} has {count} rows and the head {top} {outputs}; expected "
            "one for each row (model.resize_token_embeddings makes them equal), or head=() if it "
            "is no head for tokens"
        )
    return Tables(own, top, share_weights(inner, places.modules[top]))


def share_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules, below all adapters, have a weight or codes in common."""
    mine, its = (
        {id(p) for name, p in innermost(m)._parameters.items() if p is not None and name != "bias"}
        for m in (one, other)
    )
    return not mine.isdisjoint(its)


def _check_sharing(places: Survey, found: Tables) -> None:
    """Raise ValueError if another module has the table's or the head's parameters, or new rows."""
    chosen = [name for name in found[:2] if name is not None]
    for name in chosen:
        module: Any = places.modules[name]
        if isinstance(module, LongerTable | LongerHead):
            raise ValueError(
                f"{_CALLER}: {name} has {len(module.weight) - module.old_rows} new rows already; "
                "make them part of the table first (minipeft.remove(model, merge=True)), or take "
                "them off (minipeft.remove(model)) and add all at once"
            )
    own = {id(innermost(places.modules[name])) for name in chosen}
    theirs = {id(p) for name in chosen for p in innermost(places.modules[name])._parameters.values()
              if p is not None}  # fmt: skip
    for name, module in places.model.named_modules():
        if id(module) in own or is_adapter(module):
            continue
        if shared := [n for n, p in module._parameters.items() if id(p) in theirs]:
            raise ValueError(
                f"{_CALLER}: {name or 'the model'} shares its {shared[0]} with {chosen}, and would "
                "have the old number of rows; give it a parameter of its own first, or use "
                "model.resize_token_embeddings"
            )


def _check_second_table(places: Survey, found: Tables) -> None:
    """Raise ValueError if a second table, of each layer's inputs, has a row for each token too."""
    count = getattr(innermost(places.modules[found.table]), "num_embeddings", None)
    second = named_by(places.model, "get_per_layer_input_embeddings")
    if second is not None and getattr(second, "num_embeddings", None) == count:
        raise ValueError(
            f"{_CALLER}: the model has a second table of {count} rows (the inputs of its layers), "
            "which would have none for the new tokens; use model.resize_token_embeddings"
        )


def owners(model: nn.Module) -> list[tuple[nn.Module, tuple[str, ...], Any]]:
    """What may hold a number of the vocabulary: a module, the way from it, and what is there.

    The modules themselves (by an empty way), their configurations ("config"), and those inside
    these ("config", "text_config"); each comes once.
    """
    found: dict[int, tuple[nn.Module, tuple[str, ...], Any]] = {}
    for module in model.modules():
        found[id(module)] = (module, (), module)
        config = vars(module).get("config")
        if not hasattr(config, "__dict__") or isinstance(config, nn.Module | type):
            continue
        found.setdefault(id(config), (module, ("config",), config))
        for name, part in vars(config).items():
            if hasattr(part, "__dict__") and not isinstance(part, nn.Module | type):
                found.setdefault(id(part), (module, ("config", name), part))
    return list(found.values())


def settle_numbers(model: nn.Module, table: LongerTable) -> None:
    """Let every number of the vocabulary in the model be the longer table's; it notes which.

    These are attributes with "vocab" in their names that are the old number.
    """
    table.__dict__["numbers"] = found = [
        (module, way, name)
        for module, way, owner in owners(model)
        for name, value in vars(owner).items()
        if "vocab" in name and type(value) is int and value == table.old_rows
    ]
    for number in found:
        set_number(number, table.num_embeddings)


def _refuse_layers_over(model: nn.Module) -> None:
    """Raise ValueError if a layer lies over new rows: it would have the old number of rows."""
    for place, module in model.named_modules():
        below = getattr(module, "base", None)
        if isinstance(module, Wrapper) and isinstance(below, LongerTable | LongerHead):
            raise ValueError(
                f"{type(module).__name__}: {place} has new rows, and these lie over all other "
                "adapters of a module; add this one before extend_vocabulary, or make the rows "
                "part of the table first (minipeft.remove(model, merge=True))"
            )


after_swap.append(_refuse_layers_over)
