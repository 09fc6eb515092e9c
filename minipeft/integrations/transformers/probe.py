"""Where a model's attention is, and how a prefix can get there: found by running a token or two.

Route B: the model looks up its attention in AttentionInterface, and a registered function sees each
call.  Route A: the model does not, but asks its cache for all keys, and a view of the cache adds to
them.  Route C: attention modules are handed their layer's past (past.py).  Shapes are those of the
"""

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers import attention, past, positions
from minipeft.integrations.transformers.positions import names_of
from minipeft.prefix import KVShape

# self: a model of one stack; cross: the decoder's attention to the encoder's output
LOCATIONS = ("self", "encoder", "decoder", "cross")


@dataclass
class Reach:
    """What was found: one entry a layer, encoder first, then decoder, then cross-attention."""

    route: str  # "attention" (B), "cache" (A) or "past" (C)
    shapes: list[KVShape]
    locations: list[str]
    modules: list[nn.Module] = field(default_factory=list)  # of routes B and C
    holders: list[nn.Module] = field(default_factory=list)  # the models that make the masks
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # keys and values seen
    has_windows: bool = False  # whether a layer attends within a sliding window or a chunk
    rule: str | None = None  # by which of positions.RULES tokens are numbered; see `study`
    causal: bool = False  # whether text never looks ahead
    by_slot: bool = False  # of route A: whether distance is counted in slots (ALiBi)
    table: int | None = None  # rows of the table of positions
    numbers: list[int] = field(default_factory=list)  # each layer's in the model; see `_numbers`
    chosen: list[int] | None = None  # the numbers that were asked for
    layers: list[past.Layer] = field(default_factory=list)  # of route C
    left_out: dict[str, str] = field(default_factory=dict)  # what gets no prefix, and why
    missing: str = ""  # which layers of the model have no attention that was seen

    def only(self, keep: list[bool]) -> "Reach":
        """The layers that are to be kept."""

        def kept(layers: list[Any]) -> list[Any]:
            return list(itertools.compress(layers, keep))

        return replace(
            self, shapes=kept(self.shapes), locations=kept(self.locations),
            modules=kept(self.modules), pairs=kept(self.pairs), numbers=kept(self.numbers),
            layers=kept(self.layers),
        )  # fmt: skip


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder whose output its decoder attends to."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def look(model: nn.Module, **tokens: Tensor) -> Reach:
    """Run the model on these tokens (or on one) and see what reaches attention.

    Raises:
        ValueError: neither route reaches every layer; it says what was tried.
    """
    try:
        reach = _through_attention(model, tokens)
        if reach.missing:  # the cache may reach the other layers too
            try:
                return _through_cache(model, tokens)
            except _NotReached:
                pass
        return reach
    except _NotReached as by_attention:
        if is_encoder_decoder(model):
            raise ValueError(str(by_attention)) from None
        try:
            return _through_cache(model, tokens)
        except _NotReached as by_cache:
            try:
                return _through_past(model, tokens)
            except past.NotFound as by_past:
                raise ValueError(
                    f"the attention of {type(model).__name__} cannot be reached. "
                    f"Tried its attention function: {by_attention}.  Tried its cache: {by_cache}.  "
                    f"Tried the past of its layers: {by_past}"
                ) from None


def checked_example(model: nn.Module, example: dict[str, Any] | None) -> dict[str, Any] | None:
    """The example with its tensors where the model computes.

    Raises:
        ValueError: no dict of arguments of the model's forward, no tensor among them, or one that
            has no values.
    """
    if example is None:
        return None
    takes = positions.names_of(model)
    if not hasattr(example, "items") or not any(isinstance(v, Tensor) for v in example.values()):
        raise ValueError(
            f"example={type(example).__name__}; expected the keyword arguments of one forward of "
            f"{type(model).__name__}, tensors among them"
        )
    if "kwargs" not in takes and (unknown := [name for name in example if name not in takes]):
        raise ValueError(f"example has {unknown}; {type(model).__name__} takes {takes}")
    if empty := [name for name, v in example.items() if isinstance(v, Tensor) and v.is_meta]:
        raise ValueError(f"example: {empty[0]} has no values (meta device); pass real ones")
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in example.items()}


def embeds_tokens(base: nn.Module) -> bool:
    """Whether this model has a table of tokens."""
    return hasattr(positions.embedding_of(base), "num_embeddings")


def study(
    model: nn.Module,
    locations: Iterable[str] | None,
    layers: list[int] | None = None,
    example: dict[str, Any] | None = None,
) -> Reach:
    """`look`, the layers chosen (None: all), and how the model numbers its tokens.

    Raises:
        ValueError: as of `look`; locations or layers that the model does not have; a model some of
            whose layers have no attention, unless `layers` says which to take.
    """
    reach, name = look(model, **(example or {})), type(model).__name__
    there = list(dict.fromkeys(reach.locations))
    chosen = tuple(there if locations is None else locations)
    if not chosen or not set(chosen) <= set(there):
        raise ValueError(f"locations={chosen}; {name} has {there}")
    wanted = reach.numbers if layers is None else layers
    if layers is None and reach.missing:
        raise ValueError(f"{reach.missing}; layers={sorted(set(reach.numbers))} takes those alone")
    if layers is not None and not (wanted and set(wanted) <= set(reach.numbers)):
        raise ValueError(f"layers={wanted}; attention of {name} is in layers {reach.numbers}")
    if layers is not None and reach.route == "cache":
        raise ValueError(f"{name} is reached through its cache, where layers= cannot choose")
    left_out = {where: "locations= leaves it out" for where in there if where not in chosen}
    if is_encoder_decoder(model):
        left_out |= {
            where: "its attention is not looked up where a prefix can reach it"
            for where in LOCATIONS[1:] if where not in there
        }  # fmt: skip
    for number in dict.fromkeys(reach.numbers):
        if number not in wanted:
            left_out[f"layer {number}"] = "layers= leaves it out"
    if reach.missing:
        left_out["other layers"] = reach.missing
    reach = reach.only(
        [
            location in chosen and number in wanted
            for location, number in zip(reach.locations, reach.numbers, strict=True)
        ]
    )
    if not reach.shapes:
        raise ValueError(f"layers={wanted} has no layer of locations={chosen}")
    reach.chosen, reach.left_out = layers, left_out
    base = reach.holders[0]
    reach.table = positions.table_rows(base)
    if not is_encoder_decoder(model) and embeds_tokens(base):
        try:
            reach.rule = positions.find_rule(base)
            reach.causal = reach.route == "cache" or positions.is_causal(base)
        except ValueError:
            if reach.route != "past" or example is None:
                raise
            reach.rule = None  # it runs on texts with special tokens alone
            return reach
        reach.by_slot = reach.route == "cache" and not positions.matter(base)
    return reach


@contextmanager
def errors_of(caller: str) -> Iterator[None]:
    """Within this context errors about the model begin with the name of the function called."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{caller}: {error}") from error


class _NotReached(Exception):
    """Why a route does not reach all layers."""


def _inputs(model: nn.Module, tokens: dict[str, Tensor]) -> dict[str, Any]:
    if tokens:
        return tokens
    if not embeds_tokens(model):
        kind = type(positions.embedding_of(model)).__name__
        raise ValueError(
            f"{type(model).__name__} embeds its input by a {kind}, which is no table of tokens, so "
            "no text can be made up for it; pass example=, the keyword arguments of one forward "
            "(pixel_values, input_features, ...)"
        )
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = positions.device_of(table)
    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    if is_encoder_decoder(model):
        end = getattr(model.config, "eos_token_id", None)
        last = one + (end if isinstance(end, int) and 0 <= end < table.num_embeddings else 0)
        return {"input_ids": torch.cat([one, one, last], 1), "decoder_input_ids": one}
    return {"input_ids": one}


def configs_of(model: nn.Module) -> list[Any]:
    """The configs of all modules, each once."""
    from transformers import PreTrainedConfig

    found = (module.__dict__.get("config") for module in model.modules())
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


def own_configs(model: nn.Module, undo: ExitStack) -> None:
    """Give the model's modules copies of their configs, shared among them as before."""
    from transformers import PreTrainedConfig

    memo: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            undo.callback(setattr, module, "config", config)
            module.__dict__["config"] = copy.deepcopy(config, memo)


def _through_attention(model: Any, tokens: dict[str, Tensor]) -> Reach:
    text = model.config.get_text_config()
    current = text._attn_implementation
    own = attention.own_implementation(current)
    seen_by_us = attention.register(own, None)
    changed = [c for c in configs_of(model) if c._attn_implementation == current]
    try:
        for config in changed:
            config._attn_implementation_internal = seen_by_us
        with attention.recording() as recorded:
            positions.run(model, **_inputs(model, tokens))
    finally:
        for config in changed:
            config._attn_implementation_internal = current
        attention.forget(seen_by_us)
    name = type(model).__name__
    calls: list[attention.Call] = recorded
    if not calls:
        raise _NotReached(f"{name} called none from AttentionInterface on one token")
    if not is_encoder_decoder(model):
        calls = _of_one_model(model, calls)
    modules = {id(call.module) for call in calls}
    locations = [_location(model, call) for call in calls]
    if len(modules) < len(calls):
        raise _NotReached(
            f"{name} called attention {len(calls)} times from {len(modules)} modules on one token, "
            "so that its layers share modules, and nothing says which layer a call is of; "
            "inject_lora trains such a model"
        )
    kinds = {type(call.module) for call in calls}
    all_of_kind = sum(type(module) in kinds for module in model.modules())
    layers = getattr(text, "num_hidden_layers", None)
    if len(calls) != all_of_kind or locations.count("cross") not in (0, locations.count("decoder")):
        raise _NotReached(
            f"{name} called attention {len(calls)} times from {len(modules)} modules on one "
            f"token; expected one call from each of {all_of_kind} modules for its {layers} layers"
        )
    order = sorted(range(len(calls)), key=lambda i: LOCATIONS.index(locations[i]))
    found, missing = [calls[i] for i in order], ""
    if not (layers is None or is_encoder_decoder(model) or len(calls) == layers):
        missing = f"{name} has {layers} layers, of which {len(calls)} called attention on one token"
    return Reach(
        "attention", [call.shape for call in found], [locations[i] for i in order],
        [call.module for call in found], _holders(model, [call.module for call in found]),
        [(call.k, call.v) for call in found],
        any(window is not None for window in [*recorded.windows, *(call.window for call in found)]),
        numbers=_numbers([call.module for call in found], [locations[i] for i in order]),
        missing=missing,
    )  # fmt: skip


def _of_one_model(model: nn.Module, calls: list[attention.Call]) -> list[attention.Call]:
    """The calls of the model that embeds the text, where images or sounds have one of their own.

    Raises:
        ValueError: several models attend, and none of them embeds the text.
    """
    holders = _holders(model, [call.module for call in calls])
    if len(holders) == 1:
        return calls
    table = positions.embedding_of(model)
    of_text = [h for h in holders if table is not None and positions.embedding_of(h) is table]
    if not of_text:
        names = {id(module): name for name, module in model.named_modules()}
        raise ValueError(
            f"{type(model).__name__} holds several models that attend: "
            f"{[names[id(holder)] for holder in holders]}; attach a prefix to one of them"
        )
    inside = {id(module) for holder in of_text for module in holder.modules()}
    return [call for call in calls if id(call.module) in inside]


def _numbers(modules: list[nn.Module], locations: list[str]) -> list[int]:
    """The number of each layer: what its attention calls itself, or its place in its stack."""
    own = [getattr(module, "layer_idx", None) for module in modules]
    if all(isinstance(n, int) for n in own) and len(set(zip(locations, own, strict=True))) == len(
        own
    ):
        return [int(n) for n in own if n is not None]
    return [locations[:i].count(location) for i, location in enumerate(locations)]


def _location(model: nn.Module, call: attention.Call) -> str:
    if not is_encoder_decoder(model):
        return "self"
    encoder = model.get_encoder()  # type: ignore[operator]
    if any(module is call.module for module in encoder.modules()):
        return "encoder"
    return "cross" if call.k.shape[2] != call.query.shape[2] else "decoder"


def _holders(model: nn.Module, attentions: list[nn.Module]) -> list[nn.Module]:
    """The innermost transformers models around these modules: they make the masks."""
    from transformers import PreTrainedModel

    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    inside = {id(m): {id(part) for part in m.modules()} for m in models}
    found: dict[int, nn.Module] = {}
    for module in attentions:
        around = [m for m in models if id(module) in inside[id(m)]]
        holder = min(around, key=lambda m: len(inside[id(m)]))
        found[id(holder)] = holder
    return list(found.values())


def _through_cache(model: Any, tokens: dict[str, Tensor]) -> Reach:
    name = type(model).__name__
    from transformers import PreTrainedModel

    takers = [
        module for module in model.modules()
        if isinstance(module, PreTrainedModel) and "past_key_values" in names_of(module)
    ]  # fmt: skip
    if not takers:
        raise _NotReached(f"{name} takes no cache (past_key_values)")
    holder = min(takers, key=lambda module: sum(1 for _ in module.modules()))
    cache = getattr(
        positions.run(model, use_cache=True, **_inputs(model, tokens)), "past_key_values", None
    )
    layers = getattr(cache, "layers", [])
    pairs = [
        (layer.keys, layer.values) for layer in layers if getattr(layer, "keys", None) is not None
    ]
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not pairs or len(pairs) != (expected or len(pairs)):
        raise _NotReached(f"{len(pairs)} of its {expected} layers put keys and values into a cache")
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        raise _NotReached("its cache forgets what lies outside a sliding window")
    shapes = [KVShape(k.shape[1], k.shape[3], v.shape[3]) for k, v in pairs]
    numbers = list(range(len(pairs)))
    return Reach("cache", shapes, ["self"] * len(pairs), [], [holder], pairs, numbers=numbers)


def _through_past(model: Any, tokens: dict[str, Tensor]) -> Reach:
    inputs = _inputs(model, tokens)
    layers, pairs = past.find(model, lambda: positions.run(model, use_cache=True, **inputs))
    modules = [layer.module for layer in layers]
    shapes = [KVShape(k.shape[1], k.shape[3], v.shape[3]) for k, v in pairs]
    return Reach(
        "past", shapes, ["self"] * len(layers), modules, _holders(model, modules), pairs,
        numbers=list(range(len(layers))), layers=layers,
    )  # fmt: skip
