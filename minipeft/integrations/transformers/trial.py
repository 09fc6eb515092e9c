"""A model with a trial's prefix: what it gives with it, without it, and how far it is from itself.

The trial's prefix is the keys and values of a text's own first tokens, recorded in a run over the
whole text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers import positions, probe
from minipeft.integrations.transformers.prefixes import Prefix
from minipeft.integrations.transformers.texts import PREFIX, TEXT, cut, invent
from minipeft.prefix import PrefixEncoder

NAME = "trial"  # of its prefix


class Trial:
    """A trial's prefix on a model that has no prefix yet.

    Raises:
        ValueError: the model cannot be run, with the prefix or without.
    """

    def __init__(self, model: nn.Module, prefix: Prefix, example: dict[str, Any] | None) -> None:
        self.model, self.prefix = model, prefix
        self.holder = prefix.hooks.holders[-1]
        self.is_text = example is None
        self.whole = invent(model, PREFIX + TEXT) if example is None else dict(example)
        self.rest = cut(self.whole, PREFIX) if example is None else self.whole
        with self._states() as found:
            seen = probe.look(model, **self.whole)
        self.recorded = found[-1] if found else None  # the states of the whole text
        pairs = pairs_of(prefix, seen)
        tokens = {k.shape[2] for k, _ in pairs}
        if self.is_text and tokens != {PREFIX + TEXT}:
            raise ValueError(
                f"attention of {type(model).__name__} sees {sorted(tokens)} keys for "
                f"{PREFIX + TEXT} tokens; a prefix cannot be told from what the model puts there"
            )
        repeats = -(-PREFIX // min(tokens))  # an example may be shorter
        first = [tuple(t[:1].repeat(1, 1, repeats, 1)[:, :, :PREFIX] for t in p) for p in pairs]
        self.encoder = PrefixEncoder(prefix.kv_shapes, PREFIX)
        self.encoder.to(positions.input_device(model))
        self.encoder.load_kv(first)
        prefix.encoders[NAME] = self.encoder
        self.with_prefix = self.run(self.rest, on=True)
        self.without = self.run(self.rest, on=False)
        self.rounding = rounding(self.without)
        self._noise: float | None = None

    def run(self, inputs: dict[str, Any], *, on: bool) -> Tensor:
        """The states (batch, tokens, size) that the innermost model makes of the inputs."""
        self.encoder.enabled = on
        with self._states() as found:
            output = positions.run(self.model, **inputs)
        return found[-1] if found else _first(output)

    def cache_of(self, inputs: dict[str, Any]) -> Any:
        """What the model returns to go on from, with the prefix."""
        self.encoder.enabled = True
        return positions.run(self.model, use_cache=True, **inputs).past_key_values

    def louder(self) -> Tensor:
        """Make the prefix four times as large, so that it is not lost among a text's own noise."""
        with torch.no_grad():
            for table in self.encoder.tables:
                table.mul_(4)
        return self.run(self.rest, on=True)

    def runs(self, inputs: dict[str, Any]) -> bool:
        """Whether the model runs on these inputs without a prefix."""
        try:
            self.run(inputs, on=False)
        except ValueError:
            return False
        return True

    def noise(self) -> float:
        """How far the model is from itself: in a batch of two, or going on from its own cache."""
        if self._noise is None:
            pair = {
                name: value.repeat(2, *[1] * (value.dim() - 1))
                if isinstance(value, Tensor) and value.dim() else value
                for name, value in self.rest.items()
            }  # fmt: skip
            alone = len(self.without)
            self._noise = difference(self.run(pair, on=False)[:alone], self.without)
            if self.is_text and self.recorded is not None and self.prefix.causal:
                self._noise = max(self._noise, self._noise_of_cache(self.recorded))
        return self._noise

    def _noise_of_cache(self, recorded: Tensor) -> float:
        start: dict[str, Any] = {name: ids[:, :PREFIX] for name, ids in self.whole.items()}
        self.encoder.enabled = False
        with self._states() as found:
            try:
                first = positions.run(self.model, use_cache=True, **start)
                cache = getattr(first, "past_key_values", None)
                if cache is None:
                    return 0.0
                positions.run(self.model, use_cache=True, past_key_values=cache, **self.rest)
            except ValueError:  # it takes no cache
                return 0.0
        return difference(found[-1], recorded[:, PREFIX:])

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


def rounding(states: Tensor) -> float:
    """The most by which sums in another order move such states.

    At least that of float32: models in float64 make their softmax in it (BLOOM, MPT).
    """
    eps = max(torch.finfo(states.dtype).eps, torch.finfo(torch.float32).eps)
    return 32 * eps * float(states.abs().max())


def pairs_of(prefix: Prefix, seen: probe.Reach) -> list[Any]:
    """Keys and values of the prefix's layers, in its order."""
    if prefix.route == "cache":
        return list(seen.pairs)
    by_module = {id(m): pair for m, pair in zip(seen.modules, seen.pairs, strict=True)}
    return [by_module[id(module)] for module in prefix.hooks.modules]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute one; infinite where the shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    return float((one.float() - other.float()).abs().max())


def _first(output: Any) -> Tensor:
    """The first floating-point tensor of an output."""
    values = output if isinstance(output, tuple) else tuple(output.values())
    found: Tensor = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    return found


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Random state is as before, and buffers that a forward changes get their values back."""
    kept = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    devices = [d for d in {p.device for p in model.parameters()} if d.type == "cuda"]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
