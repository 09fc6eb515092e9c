"""The attention that transformers calls where a prefix is attached.

A model whose config says "minipeft_sdpa" calls `sdpa` with the prefix in front of the keys and
values and in front of the mask, and nothing else changed: soft caps, sinks, dropout and scaling
reach the implementation that the model had.  The mask function is the model's own too, told to
build a mask even where sdpa could do without: a causal flag would hide the prefix.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn

from minipeft.prefix import KVShape, pad_mask, with_prefix

MARK = "minipeft_"
ATTRIBUTE = "_minipeft_prefix"  # on an attention module: (what has the encoder, layer number)


class Call(NamedTuple):
    """What one attention module handed over."""

    module: nn.Module
    shape: KVShape
    device: Any


_calls: ContextVar[list[Call] | None] = ContextVar("calls", default=None)


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Collect the calls of registered implementations within this context, in their order."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def own_implementation(name: str) -> str:
    """The implementation below ours: "sdpa" for "minipeft_sdpa", any other name as it is."""
    return name.removeprefix(MARK)


def bind(module: nn.Module, owner: nn.Module, layer: int) -> None:
    """Let `module` attend to that layer of `owner.encoder`; in its __dict__, not as a submodule."""
    module.__dict__[ATTRIBUTE] = (owner, layer)


def unbind(module: nn.Module) -> None:
    """Take the prefix off."""
    module.__dict__.pop(ATTRIBUTE, None)


@functools.cache
def register(name: str) -> str:
    """Make "minipeft_<name>" known to transformers, and return that.

    Raises:
        ValueError: `name` builds its masks in a form that no prefix can be put in front of.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if name != "eager" and (
        any(kind in name for kind in ("flash", "flex", "paged"))
        or name not in AttentionInterface._global_mapping
        or name not in AttentionMaskInterface._global_mapping
    ):
        raise ValueError(
            f"attach_prefix: attention implementation {name!r}; a prefix works with 'sdpa' and "
            "'eager': call model.set_attn_implementation('sdpa') first"
        )
    build_mask: Any = AttentionMaskInterface._global_mapping[name]

    def mask(*args: Any, **kwargs: Any) -> Any:
        kwargs["allow_is_causal_skip"] = kwargs["allow_is_bidirectional_skip"] = False
        return build_mask(*args, **kwargs)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if (calls := _calls.get()) is not None:
            calls.append(
                Call(module, KVShape(key.shape[1], key.shape[3], value.shape[3]), key.device)
            )
        if ATTRIBUTE in module.__dict__:
            owner, layer = module.__dict__[ATTRIBUTE]
            tokens = key.shape[2]
            key, value, length = with_prefix(key, value, *owner.encoder.layer(layer))
            if attention_mask is None:
                raise ValueError(
                    f"{type(module).__name__}: the model gave attention no mask; a prefix needs one"
                )
            if attention_mask.shape[-1] != tokens:
                raise ValueError(
                    f"{type(module).__name__}: the mask covers {attention_mask.shape[-1]} of "
                    f"{tokens} keys (the prefix takes no part in it)"
                )
            attention_mask = pad_mask(attention_mask, length)
        function = _function(name, module)
        return function(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(MARK + name, attend)
    AttentionMaskInterface.register(MARK + name, mask)
    return MARK + name


def _function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The implementation called `name`, looked up as the file of the module's class does it."""
    for cls in type(module).__mro__:
        file = sys.modules[cls.__module__]
        interface = getattr(file, "ALL_ATTENTION_FUNCTIONS", None)
        if interface is not None:
            eager = getattr(file, "eager_attention_forward", None)
            return interface.get_interface(name, eager)  # type: ignore[no-any-return]
    raise ValueError(f"{type(module).__name__}: the file of its class looks up no attention")
