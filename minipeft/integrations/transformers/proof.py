"""Three questions that a model answers before it keeps a prefix, on a few tokens.

1. Does a prefix count as what it is?  The keys and values of a text's first tokens, put back as a
   prefix, must give the rest of that text.  Not asked where the position is "none": such a prefix
   stands nowhere.
2. Does padding stay outside?  A padded text must give what the unpadded one gives, as nearly as it
   does in the model without a prefix.
3. Does each layer see its prefix?  A layer's own prefix alone must change what that layer's
   attention gives for the last token, beyond the sliding window.  The logits would prove nothing:
   what one layer sees travels a window further with each layer.

The answers are differences of numbers, and numbers of 16 bits or of a router with ties differ by
themselves.  So a difference is measured against what the model differs from itself when it goes on
from its own cache, and against what the prefix changes.  Where these two are of one size, nothing
can be proved: a warning says so, and the prefix stays.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers import positions, probe
from minipeft.integrations.transformers.prefixes import Prefix
from minipeft.integrations.transformers.prompt_runs import run_prompt
from minipeft.integrations.transformers.seen import blind_layers, windows
from minipeft.integrations.transformers.texts import PAD, PREFIX, TEXT, cut, invent, padded
from minipeft.prefix import PrefixEncoder

TRIAL = "proof"  # the name of the trial's prefix


class NotProvedWarning(UserWarning):
    """A prefix was attached without proof that the model sees it as it should."""


def prove(model: nn.Module, prefix: Prefix, example: dict[str, Tensor] | None) -> list[str]:
    """Ask the questions; returns what could not be proved, a sentence each.

    The prefix has no encoder yet.  Parameters, buffers and random state are as before.

    Raises:
        ValueError: an answer is no; it says which, and gives the difference and the effect.
    """
    with ExitStack() as undo:
        undo.enter_context(_as_before(model))
        undo.enter_context(torch.random.fork_rng(_devices(model)))
        trial = _Trial(model, prefix, example)
        undo.callback(prefix.encoders.clear)
        trial.load()
        doubts = [*trial.ask_tokens(), *trial.ask_padding()]
        if prefix.window == "always":
            doubts += trial.ask_layers()
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
    with _as_before(model), torch.random.fork_rng(_devices(model)):
        prefix.enabled = False
        try:
            wanted = _of(prefix, probe.look(model, **inputs))
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
            off = _difference(one, other[0]) if one.shape == other[0].shape else float("inf")
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
        warnings.warn(text, NotProvedWarning, stacklevel=4)


class _Trial:
    """A prefix of a text's own keys and values, and what the model gives with it and without."""

    def __init__(self, model: nn.Module, prefix: Prefix, example: dict[str, Tensor] | None) -> None:
        self.model, self.prefix, self.example = model, prefix, example
        self.holder = prefix.hooks.holders[-1]
        self.name = type(model).__name__
        self.is_text = example is None
        self.whole: dict[str, Any] = (
            invent(model, PREFIX + TEXT) if example is None else dict(example)
        )
        self.rest = cut(self.whole, PREFIX) if example is None else self.whole
        self.noise_of: float | None = None

    def load(self) -> None:
        """Record the whole text; its first keys and values are the trial's prefix."""
        with self._states() as found:
            seen = probe.look(self.model, **self.whole)
        self.recorded = found[-1] if found else None
        pairs = _of(self.prefix, seen)
        tokens = {k.shape[2] for k, _ in pairs}
        if min(tokens) < PREFIX:
            pairs = [tuple(t.repeat(1, 1, PREFIX, 1) for t in pair) for pair in pairs]
        if self.is_text and tokens != {PREFIX + TEXT}:
            raise ValueError(
                f"attention of {self.name} sees {sorted(tokens)} keys for {PREFIX + TEXT} tokens; "
                "a prefix cannot be told from what the model itself puts there"
            )
        encoder = PrefixEncoder(self.prefix.kv_shapes, PREFIX)
        encoder.to(positions.input_device(self.model))
        encoder.load_kv([(k[:1, :, :PREFIX], v[:1, :, :PREFIX]) for k, v in pairs])
        self.prefix.encoders[TRIAL] = encoder
        self.encoder = encoder
        self.with_prefix = self._run(self.rest, on=True)
        self.without = self._run(self.rest, on=False)
        self.effect = _difference(self.with_prefix, self.without)
        eps = torch.finfo(self.without.dtype).eps
        self.rounding = 32 * eps * float(self.without.abs().max())

    # --- the questions ---

    def ask_tokens(self) -> Iterator[str]:
        """The first question."""
        if self.prefix.position != "shift" or self.recorded is None or not self.is_text:
            return
        if state := _state_beside(self.model, self.whole):
            yield (
                f"it keeps a state beside keys and values ({state}), which a prefix does not "
                "set; a prefix of real tokens is not these tokens"
            )
            return
        short = [window for window in windows(self.model) if window < PREFIX + TEXT]
        with _seen_as_tokens(self.prefix, bool(short)) as askable:
            if not askable:
                yield f"its window of {min(short)} tokens is shorter than the trial"
                return
            got = self._run(self.rest, on=True) if short else self.with_prefix
        wanted = self.recorded[:, PREFIX:]
        error, effect = _difference(got, wanted), _difference(wanted, self.without)
        yield from self._judge(
            "a prefix with the keys of real tokens must give what these tokens give", error, effect
        )

    def ask_padding(self) -> Iterator[str]:
        """The second question."""
        left = self.prefix.causal
        longer = padded(self.model, self.rest, left=left)
        if longer is None:
            return
        try:
            with_padding = self._run(longer, on=True)
        except ValueError:
            if not self._runs(longer):
                return  # no padding in this model at all
            raise
        text = slice(PAD, None) if left else slice(None, -PAD)

        def of_text(states: Tensor) -> Tensor:
            return states[:, text] if states.shape[1] != self.with_prefix.shape[1] else states

        error = _difference(of_text(with_padding), self.with_prefix)
        if error <= self.rounding and not _in_step():
            return
        own = _difference(of_text(self._run(longer, on=False)), self.without)
        if error > 2 * own:
            yield from self._judge(
                f"a padded text must give what it gives unpadded, as nearly as without a prefix "
                f"(there {own:.1e} off)", error, self.effect,
            )  # fmt: skip

    def ask_layers(self) -> Iterator[str]:
        """The third question."""
        blind, doubts = blind_layers(self)
        yield from doubts
        if blind:
            kinds = sorted({type(module).__name__ for _, module in blind})
            layers = [layer for layer, _ in blind]
            raise ValueError(
                f"{', '.join(kinds)} of {self.name} does not see its prefix in layers {layers}: "
                "another prefix changes its output for the last token by 0.0.  Choose other "
                "layers=, or window='like_token', by which a layer sees it as far as tokens"
            )

    def _judge(self, question: str, error: float, effect: float) -> Iterator[str]:
        """Nothing if the error is rounding, a doubt if it is noise; ValueError if it is neither."""
        if error <= min(self.rounding, effect / 8) and not _in_step():
            return
        limit = max(4 * self._noise(), self.rounding)
        if error <= min(limit, effect / 8):
            return
        figures = f"{error:.1e} off, where a prefix changes {effect:.1e}"
        if effect <= 8 * limit:
            yield f"{question}; {figures}, and the model differs from itself by {limit / 4:.1e}"
            return
        raise ValueError(f"{self.name} does not take a prefix: {question}; it is {figures}")

    # --- runs ---

    def _noise(self) -> float:
        """How far the model is from itself: the rest of the text in a batch, or from its cache."""
        if self.noise_of is None:
            plain = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in self.rest.items()}
            batch = self._run(plain, on=False)[:1]
            self.noise_of = _difference(batch, self.without)
            if self.is_text and self.recorded is not None and self.prefix.causal:
                self.noise_of = max(self.noise_of, self._noise_of_cache())
        return self.noise_of

    def _noise_of_cache(self) -> float:
        start: dict[str, Any] = {n: ids[:, :PREFIX] for n, ids in self.whole.items()}
        with self._off(), self._states() as found:
            try:
                first = positions.run(self.model, use_cache=True, **start)
                cache = getattr(first, "past_key_values", None)
                if cache is None:
                    return 0.0
                positions.run(self.model, use_cache=True, past_key_values=cache, **self.rest)
            except ValueError:
                return 0.0
        assert self.recorded is not None
        return _difference(found[-1], self.recorded[:, PREFIX:])

    def _runs(self, inputs: dict[str, Any]) -> bool:
        """Whether the model runs on these inputs without a prefix."""
        try:
            self._run(inputs, on=False)
        except ValueError:
            return False
        return True

    def _run(self, inputs: dict[str, Any], *, on: bool) -> Tensor:
        """The states (batch, tokens, size) that the innermost model makes of the inputs."""
        self.encoder.enabled = on
        with self._states() as found:
            output = positions.run(self.model, **inputs)
        return found[-1] if found else _first(output)

    @contextmanager
    def _off(self) -> Iterator[None]:
        self.encoder.enabled = False
        yield

    @contextmanager
    def _states(self) -> Iterator[list[Tensor]]:
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            states = getattr(output, "last_hidden_state", None)
            if isinstance(states, Tensor):
                found.append(states.detach())

        handle = self.holder.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()


@contextmanager
def _seen_as_tokens(prefix: Prefix, windowed: bool) -> Iterator[bool]:
    """The prefix as if it were tokens, where windows are shorter than the trial; else as it is."""
    kept = prefix.window
    if windowed and prefix.has_windows:
        prefix.window = "like_token"
    try:
        yield not windowed or prefix.window == "like_token"
    finally:
        prefix.window = kept


def _of(prefix: Prefix, seen: probe.Reach) -> list[Any]:
    """Keys and values of the prefix's layers, in its order."""
    if prefix.route == "cache":
        return list(seen.pairs)
    by_module = {id(m): pair for m, pair in zip(seen.modules, seen.pairs, strict=True)}
    return [by_module[id(module)] for module in prefix.hooks.modules]


def _state_beside(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """What the model's cache holds beside keys and values, if anything."""
    if "past_key_values" not in positions.names_of(model):
        return None
    output = positions.run(model, use_cache=True, **inputs)
    for layer in getattr(getattr(output, "past_key_values", None), "layers", []):
        for name, value in vars(layer).items():
            inner = value if isinstance(value, (list, tuple)) else [value]
            inner = list(value.values()) if isinstance(value, dict) else inner
            if name not in ("keys", "values") and any(
                isinstance(part, Tensor) and part.dim() > 2 for part in inner
            ):
                return str(name)
    return None


def _first(output: Any) -> Tensor:
    """The first floating-point tensor of an output."""
    values = output if isinstance(output, tuple) else tuple(output.values())
    found: Tensor = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    return found


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


def _in_step() -> bool:
    """Whether other processes must run the same forwards: no answer may decide which are run."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def _devices(model: nn.Module) -> list[torch.device]:
    found = {p.device for p in model.parameters()}
    return [device for device in found if device.type == "cuda"]


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Buffers that a forward changes get their values back."""
    kept = [(b, b.detach().clone(), b._version) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value, version in kept:
                if buffer._version != version:
                    buffer.copy_(value)
