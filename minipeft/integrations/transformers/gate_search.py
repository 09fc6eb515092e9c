"""Which module projects the heads of a layer's attention, and which columns are whose: by trying.

The model runs twice on a cache that notes which attention asks it.  Arguments of that attention
whose last axis has as many entries as there are keys, both times, are masks and biases over keys.
Then each attention runs again with made-up values, of which the cache doubles those of some heads.
The first module inside that notices gets the heads' outputs.  It must get exactly twice as much in
the columns of the doubled heads and the same in the others, and all that attention returns must
come through it: then its input can be blended by head.
"""

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers import positions
from minipeft.integrations.transformers.gates import Gates, Place
from minipeft.integrations.transformers.positions import Arguments, names_of
from minipeft.integrations.transformers.texts import PREFIX, TEXT, cut, invent, padded
from minipeft.integrations.transformers.trial import difference, rounding
from minipeft.prefix import PrefixEncoder

WHY = (
    "{name}: a gated prefix needs attention and projection apart, to blend the heads between them, "
    "but {what}.  Attach the prefix without gated=True; frozen=1 keeps a first position that "
    "attention can rest on"
)


def find(model: nn.Module, prefix: Any) -> list[Gates]:
    """The hooks for each layer of a model that is reached through its cache.

    Raises:
        ValueError: a model that is handed its past, or whose heads cannot be blended.
    """
    name = type(model).__name__
    gated = [own for own, encoder in prefix.encoders.items() if getattr(encoder, "gated", False)]
    if gated and prefix.hooks.by_slot:
        raise ValueError(
            f"{name} sees how far away a key is by counting what lies between (ALiBi), so a second "
            f"gated prefix would move {gated[0]!r}; attach this one without gated=True"
        )
    if prefix.hooks.gates:
        return list(prefix.hooks.gates)
    if prefix.route != "cache":
        what = "its layers are handed keys and values from outside (route 'past')"
        raise ValueError(WHY.format(name=name, what=what))
    on = [encoder for encoder in prefix.encoders.values() if encoder.enabled]
    prefix.enabled = False
    try:
        with torch.no_grad():
            places = _places(model, prefix.hooks.holders[0], len(prefix.kv_shapes))
    except _Unlike as error:
        raise ValueError(WHY.format(name=name, what=error)) from None
    finally:
        for encoder in on:
            encoder.enabled = True
    return [Gates(prefix, number, place) for number, place in enumerate(places)]


def prove(model: nn.Module, prefix: Any) -> None:
    """A prefix whose gates are closed must change nothing, and open gates must change something.

    Asked of a padded text, and of its last tokens on a cache of the first.

    Raises:
        ValueError: it is not so; the message gives the difference.
    """
    on = [encoder for encoder in prefix.encoders.values() if encoder.enabled]
    encoder = PrefixEncoder(prefix.kv_shapes, PREFIX, init_std=1.0, gated=True)
    encoder.to(positions.input_device(model))
    text = invent(model, TEXT)
    longer: dict[str, Any] = padded(model, text, left=True) or text
    name, trial = type(model).__name__, "gates"

    def states(strength: float | None) -> Tensor:
        """Of the innermost model; None: without the trial's prefix."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output.last_hidden_state[:, -2:])

        encoder.enabled = strength is not None
        with torch.no_grad():
            for gate in encoder.gates:
                gate.fill_(strength or 0.0)
        with ExitStack() as undo:
            undo.callback(prefix.hooks.holders[0].register_forward_hook(keep).remove)
            positions.run(model, **longer)
            start: dict[str, Any] = {n: ids[:, :-2] for n, ids in text.items()}
            cache = positions.run(model, use_cache=True, **start).past_key_values
            positions.run(model, use_cache=True, past_key_values=cache, **cut(text, TEXT - 2))
        return torch.cat([found[0], found[-1]])

    prefix.enabled = False
    prefix.encoders[trial] = encoder
    try:
        without, closed, opened = (states(strength) for strength in (None, 0.0, 1.0))
    finally:
        del prefix.encoders[trial]
        for other in on:
            other.enabled = True
    error, limit = difference(closed, without), rounding(without)
    if error > limit:
        what = (
            f"a prefix with closed gates changes it by {error:.1e}, where rounding is {limit:.1e}"
        )
        raise ValueError(WHY.format(name=name, what=what))
    if difference(opened, without) <= 8 * limit:
        raise ValueError(WHY.format(name=name, what="a prefix with open gates changes nothing"))


class _Unlike(Exception):
    """Why heads cannot be blended."""


class _Asked(NamedTuple):
    """One call of an attention module, from which it asked the cache."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Notes:
    """A cache of transformers' own that notes who asks it, and hands out other values if told."""

    def __init__(self, holder: nn.Module) -> None:
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=holder.config)  # type: ignore[arg-type]
        self.cache = cache
        self.running: list[_Asked] = []
        self.asked: dict[int, _Asked] = {}  # by layer
        self.values: Tensor | None = None
        self.store = self.cache.update
        self.cache.update = self.update

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """What the cache gives, or the values that it was told to give."""
        if self.values is not None:
            return self.cache.layers[layer_idx].keys, self.values
        self.asked[layer_idx] = self.running[-1]
        return self.store(k, v, layer_idx, *args, **kwargs)

    def run(self, model: nn.Module, batch: int, first: int, new: int) -> None:
        """`new` tokens on a cache of `first`."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append(_Asked(module, args, kwargs))

        text = {n: ids.expand(batch, -1) for n, ids in invent(model, first + new).items()}
        with ExitStack() as undo:
            for module in model.modules():
                for handle in (
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(lambda *_: self.running.pop() and None),
                ):
                    undo.callback(handle.remove)
            for part in ({n: ids[:, :first] for n, ids in text.items()}, cut(text, first)):
                positions.run(model, use_cache=True, past_key_values=self.cache, **part)


def _places(model: nn.Module, holder: nn.Module, layers: int) -> list[Place]:
    sizes = ((1, 2, 3), (2, 3, 4))  # rows, tokens in the cache, new tokens
    notes = [_Notes(holder) for _ in sizes]
    for note, size in zip(notes, sizes, strict=True):
        note.run(model, *size)
    with positions.quietly(model):
        return [
            _place([note.asked[n] for note in notes], [5, 7], notes[1], n) for n in range(layers)
        ]


def _by_key(calls: list[_Asked], keys: list[int]) -> list[str]:
    """The arguments whose last axis has an entry for each key."""
    names = list(dict.fromkeys([*names_of(calls[0].module), *calls[0].kwargs]))
    found = []
    for name in names:
        both = [Arguments(names, call.args, call.kwargs)[name] for call in calls]
        if all(
            isinstance(value, Tensor) and value.dim() > 1 and value.shape[-1] == count
            for value, count in zip(both, keys, strict=True)
        ):
            one, two = (len(value) for value in both)
            if two != 2 * one and (one, two) != (1, 1):
                raise _Unlike(f"{name} of {type(calls[0].module).__name__} has rows of no batch")
            found.append(name)
    return found


def _place(calls: list[_Asked], keys: list[int], notes: _Notes, layer: int) -> Place:
    module, args, kwargs = calls[-1]
    name = type(module).__name__
    kept = notes.cache.layers[layer].values
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(kept.shape, generator=draw).to(kept.device, kept.dtype)
    fixed: dict[str, Tensor] = {}

    def again(scale: Tensor | int) -> tuple[dict[str, list[Tensor]], Tensor]:
        """What the modules inside get, in the order of their calls, and attention's output."""
        inputs: dict[str, list[Tensor]] = {}

        def note(inner: str) -> Any:
            def hook(_: nn.Module, given: tuple[Any, ...]) -> Any:
                if given and isinstance(given[0], Tensor):
                    inputs.setdefault(inner, []).append(given[0])
                return (fixed[inner], *given[1:]) if inner in fixed else None

            return hook

        notes.values = values * scale
        with ExitStack() as undo:
            for inner, part in module.named_modules():
                if part is not module:
                    undo.callback(part.register_forward_pre_hook(note(inner)).remove)
            output = module.forward(*args, **kwargs)
        return inputs, output[0] if isinstance(output, tuple) else output

    numbers = torch.arange(1, kept.shape[1] + 1, device=kept.device)
    doubled = [(numbers >> bit) & 1 for bit in range(kept.shape[1].bit_length())]
    first, output = again(1)
    rounds = [again(1 + some.to(kept.dtype)[:, None, None])[0] for some in doubled]
    noticed = (n for n in first if not all(_same(first[n], other.get(n, [])) for other in rounds))
    if (projection := next(noticed, None)) is None or len(first[projection]) != 1:
        raise _Unlike(f"{name} has no module of its own that projects the heads")
    [base] = first[projection]
    heads = torch.zeros(base.shape[-1], dtype=torch.long, device=base.device)
    for bit, inputs in enumerate(rounds):
        [found] = inputs[projection]
        once, twice = _columns_equal(found, base), _columns_equal(found, 2 * base)
        if not bool((once ^ twice).all()):
            raise _Unlike(
                f"what {projection} of {name} gets is not the heads' outputs side by side"
            )
        heads += twice.long() << bit
    if sorted(set(heads.tolist())) != numbers.tolist():
        raise _Unlike(f"{projection} of {name} does not get the outputs of all heads")
    fixed[projection] = base
    if not bool(_columns_equal(again(2)[1], output).all()):
        raise _Unlike(f"{name} uses the heads' outputs beside {projection} too")
    return Place(module, projection, heads - 1, _by_key(calls, keys))


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _columns_equal(one: Tensor, other: Tensor) -> Tensor:
    """Which columns are equal: the same sums, in another order at most."""
    one, other = one.flatten(0, -2).float(), other.flatten(0, -2).float()
    limit = 16 * torch.finfo(one.dtype).eps * other.abs().amax(0)
    return (one - other).abs().amax(0) <= limit
