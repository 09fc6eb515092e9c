"""attach_prefix: P-tuning v2 on any Hugging Face model.

A token or two is sent through the model to see what reaches attention (probe.py); no name in the
config is trusted for that.  The prefixes hang on the model in one module, a Prefix (attached.py),
which answers what attention asks: attention.py, or cache.py where a model looks up no attention.
"""

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from minipeft.adapters import freeze
from minipeft.extras import train_modules
from minipeft.integrations.transformers import positions, probe, saving
from minipeft.integrations.transformers.attached import NAME, Prefix
from minipeft.prefix import PrefixEncoder
from minipeft.protocol import is_adapter
from minipeft.registry import DEFAULT, check_new_name, give_name
from minipeft.targets import NEW_HEADS

POSITIONS, WINDOWS = ("shift", "none"), ("always", "like_token")


def attach_prefix(
    model: nn.Module,
    prefix_length: int,
    *,
    name: str = DEFAULT,
    hidden: int | None = None,
    embedding_dim: int | None = None,
    dropout: float = 0.0,
    init_std: float = 0.02,
    frozen: int = 0,
    gated: bool = False,
    position: str | None = None,
    window: str | None = None,
    locations: Iterable[str] | None = None,
    train_head: bool = True,
) -> Prefix:
    """Put a trainable prefix before the keys and values of every attention layer of `model`.

    For transformers models of any kind: decoders, encoders, encoder-decoders.  It enters through
    the attention function with `sdpa` or `eager`, or through the cache where a model looks up no
    such function (Falcon, BLOOM, MPT, CodeGen, GPT-J).  Caches hold real tokens only and masks
    cover real tokens only: use the model as before.

    `position` "shift" numbers tokens from prefix_length on, as if the prefix were tokens (the
    convention of P-tuning v2 and PEFT); "none" leaves them at 0.  None: "shift" for decoders,
    "none" for encoders, which so keep the full length of their position table, for
    encoder-decoders, and for a gated prefix, which so starts as no prefix at all.  `window`
    "always": layers with a sliding window see the prefix from everywhere; "like_token": as if it
    were tokens.  `locations` chooses among an encoder-decoder's "encoder", "decoder" and "cross"
    (its attention to what was encoded); all of them unless given.

    A second prefix needs a `name`, and follows the first in position, window and locations; see
    use_adapters and Prefix.use.  A new head for a task (score, classifier, qa_outputs) trains too,
    as train_modules does it, unless `train_head` is False.  Other arguments as of PrefixEncoder.
    Freezes every parameter that no adapter owns.  The model gets a copy of its config, so that
    others that share the object are unaffected.

    Warns if an MLP (`hidden`) has more than a tenth of the base's parameters.

    Raises:
        TypeError: no transformers model.
        ValueError: a model whose attention cannot be reached in every layer (it says what was
            tried), another attention implementation, a name that is taken, a length below 1 or
            beyond the position table, a position or window that the model cannot have.  The model
            is then as it was.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"attach_prefix: expected a transformers model, got {type(model).__name__}; for "
            "attention of your own use PrefixEncoder and prefix_attention"
        )
    for what, value, known in (("position", position, POSITIONS), ("window", window, WINDOWS)):
        if value is not None and value not in known:
            raise ValueError(f"attach_prefix: {what}={value!r}; choose one of {known}")
    settings = {
        "hidden": hidden, "embedding_dim": embedding_dim, "dropout": dropout,
        "init_std": init_std, "frozen": frozen, "gated": gated,
    }  # fmt: skip
    prefix = _present(model, name, position, window, locations)
    with ExitStack() as undo:
        if prefix is None:
            probe.own_configs(model, undo)
            if gated and position is None:  # otherwise moved positions alone change the output
                position = "none"
            prefix = _prepare(model, prefix_length, position, window, locations, undo)
        if gated and prefix.route == "cache":
            raise ValueError(
                f"attach_prefix: {type(model).__name__} is reached through its cache, where a "
                "prefix cannot be gated"
            )
        encoder = PrefixEncoder(prefix.kv_shapes, prefix_length, **settings)  # type: ignore[arg-type]
        _warn_of_large(model, encoder)
        undo.pop_all()
    table: Any = model.get_input_embeddings()
    encoder.to(table.weight.device).train(model.training)
    prefix.encoders[name] = encoder
    if prefix.rows is not None:
        encoder.enabled = False
    if not hasattr(model, NAME):
        model.add_module(NAME, prefix)
    give_name(model, name, [encoder])
    heads = [part for part in NEW_HEADS if part != "lm_head" and _is_plain_head(model, part)]
    if train_head and heads:
        train_modules(model, heads, name=name)
    saving.adopt(model)
    freeze(model)
    if prefix.route == "attention":
        prefix.hooks.name_attention()
    return prefix


def _is_plain_head(model: nn.Module, part: str) -> bool:
    module = getattr(model, part, None)
    if not isinstance(module, nn.Module) or module is model.get_output_embeddings():  # type: ignore[operator]
        return False
    return not any(is_adapter(inner) for inner in module.modules())


def _present(
    model: nn.Module, name: str, position: str | None, window: str | None,
    locations: Iterable[str] | None,
) -> Prefix | None:  # fmt: skip
    """The Prefix that the model has, if a further encoder can join it."""
    found: list[Prefix] = [part for part in model.modules() if isinstance(part, Prefix)]
    if not found:
        if name != DEFAULT:
            check_new_name("attach_prefix", model, name)
        return None
    prefix = found[0]
    if name in prefix.encoders:
        raise ValueError(
            f"attach_prefix: the model has a prefix called {name!r} already; give this one another "
            "name=, or call its remove() first"
        )
    check_new_name("attach_prefix", model, name)
    if not any(part is prefix for part in model.children()):
        raise ValueError("attach_prefix: a part of the model has a prefix; attach it there")
    wanted = None if locations is None else sorted(set(locations))
    for what, given, own in (
        ("position", position, prefix.position), ("window", window, prefix.window),
        ("locations", wanted, sorted(set(prefix.locations))),
    ):  # fmt: skip
        if given is not None and given != own:
            raise ValueError(f"attach_prefix: {what}={given!r}, but the first prefix has {own!r}")
    return prefix


def _prepare(
    model: Any, prefix_length: int, position: str | None, window: str | None,
    locations: Iterable[str] | None, undo: ExitStack,
) -> Prefix:  # fmt: skip
    """A Prefix without encoders, hooked into the model; `undo` takes it off again."""
    reach = probe.look(model)
    there = list(dict.fromkeys(reach.locations))
    chosen = tuple(there if locations is None else locations)
    if not chosen or not set(chosen) <= set(there):
        raise ValueError(f"attach_prefix: locations={chosen}; {type(model).__name__} has {there}")
    reach = reach.only(chosen)
    rule, by_slot = None, False
    if probe.is_encoder_decoder(model):
        causal = False
    else:
        base = reach.holders[0]
        rule = positions.find_rule(base)
        causal = reach.route == "cache" or positions.is_causal(base)
        by_slot = reach.route == "cache" and not positions.matter(base)
    if position is None:
        position = "shift" if causal and (rule is not None or reach.route == "cache") else "none"
    _check_position(model, reach, position, rule, prefix_length, by_slot=by_slot)
    if window == "like_token" and (not causal or position != "shift"):
        raise ValueError(
            "attach_prefix: window='like_token' counts the prefix as tokens before the text, which "
            "only a decoder with position='shift' has"
        )
    text = model.config.get_text_config()
    if window == "like_token" and getattr(text, "attention_chunk_size", None):
        raise ValueError("attach_prefix: window='like_token' is not for attention in chunks")
    prefix = Prefix(
        model, reach, position=position, window=window or "always", rule=rule, by_slot=by_slot
    )
    undo.callback(prefix.hooks.remove)
    return prefix


def _check_position(
    model: nn.Module, reach: probe.Reach, position: str, rule: str | None, prefix_length: int,
    *, by_slot: bool,
) -> None:  # fmt: skip
    name = type(model).__name__
    if position == "none" and by_slot:
        raise ValueError(
            f"attach_prefix: {name} sees how far away a key is by counting what lies between "
            "(ALiBi), so the prefix is counted too; use position='shift'"
        )
    if position == "shift" and rule is None and reach.route == "attention":
        raise ValueError(
            f"attach_prefix: {name} numbers its tokens in a way that cannot be shifted from "
            "outside; use position='none'"
        )
    table = positions.table_rows(reach.holders[0])
    if table is not None and position == "shift" and prefix_length >= table:
        raise ValueError(
            f"attach_prefix: prefix_length={prefix_length} leaves no room in the position table of "
            f"{table} rows"
        )


def _warn_of_large(model: nn.Module, encoder: PrefixEncoder) -> None:
    if encoder.hidden is None:
        return
    size = sum(p.numel() for p in encoder.parameters())
    base = sum(p.numel() for p in model.parameters())
    if size > base / 10:
        warnings.warn(
            f"attach_prefix: the MLP has {size:,} parameters, {size / base:.0%} of the base's "
            f"{base:,}; a smaller hidden, or a table (hidden=None), is usually enough",
            stacklevel=3,
        )
