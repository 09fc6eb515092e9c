"""What all functions that attach share, whatever makes keys and values: find, check, hook, name."""

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from minipeft.adapters.names import DEFAULT, check_new_name, give_name
from minipeft.adapters.protocol import is_adapter
from minipeft.adapters.sharded import refuse_shards
from minipeft.adapters.targets import NEW_HEADS
from minipeft.inject import freeze, restoring, tell
from minipeft.integrations.transformers import attention, gate_search, positions, probe, proof
from minipeft.integrations.transformers.prefixes import NAME, Prefix, check_key
from minipeft.integrations.transformers.prompt_runs import RunPrompt
from minipeft.integrations.transformers.trial import as_before
from minipeft.layers.vocabulary import LongerHead
from minipeft.model.rows import refuse_rows
from minipeft.model.train import train_modules

POSITIONS, WINDOWS = ("shift", "none"), ("always", "like_token")


def attach(
    model: nn.Module,
    length: int,
    make: Callable[[Prefix], nn.Module],
    *,
    caller: str,
    name: str,
    position: str | None = None,
    window: str | None = None,
    window_if_sliding: str | None = None,
    locations: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    example: dict[str, Any] | None = None,
    train_head: bool | list[str] = True,
) -> Prefix:
    """Put what `make` returns among the model's prefixes; the model is as it was if it raises.

    `window_if_sliding` is the window of a model's first prefix where none is asked for and the
    model has sliding windows.  `train_head` True: new heads that do not train yet train too; a
    list: these modules.  `caller` is the public function that calls this: errors begin with its
    name, and warnings point to the line that called it.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: see attach_prefix.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError(
            f"{caller} needs transformers (pip install 'minipeft[hf]'); for attention of your own "
            "use PrefixEncoder and prefix_attention"
        ) from error
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{caller}: expected a transformers model, got {type(model).__name__}; for "
            "attention of your own use PrefixEncoder and prefix_attention"
        )
    for what, value, known in (("position", position, POSITIONS), ("window", window, WINDOWS)):
        if value is not None and value not in known:
            raise ValueError(f"{caller}: {what}={value!r}; choose one of {known}")
    if isinstance(locations, str):
        locations = [locations]
    check_key(caller, name)
    refuse_rows(caller, model)
    refuse_shards(
        caller, model,
        "do this first, in every process with the same random seed, then fully_shard the model",
    )  # fmt: skip
    layers = None if layers is None else list(layers)
    prefix = _present(caller, model, name, position, window, locations, layers)
    doubts: list[str] = []
    with restoring(model), ExitStack() as undo:
        if prefix is None:
            _refuse_inner(caller, model)
            probe.own_configs(model, undo)
            with probe.errors_of(caller), as_before(model):
                example = probe.checked_example(model, example)
                reach = probe.study(model, locations, layers, example)
                chosen, seen = _settled(model, reach, length, position, window)
            if window is None and window_if_sliding and reach.has_windows and reach.causal:
                seen = window_if_sliding
            prefix = Prefix(model, reach, position=chosen, window=seen)
            undo.callback(prefix.hooks.remove)
            with probe.errors_of(caller), as_before(model):
                doubts = proof.prove(model, prefix, example)
        encoder = make(prefix)
        if isinstance(encoder, RunPrompt):
            with probe.errors_of(caller), as_before(model):
                proof.prove_prompt(model, prefix)
        if getattr(encoder, "gated", False):
            _prepare_gates(caller, model, prefix, undo)
        with probe.errors_of(caller):
            encoder.to(positions.input_device(model)).train(model.training)
        heads = _heads(caller, model, prefix, train_head)
        found = [getattr(model, part, None) for part in NEW_HEADS]
        trained = any(is_adapter(m) and not isinstance(m, LongerHead) for m in found)
        if trained and not heads and train_head is True:
            warnings.warn(
                f"{caller}: the model's head trains with another adapter already; {name!r} "
                "has none of its own: keep that adapter on beside it, or use a model of its own",
                stacklevel=4,
            )
        if heads:  # the last that can refuse
            heads = list(train_modules(model, lambda place, _: place in heads, name=name))
        if prefix.served is not None:
            encoder.enabled = False  # type: ignore[assignment]
        prefix.encoders[name] = encoder
        prefix.heads[name] = heads
        if not hasattr(model, NAME):
            model.add_module(NAME, prefix)
        adapters: list[Any] = [part for part in encoder.modules() if is_adapter(part)]
        give_name(name, [*adapters, *(model.get_submodule(place) for place in heads)])
        tell(model)
        freeze(model)
        if prefix.route == "attention":
            prefix.hooks.name_attention()
        undo.pop_all()
        prefix.doubts += [doubt for doubt in doubts if doubt not in prefix.doubts]
    proof.warn(caller, model, doubts)
    return prefix


def _prepare_gates(caller: str, model: nn.Module, prefix: Prefix, undo: ExitStack) -> None:
    """Make the model ready for a prefix with gates, or raise ValueError."""
    hooks = prefix.hooks
    if prefix.route != "attention":
        undo.callback(hooks.take_gates, hooks.gates)
        with probe.errors_of(caller), as_before(model):
            hooks.take_gates(gate_search.find(model, prefix))
            gate_search.prove(model, prefix)
    if hooks.rule is not None:
        with probe.errors_of(caller), as_before(model):
            hooks.only_distance = _by_distance(prefix)


def _by_distance(prefix: Prefix) -> bool:
    """Whether the model, without any prefix, sees only how far apart two tokens are."""
    on = [encoder for encoder in prefix.encoders.values() if encoder.enabled]
    prefix.enabled = False
    try:
        return positions.only_distance(prefix.hooks.holders[0])
    finally:
        for encoder in on:
            encoder.enabled = True


def _refuse_inner(caller: str, model: nn.Module) -> None:
    marks = (attention.ATTRIBUTE, attention.HELD)
    if any(mark in module.__dict__ for module in model.modules() for mark in marks):
        raise ValueError(f"{caller}: a model around this one has a prefix; attach it there")


def _heads(
    caller: str, model: nn.Module, prefix: Prefix, train_head: bool | list[str]
) -> list[str]:
    """The names of the modules that are to train with the prefix."""
    wanted = train_head if isinstance(train_head, list) else []
    if train_head is True:
        wanted = [part for part in NEW_HEADS if part != "lm_head" and _is_plain_head(model, part)]
    if wanted and prefix.served is not None:
        raise ValueError(
            f"{caller}: rows use prefixes of their own, and a head would change for all of "
            "them; call use_adapters with names first"
        )
    return wanted


def _is_plain_head(model: nn.Module, part: str) -> bool:
    module = getattr(model, part, None)
    if not isinstance(module, nn.Module) or module is model.get_output_embeddings():  # type: ignore[operator]
        return False
    return not any(is_adapter(inner) for inner in module.modules())


def _present(
    caller: str, model: nn.Module, name: str, position: str | None, window: str | None,
    locations: Iterable[str] | None, layers: list[int] | None,
) -> Prefix | None:  # fmt: skip
    """The Prefix that the model has, if a further encoder can join it."""
    found: list[Prefix] = [part for part in model.modules() if isinstance(part, Prefix)]
    if not found:
        if name != DEFAULT:
            check_new_name(caller, model, name)
        return None
    prefix = found[0]
    if name in prefix.encoders:
        raise ValueError(
            f"{caller}: the model has a prefix called {name!r} already; give this one another "
            f"name=, or call minipeft.remove(model, name={name!r}) first"
        )
    check_new_name(caller, model, name)
    if not any(part is prefix for part in model.children()):
        raise ValueError(f"{caller}: a part of the model has a prefix; attach it there")
    wanted = None if locations is None else sorted(set(locations))
    for what, given, own in (
        ("position", position, prefix.position), ("window", window, prefix.window),
        ("locations", wanted, sorted(set(prefix.locations))), ("layers", layers, prefix.layers),
    ):  # fmt: skip
        if given is not None and given != own:
            raise ValueError(f"{caller}: {what}={given!r}, but the first prefix has {own!r}")
    return prefix


def _settled(
    model: Any, reach: probe.Reach, prefix_length: int, position: str | None, window: str | None
) -> tuple[str, str]:
    """Position and window, None replaced by what suits the model; ValueError if it cannot be."""
    shiftable = reach.rule is not None or reach.route == "cache"
    if position is None:
        position = "shift" if reach.causal and shiftable else "none"
    name = type(model).__name__
    if position == "none" and reach.by_slot:
        raise ValueError(
            f"{name} sees how far away a key is by counting what lies between "
            "(ALiBi), so the prefix is counted too; use position='shift'"
        )
    if position == "shift" and not shiftable:
        raise ValueError(
            f"{name} numbers its tokens in a way that cannot be shifted from "
            "outside; use position='none'"
        )
    if reach.table is not None and position == "shift" and prefix_length >= reach.table:
        raise ValueError(
            f"prefix_length={prefix_length} leaves no room in the position table of "
            f"{reach.table} rows"
        )
    if window == "like_token" and (not reach.causal or position != "shift"):
        raise ValueError(
            "window='like_token' counts the prefix as tokens before the text, which "
            "only a decoder with position='shift' has"
        )
    return position, window or "always"
