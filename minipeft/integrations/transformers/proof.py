"""Three questions that a model answers before it keeps a prefix, on a few tokens.

1. Does a prefix count as what it is?  The keys and values of a text's first tokens, put back as a
   prefix, must give the rest of that text.  Not asked where the position is "none", since such a
   prefix stands nowhere, nor where only some layers have a prefix.
2. Does padding stay outside?  A padded text must give what the unpadded one gives, as nearly as it
   does in the model without a prefix.
3. Does each layer see its prefix?  A layer's own prefix alone must change what that layer's
   attention gives for the last token, beyond the sliding window (seen.py).  The logits would prove
   nothing: what one layer sees travels a window further with each layer.

Where layers are handed their past (past.py) a fourth comes between: does a text in two steps, the
second from the cache of the first, give what it gives in one?

The answers are differences of numbers, and numbers of 16 bits or of a router with ties differ by
themselves.  So a difference is measured against what the model differs from itself when it goes on
from its own cache, and against what the prefix changes.  Where these two are of one size, nothing
can be proved: a warning says so, and the prefix stays.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers import positions, probe
from minipeft.integrations.transformers.prefixes import NotProvedWarning, Prefix
from minipeft.integrations.transformers.prompt_runs import run_prompt
from minipeft.integrations.transformers.seen import blind_layers, windows
from minipeft.integrations.transformers.texts import PAD, PREFIX, TEXT, cut, invent, padded
from minipeft.integrations.transformers.trial import Trial, difference, pairs_of


def prove(model: nn.Module, prefix: Prefix, example: dict[str, Any] | None) -> list[str]:
    """Ask the questions; returns what could not be proved, a sentence each.

    The prefix has no encoder yet.

    Raises:
        ValueError: an answer is no; it says which, and gives the difference and the effect.
    """
    try:
        trial = Trial(model, prefix, example)
        doubts = [*_ask_tokens(trial), *_ask_steps(trial), *_ask_padding(trial)]
        if prefix.window == "always":
            doubts += _ask_layers(trial)
        if deaf := [f.number for f in prefix.hooks.feeders if not f.layer.trains]:
            doubts.append(
                f"attention of layers {deaf} does not look at its past in training mode; a forward "
                "in that mode raises, so train the prefix with the model in eval()"
            )
    finally:
        prefix.encoders.clear()
    return doubts


def prove_prompt(model: nn.Module, prefix: Prefix) -> None:
    """Whether embeddings of tokens, run as a prompt, give the keys and values of these tokens.

    Raises:
        ValueError: they do not, or the model cannot be run on embeddings alone.
    """
    holder, name = prefix.hooks.holders[0], type(model).__name__
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    inputs = invent(model, PREFIX)
    on = [encoder for encoder in prefix.encoders.values() if encoder.enabled]
    prefix.enabled = False
    try:
        wanted = pairs_of(prefix, probe.look(model, **inputs))
        if prefix.route == "attention":
            prefix.hooks.name_attention()
        with positions.quietly(model):
            found = run_prompt(holder, table(inputs["input_ids"])[0], prefix.hooks.modules)
    except Exception as error:
        raise ValueError(f"{name} cannot run a prompt: {error}") from error
    finally:
        for encoder in on:
            encoder.enabled = True
    for layer, (pair, own) in enumerate(zip(found, wanted, strict=True)):
        for one, other in zip(pair, own, strict=True):
            off = difference(one, other[0])
            limit = 32 * torch.finfo(other.dtype).eps * float(other.abs().max())
            if off > limit:
                raise ValueError(
                    f"{name} does not take a prompt: embeddings of tokens must give the keys and "
                    f"values of these tokens; in layer {layer} they are {off:.1e} off, where "
                    f"rounding is {limit:.1e}"
                )


def warn(caller: str, model: nn.Module, doubts: list[str]) -> None:
    """Say what could not be proved, at the line that called `caller`."""
    for doubt in doubts:
        text = f"{caller}: not proved for {type(model).__name__}: {doubt}"
        warnings.warn(text, NotProvedWarning, stacklevel=5)


def _ask_tokens(trial: Trial) -> Iterator[str]:
    """The first question."""
    if trial.prefix.position != "shift" or trial.recorded is None or not trial.is_text:
        return
    if state := _state_beside(trial.model, trial.whole):
        yield (
            f"it keeps a state beside keys and values ({state}), which a prefix does not set; a "
            "prefix of real tokens is not these tokens"
        )
        return
    if trial.prefix.layers is not None:  # the other layers would see less than the text
        return
    # where text looks ahead, a window of w tokens reaches w / 2 to either side
    needed = (PREFIX + TEXT) * (1 if trial.prefix.causal else 2)
    short = [window for window in windows(trial.model) if window < needed]
    with _seen_as_tokens(trial.prefix, bool(short)) as can_ask:
        if not can_ask:
            yield f"its window of {min(short)} tokens is shorter than the trial"
            return
        got = trial.run(trial.rest, on=True) if short else trial.with_prefix
    wanted = trial.recorded[:, PREFIX:]
    yield from _judge(
        trial, "a prefix with the keys of real tokens must give what these tokens give",
        difference(got, wanted), difference(wanted, trial.without),
    )  # fmt: skip


def _ask_steps(trial: Trial) -> Iterator[str]:
    """Whether a text in two steps gives what it gives in one, on route C.

    Its caches are tuples of any layout, in which the tokens must be counted rightly.
    """
    if trial.prefix.route != "past" or not trial.is_text or not trial.prefix.causal:
        return
    first = {name: ids[:, :2] for name, ids in trial.rest.items()}
    cache = trial.cache_of(first)
    found = trial.run(cut(trial.rest, 2) | {"past_key_values": cache}, on=True)
    yield from _judge(
        trial, "a text in two steps must give what it gives in one",
        difference(found, trial.with_prefix[:, 2:]),
        difference(trial.with_prefix, trial.without),
    )  # fmt: skip


def _ask_padding(trial: Trial) -> Iterator[str]:
    """The second question: padding on the left, and on the right where text looks ahead."""
    with_prefix = trial.louder()
    for left in (True,) if trial.prefix.causal else (True, False):
        yield from _ask_padding_on(trial, with_prefix, left=left)


def _ask_padding_on(trial: Trial, with_prefix: Tensor, *, left: bool) -> Iterator[str]:
    length = trial.without.shape[1]
    longer = padded(trial.model, trial.rest, left=left)
    if longer is None:
        return
    try:
        found = trial.run(longer, on=True)
    except ValueError:
        if not trial.runs(longer):
            return  # the model takes no padding, with or without a prefix
        raise

    def of_text(states: Tensor) -> Tensor:
        if states.shape[1] == length:  # of the decoder, or of the text as a whole
            return states
        return states[:, PAD:] if left else states[:, :-PAD]

    error = difference(of_text(found), with_prefix)
    if error <= trial.rounding and not _in_step():
        return
    own = difference(of_text(trial.run(longer, on=False)), trial.without)
    if error > 2 * own:
        yield from _judge(
            trial, "a padded text must give what it gives unpadded, as nearly as without a prefix "
            f"(there {own:.1e} off)", error, difference(with_prefix, trial.without),
        )  # fmt: skip


def _ask_layers(trial: Trial) -> list[str]:
    """The third question."""
    blind, doubts = blind_layers(trial)
    if blind:
        kinds = sorted({type(module).__name__ for _, module in blind})
        layers = list(dict.fromkeys(layer for layer, _ in blind))
        raise ValueError(
            f"{', '.join(kinds)} of {type(trial.model).__name__} does not see its prefix in layers "
            f"{layers}: another prefix changes its output for the last "
            "token by 0.0.  Choose other layers=, or window='like_token', by which a layer sees "
            "a prefix as far as it sees tokens"
        )
    return doubts


def _judge(trial: Trial, question: str, error: float, effect: float) -> Iterator[str]:
    """Nothing if the error is rounding, a doubt if it is noise; ValueError if it is neither."""
    if error <= min(trial.rounding, effect / 8) and not _in_step():
        return
    noise = trial.noise()
    limit = max(4 * noise, trial.rounding)
    if error <= min(limit, effect / 8):
        return
    figures = f"{error:.1e} off, where a prefix changes {effect:.1e}"
    if effect <= 8 * limit:
        yield f"{question}; {figures}, and the model differs from itself by {noise:.1e}"
        return
    name = type(trial.model).__name__
    raise ValueError(f"{name} does not take a prefix: {question}; it is {figures}")


@contextmanager
def _seen_as_tokens(prefix: Prefix, windowed: bool) -> Iterator[bool]:
    """The prefix as if it were tokens, where windows are shorter than the trial; else as it is."""
    kept = prefix.window
    if windowed and prefix.has_windows and prefix.causal:
        prefix.window = "like_token"
    try:
        yield not windowed or prefix.window == "like_token"
    finally:
        prefix.window = kept


def _state_beside(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """What the model's cache holds beside keys and values, if anything."""
    if "past_key_values" not in positions.names_of(model):
        return None
    output = positions.run(model, use_cache=True, **inputs)
    for layer in getattr(getattr(output, "past_key_values", None), "layers", []):
        for name, value in vars(layer).items():
            parts = list(value.values()) if isinstance(value, dict) else value
            parts = parts if isinstance(parts, (list, tuple)) else [parts]
            states = [part for part in parts if isinstance(part, Tensor) and part.dim() > 2]
            if states and name not in ("keys", "values"):
                return str(name)
    return None


def _in_step() -> bool:
    """Whether other processes must run the same forwards: no answer may decide which are run."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1
