"""Route B: the attention that transformers calls where a prefix is attached.

A model whose config says "minipeft3_sdpa" calls `sdpa` with the keys and values of prefix number 3
in front.  Nothing else changes: soft caps, sinks, dropout and scaling reach the implementation that
the model had.  The mask function is the model's own too.  It is told to build a mask even where
sdpa needs none (a causal flag would hide the prefix), and the prefix's columns are put in front.

The mask alone says who sees what.  It is made once in a forward and handed to each layer, so that
a layer computed again by gradient checkpointing sees the same as before.
"""

import itertools
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.integrations.transformers.masks import Query, moved, put_in_front
from minipeft.prefix import KVShape, gated_attention, with_prefix

MARK = re.compile(r"minipeft(\d+)_")
ATTRIBUTE = "_minipeft_prefix"  # on an attention module: (owner of the prefix, layer number)
HELD = "_minipeft_held"  # on a model whose forward a prefix hooks
COVERED = "_minipeft_covered"  # on a mask whose first columns are the prefix's: a Stamp
PLAIN = "_minipeft_plain"  # on a mask with which no prefix takes part: a prompt's own run
SWITCHED = (
    "a prefix was switched after this forward, before checkpointing computed it again in backward; "
    "call backward() first"
)
_numbers = itertools.count()
# Owners of the registered names.  The names of those that are gone are taken out when a prefix is
# attached or removed, not when Python frees the owner: that may be in the middle of a call that
# reads transformers' table, as torch.compile does.
_owners: dict[str, weakref.ref[nn.Module]] = {}


@runtime_checkable
class Owner(Protocol):
    """What the registered functions ask of a Prefix."""

    def is_on(self) -> bool:
        """Whether any prefix takes part."""
        ...

    def names(self) -> tuple[Any, ...]:
        """Which prefixes take part, to tell the mask of one choice from that of another."""
        ...

    def columns(self) -> int:
        """The number of all prefix positions that take part, in any row."""
        ...

    def layer(self, layer: int) -> list["Part"]:
        """Keys and values of one layer, a part for each prefix, in the order of the columns."""
        ...

    def visible(self, query: Query) -> Tensor | None:
        """Which columns each query sees, (batch, 1, 1 or queries, columns); None: all."""
        ...

    def as_tokens(self, query: Query) -> Tensor | None:
        """By how much each row's tokens count as further, (batch,); None: where they are."""
        ...


class Stamp(NamedTuple):
    """Whose columns are in a mask."""

    owner: int
    names: tuple[Any, ...]
    columns: int


def stamped(mask: Tensor | None, owner: Owner) -> Tensor | None:
    """The mask, which now says whose columns it has in front."""
    if mask is not None:  # generate builds masks ahead, checkpointing uses them again
        setattr(mask, COVERED, Stamp(id(owner), owner.names(), owner.columns()))
    return mask


class Part(NamedTuple):
    """One prefix in one layer; `columns` is the number of its columns in the mask."""

    k: Tensor  # (kv_heads, prefix, key_dim)
    v: Tensor
    gate: Tensor | None  # (kv_heads,), see `gated_attention`
    columns: int


def joined(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Keys and values of all parts, one after the other, (kv_heads, prefix, dim) each."""
    return torch.cat([part.k for part in parts], 1), torch.cat([part.v for part in parts], 1)


class Call(NamedTuple):
    """What one attention module handed over."""

    module: nn.Module
    query: Tensor  # (batch, heads, queries, key_dim)
    window: int | None  # of sliding-window attention
    k: Tensor  # (batch, kv_heads, tokens, key_dim)
    v: Tensor

    @property
    def shape(self) -> KVShape:
        """Heads and sizes."""
        return KVShape(self.k.shape[1], self.k.shape[3], self.v.shape[3])


class Calls(list[Call]):
    """Calls in their order, and the windows (or chunks) of the masks that were built for them."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[int | None] = []


_calls: ContextVar[tuple[Calls, bool] | None] = ContextVar("calls", default=None)


@contextmanager
def recording(*, graph: bool = False) -> Iterator[Calls]:
    """Collect the calls of registered implementations within this context, in their order.

    `graph`: gradients flow through their keys and values.
    """
    calls = Calls()
    token = _calls.set((calls, graph))
    try:
        yield calls
    finally:
        _calls.reset(token)


def is_recording() -> bool:
    """Whether calls are collected right now: the configs name what does it."""
    return not torch.compiler.is_compiling() and _calls.get() is not None


def own_implementation(name: str) -> str:
    """The implementation below ours: "sdpa" for "minipeft3_sdpa", any other name as it is."""
    return MARK.sub("", name, count=1) if MARK.match(name) else name


def register(name: str, owner: nn.Module | None, number: int | None = None) -> str:
    """Make "minipeft<number>_<name>" known to transformers for one prefix, and return that.

    The name stays until the prefix is removed.  If Python frees the prefix first, the name goes
    when the next one is registered.  Without an owner it only serves `recording`.

    Raises:
        ValueError: no columns can be put in front of the masks that `name` builds.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if name != "eager" and (
        any(kind in name for kind in ("flash", "flex", "paged"))
        or name not in AttentionInterface._global_mapping
        or name not in AttentionMaskInterface._global_mapping
    ):
        raise ValueError(
            f"attention implementation {name!r}; a prefix works with 'sdpa' and "
            "'eager': call model.set_attn_implementation('sdpa') first"
        )
    known = f"minipeft{next(_numbers) if number is None else number}_{name}"
    if known in AttentionInterface._global_mapping:
        return known
    for gone in [other for other, owner_of in list(_owners.items()) if owner_of() is None]:
        forget(gone)
    build_mask: Any = AttentionMaskInterface._global_mapping[name]
    reference: Callable[[], Any] = (lambda: None) if owner is None else weakref.ref(owner)

    def mask(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and (seen := _calls.get()) is not None:
            seen[0].windows.append(kwargs.get("local_size"))
        found: Owner | None = reference()
        if found is None or not found.is_on():
            return build_mask(*args, **kwargs)
        kwargs["allow_is_causal_skip"] = kwargs["allow_is_bidirectional_skip"] = False
        query = Query.of(kwargs)
        if (before := found.as_tokens(query)) is not None:
            kwargs["mask_function"] = moved(kwargs["mask_function"], before)
        built = build_mask(*args, **kwargs)
        covered = put_in_front(built, found.visible(query), found.columns())
        return stamped(covered, found)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # tracing cannot read context variables, and a probe is never compiled
        if not torch.compiler.is_compiling() and (seen := _calls.get()) is not None:
            calls, graph = seen
            pair = (key, value) if graph else (key.detach(), value.detach())
            calls.append(Call(module, query, kwargs.get("sliding_window"), *pair))
        function = _function(name, module)
        found: Owner | None = reference()
        if found is None or hasattr(attention_mask, PLAIN):
            return function(module, query, key, value, attention_mask, **kwargs)
        if not found.is_on():
            if hasattr(attention_mask, COVERED):
                raise ValueError(f"{type(module).__name__}: {SWITCHED}")
            return function(module, query, key, value, attention_mask, **kwargs)
        columns = found.columns()
        if attention_mask is None and not getattr(module, "is_causal", True):
            attention_mask = _where_rows_differ(query, key, found)
        attention_mask = _checked(module, attention_mask, key.shape[2], found)
        if ATTRIBUTE not in module.__dict__:  # a location without a prefix
            own = None if attention_mask is None else attention_mask[..., columns:]
            return function(module, query, key, value, own, **kwargs)

        def with_parts(chosen: list[bool]) -> Any:
            """The implementation, over the chosen prefixes and the tokens."""
            return _over(function, module, query, key, value, attention_mask, kwargs, parts, chosen)

        parts = found.layer(module.__dict__[ATTRIBUTE][1])
        plain = [part.gate is None for part in parts]
        alone, *rest = with_parts(plain)
        alone = out = alone.transpose(1, 2)  # (batch, heads, queries, dim)
        for number, part in enumerate(parts):
            if part.gate is not None:
                whole = with_parts([p or i == number for i, p in enumerate(plain)])[0]
                out = gated_attention(alone, whole.transpose(1, 2), part.gate, others=out)
        return (out.transpose(1, 2), *rest)

    AttentionInterface.register(known, attend)
    AttentionMaskInterface.register(known, mask)
    if owner is not None:
        _owners[known] = weakref.ref(owner)
    return known


def name(configs: list[Any], owner: nn.Module, number: int | None) -> int:
    """Let the configs name the attention with the prefix `number`; None: one that is free."""
    if number is None:
        number = next(_numbers)
    for config in configs:
        own = own_implementation(config._attn_implementation)
        wanted = f"minipeft{number}_{own}"
        if config._attn_implementation != wanted:
            register(own, owner, number)
            config._attn_implementation_internal = wanted
    return number


def forget(known: str) -> None:
    """Take a registered name out again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    _owners.pop(known, None)
    AttentionInterface._global_mapping.pop(known, None)
    AttentionMaskInterface._global_mapping.pop(known, None)


def _where_rows_differ(query: Tensor, key: Tensor, owner: Owner) -> Tensor | None:
    """A mask for attention that has none, whose queries see all tokens; None: the prefix too."""
    batch, _, queries, _ = query.shape
    visible = owner.visible(Query(batch, queries, 0, None, None, query.device))
    if visible is None:
        return None
    every = torch.ones(batch, 1, queries, key.shape[2], dtype=torch.bool, device=query.device)
    covered: Tensor = put_in_front(every, visible, owner.columns())
    return covered


def _checked(module: nn.Module, mask: Tensor | None, tokens: int, owner: Owner) -> Tensor | None:
    """The mask, if it covers prefix and tokens."""
    name, columns = type(module).__name__, owner.columns()
    stamp: Stamp | None = getattr(mask, COVERED, None)
    if stamp is not None and stamp.names != owner.names():
        raise ValueError(f"{name}: {SWITCHED}")
    if mask is None:
        if ATTRIBUTE not in module.__dict__ or not getattr(module, "is_causal", True):
            return None  # every query sees every key, and so the prefix
        raise ValueError(f"{name}: the model gave attention no mask; a prefix needs one")
    if mask.shape[-1] < columns + tokens and not getattr(module, "is_causal", True):
        raise ValueError(
            f"{name} looks ahead, and its mask covers {mask.shape[-1] - columns} of {tokens} keys: "
            "with a prefix, a text whose tokens look ahead cannot go on from a cache; pass "
            "use_cache=False (to generate too), or make the model with is_decoder=True"
        )
    if mask.shape[-1] != columns + tokens:
        raise ValueError(
            f"{name}: the mask covers {mask.shape[-1] - columns} of {tokens} keys (the prefix of "
            f"{columns} takes no part in it)"
        )
    return mask


def _over(
    function: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, kwargs: dict[str, Any], parts: list[Part], chosen: list[bool],
) -> Any:  # fmt: skip
    """`function` over the chosen parts and the tokens."""
    taken = [part for part, take in zip(parts, chosen, strict=True) if take]
    if mask is not None and not all(chosen):
        sizes = [part.columns for part in parts]
        pieces = torch.split(mask, [*sizes, key.shape[2]], dim=-1)
        mask = torch.cat([p for p, take in zip(pieces, [*chosen, True], strict=True) if take], -1)
    if taken:
        key, value, length = with_prefix(key, value, *joined(taken))
        if isinstance(kwargs.get("position_bias"), Tensor):  # T5's, of tokens: a prefix has none
            kwargs = {**kwargs, "position_bias": F.pad(kwargs["position_bias"], (length, 0))}
    return function(module, query, key, value, mask, **kwargs)


def _function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The implementation called `name`, looked up as the file of the module's class does it."""
    for cls in type(module).__mro__:
        file = sys.modules[cls.__module__]
        interface = getattr(file, "ALL_ATTENTION_FUNCTIONS", None)
        if interface is not None:
            eager = getattr(file, "eager_attention_forward", None)
            return interface.get_interface(name, eager)  # type: ignore[no-any-return]
    raise ValueError(f"{type(module).__name__}: the file of its class looks up no attention")
