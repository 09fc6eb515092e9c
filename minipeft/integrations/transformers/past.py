"""Route C: attention modules that are handed their own layer's past keys and values.

Models from before transformers had caches pass a tuple of (keys, values) pairs, one for each layer.
Each attention module gets its pair as an argument, puts new keys behind it and returns the whole.
The prefix goes in front of the pair on the way in, and off the returned pair on the way out; so the
user's tuple holds real tokens only.  Masks are extended where attention gets them, since by then
the model has built its own; masks that hold distances too (ALiBi) are refused.

Which module, which argument and which axis holds the tokens are found by trying: the module that
returned a layer's pair runs once more, with one made-up token as its past.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers.attention import Owner, joined
from minipeft.integrations.transformers.masks import Query
from minipeft.integrations.transformers.positions import Arguments, names_of, quietly
from minipeft.prefix import with_prefix

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layer:
    """One attention module: the argument that takes its past, its masks, and the layout of pairs.

    `order` has the axes of batch, heads, tokens and size in the module's layout; `attend` is what
    its masks hold where a query sees a key (None: it was given no mask).  `trains` says whether the
    module looks at its past in training mode too.
    """

    module: nn.Module
    argument: str
    order: tuple[int, int, int, int]
    attend: bool | float | None
    trains: bool = True

    @property
    def tokens(self) -> int:
        """The axis of the tokens."""
        return self.order[2]

    def plain(self, pair: Pair) -> Pair:
        """(batch, heads, tokens, size) of a pair of the module's layout."""
        k, v = (t.permute(self.order) for t in pair)
        return k, v

    def own(self, pair: Pair) -> Pair:
        """The module's layout of such a pair."""
        back = [self.order.index(axis) for axis in range(4)]
        k, v = (t.permute(back).contiguous() for t in pair)
        return k, v


def is_pair(value: Any) -> bool:
    """Whether this is the keys and values of one layer."""
    return (
        isinstance(value, tuple) and len(value) == 2
        and all(isinstance(t, Tensor) and t.dim() == 4 for t in value)
    )  # fmt: skip


class NotFound(Exception):
    """Why no module was found that takes its layer's past."""


def find(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Layer], list[Pair]]:
    """The attention modules in the order of the model's layers, and the pairs that they returned.

    `run` runs the model and lets it return a cache; pairs are (batch, heads, tokens, size).

    Raises:
        NotFound: the model returns no tuple of pairs, or not every layer's module takes its pair.
    """
    returned: dict[int, tuple[nn.Module, Any, Any]] = {}  # by the keys' identity: the innermost
    kept: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else ():
            if is_pair(value):
                kept.append(value)
                returned.setdefault(id(value[0]), (module, args, kwargs))

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        cache = getattr(run(), "past_key_values", None)
    finally:
        for handle in handles:
            handle.remove()
    if not (isinstance(cache, tuple) and cache and all(is_pair(pair) for pair in cache)):
        raise NotFound("it returns no pair of keys and values for each layer")
    layers = []
    for number, pair in enumerate(cache):
        if id(pair[0]) not in returned:
            raise NotFound(f"no module returned the keys of layer {number}")
        layers.append(_tried(*returned[id(pair[0])], pair))
    return layers, [layer.plain(pair) for layer, pair in zip(layers, cache, strict=True)]


def _tried(module: nn.Module, args: Any, kwargs: Any, pair: Pair) -> Layer:
    """How this module takes its past: each argument that was None gets one made-up token."""
    name, names = type(module).__name__, names_of(module)
    given = Arguments(names, args, kwargs)
    optional = [
        n for n, p in inspect.signature(module.forward).parameters.items()
        if given[n] is None and p.default is None
    ]  # fmt: skip
    states = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    masks = [name for name, _ in _masks(names, given)]
    attend = None
    for mask in masks:  # the last token sees the first
        attend = given[mask][(0,) * (given[mask].dim() - 2)][-1, 0].item()
        if _has_distances(given[mask]):
            raise NotFound(
                f"{name} adds {mask} to its scores, and it holds other numbers for near keys than "
                "for far ones (as ALiBi does), which a prefix would need too"
            )
    for argument in optional:
        for axis in (0, 1, 2):
            past = tuple(torch.zeros_like(t.narrow(axis, 0, 1)) for t in pair)
            changed = Arguments(names, args, kwargs)
            changed[argument] = past
            for mask in masks:
                changed[mask] = _in_front(changed[mask], pair[0].shape[axis], 1, attend, None)
            try:
                with quietly(module):
                    output = module.forward(*changed.args, **changed.kwargs)
            except Exception:  # not this argument, or not this axis
                continue
            grown = [v for v in output if is_pair(v)] if isinstance(output, tuple) else []
            sizes = [*pair[0].shape]
            sizes[axis] += 1
            if not grown or [*grown[0][0].shape] != sizes:
                continue
            batch, heads = (a for a in (0, 1, 2) if a != axis)
            if states.shape[int(batch > axis)] != pair[0].shape[batch]:
                continue
            trains = _trains(module, changed, argument)
            return Layer(module, argument, (batch, heads, axis, 3), attend, trains)
    raise NotFound(f"{name} takes no past keys and values in any of {optional}")


def _trains(module: nn.Module, given: Arguments, argument: str) -> bool:
    """Whether another past changes the module's output in training mode as well.

    Both runs start from the same random state, so that dropout is no difference.
    """
    past, states = given[argument], []
    devices = [t.device for t in past if t.device.type == "cuda"][:1]
    with quietly(module):
        module.train()
        for value in (0, 1):
            given[argument] = tuple(torch.full_like(t, value) for t in past)
            try:
                with torch.random.fork_rng(devices):
                    output = module.forward(*given.args, **given.kwargs)
            except Exception:  # in training it takes no past at all
                return False
            states.append(output[0] if isinstance(output, tuple) else output)
    return not torch.equal(*states)


def _masks(names: list[str], given: Arguments) -> list[tuple[str, Tensor]]:
    """The arguments that say who sees whom."""
    found = [(name, given[name]) for name in names if "mask" in name]
    return [(n, mask) for n, mask in found if isinstance(mask, Tensor) and mask.dim() > 1]


def _has_distances(mask: Tensor) -> bool:
    """Whether an additive mask makes differences among the keys that it lets a query see."""
    if not mask.is_floating_point() or bool(((mask == 0) | (mask == 1)).all()):
        return False
    mask = mask.float()
    seen = mask[(mask - mask.max()).exp() > 0]  # others vanish in softmax
    return bool(seen.min() != seen.max())


def _in_front(mask: Tensor, keys: int, columns: int, attend: Any, visible: Tensor | None) -> Tensor:
    """The mask with columns in front that `visible` (batch, 1, 1 or queries, columns) says.

    A mask that has one column for all keys stays as it is.
    """
    if mask.shape[-1] != keys:
        return mask
    front = torch.full_like(mask[..., :1], attend).expand(*mask.shape[:-1], columns)
    if visible is not None:
        added = mask.is_floating_point() and attend != 1
        hidden = torch.finfo(mask.dtype).min if added else not attend
        front = torch.where(visible, torch.full_like(mask[..., :1], attend),
                            torch.full_like(mask[..., :1], hidden))  # fmt: skip
        mask = mask.expand(*front.shape[:-1], -1)
    return torch.cat([front, mask], dim=-1)


class Feeder:
    """The two hooks of one layer's attention module: a class, so that it can be copied."""

    def __init__(self, owner: Owner, number: int, layer: Layer) -> None:
        self.owner, self.number, self.layer = owner, number, layer
        self.names = names_of(layer.module)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put the prefix in front of the past, and its columns in front of the masks."""
        if not self.owner.is_on():
            return None
        given, layer = Arguments(self.names, args, kwargs), self.layer
        if module.training and not layer.trains:
            raise ValueError(
                f"{type(module).__name__} does not look at its past in training mode, so that it "
                "would not see the prefix; call eval() on the model: a prefix trains there too"
            )
        past = given[layer.argument]
        states = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        batch_axis = int(layer.order[0] > layer.tokens)
        batch, new = states.shape[batch_axis], states.shape[1 - batch_axis]
        prefix = joined(self.owner.layer(self.number))
        if past is None:
            k, v = (states.new_empty(batch, t.shape[-3], 0, t.shape[-1]) for t in prefix)
        else:
            k, v = layer.plain((past[0], past[1]))
        k, v, columns = with_prefix(k, v, *prefix)
        given[layer.argument] = layer.own((k, v))
        visible = self.owner.visible(Query(batch, new, 0, None, None, states.device))
        keys, extended = k.shape[2] - columns + new, False
        for name, mask in _masks(self.names, given):
            attend = layer.attend
            if attend is None:  # no mask was seen: as in PyTorch
                attend = mask.dtype == torch.bool
            given[name] = _in_front(mask, keys, columns, attend, visible)
            extended |= given[name] is not mask
        if visible is not None and not extended:
            raise ValueError(
                f"{type(module).__name__} got no mask that covers its {keys} keys, and rows of the "
                "batch see prefixes of their own; pass an attention_mask"
            )
        return given.args, given.kwargs

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Take the prefix off the pair that the module returns."""
        if not self.owner.is_on() or not isinstance(output, tuple):
            return None
        axis, columns = self.layer.tokens, self.owner.columns()

        def cut(t: Tensor) -> Tensor:
            return t.narrow(axis, columns, t.shape[axis] - columns)

        return tuple((cut(v[0]), cut(v[1])) if is_pair(v) else v for v in output)

    def hook(self) -> list[Any]:
        """Put both hooks on the module; returns their handles."""
        return [
            self.layer.module.register_forward_pre_hook(self.before, with_kwargs=True),
            self.layer.module.register_forward_hook(self.after),
        ]
