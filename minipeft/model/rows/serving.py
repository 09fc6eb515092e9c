"""use_adapters(model, rows=[...]): which modules get a bank or a stack, and what is in it.

First a plan is made and checked, then the model is changed in one go.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.adapters.names import named, stacks
from minipeft.adapters.prefix_holder import holds_prefixes
from minipeft.adapters.protocol import Adapter, innermost
from minipeft.adapters.sharded import own_class, refuse_shards
from minipeft.adapters.state import refuse_merged, require_adapters
from minipeft.inject import restoring, swap, swap_shared
from minipeft.layers.bank import LoRABank, finite
from minipeft.layers.by_row import ByRow, Row
from minipeft.layers.fused import LoRAFusedLinear
from minipeft.layers.row_groups import Placed, RowGroups
from minipeft.lora import LoRALinear
from minipeft.model.rows.mixing import what_mixes
from minipeft.model.rows.stack import RowStack, why_not

Wanted = list[tuple[str, ...]]  # for each row the adapters it uses
_JOINED = (LoRALinear, LoRAFusedLinear)  # two factors, whose product is all that they add


class Place(NamedTuple):
    """What rows may use over one module: adapter names and layers, the innermost first."""

    layers: list[tuple[str, Any]]
    trains: bool  # whether the module on top is in training mode

    @property
    def joined(self) -> bool:
        """Whether a bank can join the factors: one product for each adapter."""
        names = {name for name, _ in self.layers}
        plain = all(own_class(layer) in _JOINED for _, layer in self.layers)
        return plain and len(names) == len(self.layers)

    @property
    def rank(self) -> int:
        """The highest rank among the layers."""
        return max(len(layer.factors()[0]) for _, layer in self.layers)


def serve_rows(model: nn.Module, rows: Iterable[Row]) -> list[str]:
    """Let row i of every batch use the adapter `rows[i]`: a name, None, or several names.

    Called again with as many rows it changes tensors in place.  A bank copies factors and scales;
    after changing them call this again.  The first axis of a layer's input must be the batch,
    flattened with later axes at most; embeddings get (batch, tokens).  The prefixes of a model are
    told of theirs.  Returns the names of the modules.

    Raises:
        ValueError: no rows, no such adapter, a merged model, NaN or Inf in LoRA on a linear layer,
            or layers asked for or on in which rows cannot be told apart (experts,
            nn.MultiheadAttention, tables of positions); the model is then as it was.
    """
    if isinstance(rows, str):
        raise ValueError(
            f"use_adapters: rows={rows!r}; expected a list, an entry for each row of the batch, "
            f"such as [{rows!r}, None]; a name alone switches all rows"
        )
    wanted: Wanted = [
        () if row is None else (row,) if isinstance(row, str) else tuple(row) for row in rows
    ]
    if not wanted:
        raise ValueError("use_adapters: rows is empty; expected one name for each row of the batch")
    refuse_merged("use_adapters", require_adapters("use_adapters", model))
    refuse_shards(
        "use_adapters(rows=)", model,
        "run the rows of each adapter in a batch of their own (use_adapters with a name), or serve "
        "them in one process",
    )  # fmt: skip
    everything = named(model)
    used = list(dict.fromkeys(name for row in wanted for name in row))
    if unknown := [name for name in used if name not in everything]:
        raise ValueError(
            f"use_adapters: the model has no adapter {unknown}; it has {sorted(everything)}"
        )
    owners = [module for module in model.modules() if holds_prefixes(module)]
    own = {id(part) for owner in owners for part in owner.modules()}  # type: ignore[attr-defined]
    names = list(everything)  # all of them: other rows may want others
    places = _places(model, everything, used, own)
    prompts = {name for owner in owners for name in owner.run_by_the_model()}
    if places and (mixed := prompts & set(used)):
        raise ValueError(
            f"use_adapters: {sorted(mixed)[0]!r} is a prompt, which runs through the model once "
            "for all rows, and other layers differ by row; bake the prompt, or serve them in two "
            "batches"
        )
    _check_prefixes(owners, used)
    trains = any(place.trains for place in places.values()) or bool(owners and model.training)
    if (mixing := what_mixes(model)) and trains:
        raise ValueError(f"use_adapters(rows=): {mixing}")
    groups = {name: _grouped(model, name, place, wanted) for name, place in places.items()}
    layers = _layers(model, names, places, len(wanted))
    slots = {n: [names.index(own) for own, _ in place.layers] for n, place in places.items()}
    gate = torch.tensor([[float(n in row) for n in names] for row in wanted])
    copies = {n: layer.copies_now(groups[n], slots[n]) for n, layer in layers.items()}
    # all is computed: from here on values are written, which `restoring` would not put back
    for name, layer in layers.items():
        layer.follow(groups[name], slots[name], mixing, copies.pop(name))
    for owner in owners:
        owner.serve_rows(wanted)
    with torch.no_grad():
        for layer in list(layers.values())[:1]:
            layer.gate.copy_(gate)
    found = [place for name in used for place in everything[name]]
    return list(dict.fromkeys([*places, *found]))


def _places(
    model: nn.Module, everything: dict[str, dict[str, list[Adapter]]], used: list[str],
    own: set[int],
) -> dict[str, Place]:  # fmt: skip
    """The layers that rows may use, by module; ValueError where rows cannot be told apart."""
    name_of = {id(layer): name for name, adapters in everything.items()
               for layers in adapters.values() for layer in layers}  # fmt: skip
    tables = _token_tables(model)
    places: dict[str, Place] = {}
    for place, whole in stacks(model).items():
        stack: list[Any] = [layer for layer in whole if id(layer) in name_of]
        stack = [layer for layer in stack if id(layer) not in own]
        found = []
        for layer in reversed(stack):
            name = name_of[id(layer)]
            why = why_not(layer) or _no_batch(innermost(layer), tables)
            if why is None:
                found.append((name, layer))
            elif name in used or layer.enabled:
                raise ValueError(
                    f"use_adapters: {name!r} has {type(layer).__name__} over {place!r}: {why}; "
                    "rows of a batch cannot use it, and others must be off (run its rows in a "
                    "batch of their own)"
                )
        if not found:
            continue
        if not place:
            raise ValueError("use_adapters: the model is itself an adapter layer; put it in one")
        trains = model.get_submodule(place).training
        places[place] = Place(found, trains)
        # in training each adapter computes for its own rows
        for name, layer in found if places[place].joined and not trains else []:
            if not finite(layer.factors()[0], layer.factors()[1] * (layer.scaling * layer.scale)):
                raise ValueError(
                    f"use_adapters: {name!r} holds NaN or Inf over {place!r}, which would reach "
                    "the rows of others; remove it first"
                )
    return places


def _token_tables(model: nn.Module) -> set[int] | None:
    """ids of the tables that take tokens; None if no part of the model names its table."""
    found: set[int] = set()
    for module in model.modules():
        getter = getattr(type(module), "get_input_embeddings", None)
        if callable(getter):
            try:
                table = getter(module)
            except (NotImplementedError, AttributeError):  # a part without one
                continue
            if isinstance(table, nn.Module):
                found.add(id(innermost(table)))
    return found or None


def _no_batch(plain: nn.Module, tables: set[int] | None) -> str | None:
    if tables is None or id(plain) in tables or not hasattr(plain, "num_embeddings"):
        return None
    return (
        "it is not the table of the tokens (get_input_embeddings), and numbers of positions or "
        "distances need not have a row for each of the batch"
    )


def _check_prefixes(owners: Iterable[Any], used: list[str]) -> None:
    """Raise ValueError if a prefix that rows use holds NaN or Inf: all rows share its columns."""
    for owner in owners:
        for name, encoder in owner.encoders.items():
            values = [p for p in encoder.parameters() if name in used and not p.is_meta]
            if not finite(*values):
                raise ValueError(
                    f"use_adapters: {name!r} is a prefix that holds NaN or Inf, which would reach "
                    "the rows of others; remove it first"
                )


def _grouped(model: nn.Module, name: str, place: Place, wanted: Wanted) -> RowGroups:
    placed = [Placed(own, layer, float(getattr(layer, "full_strength", layer.scale)))
              for own, layer in place.layers]  # fmt: skip
    return RowGroups(innermost(model.get_submodule(name)), placed, wanted)


def _layers(
    model: nn.Module, names: list[str], places: dict[str, Place], rows: int
) -> dict[str, ByRow]:
    """A layer over each place: those that are there, if they fit, or new ones with one gate."""
    present = {n: s[0] for n, s in stacks(model).items() if isinstance(s[0], ByRow)}
    fits = set(present) == set(places) and all(
        layer.gate.shape == (rows, len(names)) and _fits(layer, places[name], names)
        for name, layer in present.items()
    )
    if fits:
        return present
    _take_off(model)
    layers = (layer for place in places.values() for _, layer in place.layers)
    own = next((p for layer in layers for p in layer.adapter_parameters().values()), None)
    with torch.inference_mode(False):  # its tensors could not be changed outside
        gate = torch.zeros(rows, len(names), device="cpu" if own is None else own.device)
    made = {n: _made(model.get_submodule(n), place, names, gate) for n, place in places.items()}
    swap_shared(model, made)
    return made


def _take_off(model: nn.Module) -> None:
    """Put back what banks and stacks lie over."""
    found = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, ByRow)}
    swap(model, {name: layer.base for name, layer in found.items()})
    for layer in found.values():
        layer.taken_off()


def _fits(layer: ByRow, place: Place, names: list[str]) -> bool:
    if isinstance(layer, LoRABank):
        return place.joined and layer.rank >= place.rank
    assert isinstance(layer, RowStack)
    same = [id(x) for x in layer.layers] == [id(x) for _, x in place.layers]
    return not place.joined and same and layer.slots == [names.index(n) for n, _ in place.layers]


def _made(top: nn.Module, place: Place, names: list[str], gate: Tensor) -> ByRow:
    slots = [names.index(name) for name, _ in place.layers]
    if not place.joined:
        return RowStack(top, [layer for _, layer in place.layers], slots, gate)
    dtype = torch.float32
    for _, layer in place.layers:
        dtype = torch.promote_types(dtype, layer.lora_a.dtype)
    bank = LoRABank(top, len(names), place.rank, gate=gate, dtype=dtype)
    if place.trains:
        bank.drop_copies()
    return bank


def stop_rows(model: nn.Module) -> None:
    """Take banks and stacks off: every row uses the adapters that are on."""
    if any(isinstance(module, ByRow) for module in model.modules()):
        with restoring(model):
            _take_off(model)
    for module in model.modules():
        if holds_prefixes(module):
            module.stop_rows()


def refuse_rows(caller: str, model: nn.Module) -> None:
    """Raise ValueError while rows of a batch are told apart."""
    if any(isinstance(module, ByRow) for module in model.modules()):
        raise ValueError(
            f"{caller}: rows of a batch use different adapters (use_adapters(rows=)); call "
            "minipeft.use_adapters(model, names) first"
        )
