"""What happens before and after each forward of a model that has a prefix.

Before: the config names the attention with the prefix, tokens are numbered, and the caller's masks
get the prefix's columns; on route A a view takes the cache's place.  After: the caller's cache is
back in its place.

All that the library leaves outside its own layers, why, and who takes it off (a test compares a
model before and after, tests/integrations/transformers/test_hooks.py):

For the whole process
    torch.ops.minipeft, ops.OPERATORS               the operators and what computes them; stay
    torch's flop counter, sys.meta_path             counts our products (fast/flops.py); the finder
                                                    goes once the counter is imported
    inject.after_swap                               who is told of a changed model: buffers.release,
                                                    and save_pretrained.adopt once io is imported
    Attention(Mask)Interface._global_mapping        "minipeft<n>_sdpa": how a prefix is reached
                                                    (attention.register); gone when the prefix is
                                                    removed, or with the next attach_prefix
On a model that has a prefix, until Prefix.remove
    forward hooks of holders and embeddings         this file
    config, a copy                                  shared configs stay as they are; the copy stays
    config._attn_implementation_internal            names the attention above; own name put back
    _minipeft_prefix, _minipeft_held                on attention (owner, layer), on holders
    forward hooks of attention modules              route C (past.py)
    forward hooks of attention and its projection   route A, once a prefix has gates (gates.py)
    _can_checkpoint_with_cache                      route A: checkpointed layers keep the cache
    minipeft_prefix                                 the submodule with the encoders
On a model that has any adapter, until the last is removed
    _minipeft_adapters                              which adapter is called what (adapters/names.py)
    save_pretrained                                 writes adapters (io/save_pretrained.py); a model
                                                    with 4-bit layers keeps it
    train, _minipeft_mode, _minipeft_buffers        the base's statistics stand still
                                                    (model/buffers.py)
For the time of a call, or with the object they are on
    _minipeft_covered, _minipeft_plain              on masks and caches: whose columns they have
    _minipeft_prompts                               on a cache: the prompts' keys it was filled with
    gradient_checkpointing                          off while a prompt is run (prompt_runs.py)
    LastRun                                         a prompt's last run, per thread while it lives
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.integrations.transformers import attention, positions
from minipeft.integrations.transformers.cache import PrefixedCache
from minipeft.integrations.transformers.gates import Gates
from minipeft.integrations.transformers.masks import Query, before_tokens, put_in_front
from minipeft.integrations.transformers.past import Feeder
from minipeft.integrations.transformers.positions import Arguments, names_of
from minipeft.integrations.transformers.probe import Reach

READS_ONLY = "_can_checkpoint_with_cache"  # of transformers' layers: see `allow_checkpointing`


class Hooks:
    """The hooks of one Prefix on the models that make the masks (`holders`)."""

    def __init__(self, prefix: Any, reach: Reach) -> None:
        self.route, self.holders, self.modules = reach.route, reach.holders, reach.modules
        self.rule, self.by_slot = reach.rule, reach.by_slot
        self.names = [names_of(holder) for holder in reach.holders]
        self.rows = [positions.table_rows(holder) for holder in reach.holders]
        self.number: int | None = None  # of the registered functions; a copy gets its own
        self.prefix = prefix
        for holder in reach.holders:
            holder.__dict__[attention.HELD] = True
        self.allowed: list[nn.Module] = []
        for layer, module in enumerate(reach.modules):
            module.__dict__[attention.ATTRIBUTE] = (prefix, layer)  # not as a submodule
        self.handles = []
        for index, holder in enumerate(reach.holders):
            before = _Before(self, index)
            self.handles.append(holder.register_forward_pre_hook(before, with_kwargs=True))
            if (table := positions.embedding_of(holder)) is not None:
                self.handles.append(table.register_forward_hook(_Embedded(self, index)))
            if self.route == "cache":
                self.handles.append(holder.register_forward_hook(_after, with_kwargs=True))
        self.feeders = [Feeder(prefix, n, layer) for n, layer in enumerate(reach.layers)]
        for feeder in self.feeders:
            self.handles += feeder.hook()
        if self.route == "cache":
            self.allowed = allow_checkpointing(reach.holders)
        self.only_distance = False  # of a model with gates: whether all that counts is distance
        self.gates: list[Gates] = []  # of route A, once a prefix has gates

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "number": None}

    def remove(self) -> None:
        """Take the hooks off; the configs name what they named before."""
        for handle in self.handles:
            handle.remove()
        self.take_gates([])
        for module in self.modules:
            module.__dict__.pop(attention.ATTRIBUTE, None)
        for holder in self.holders:
            holder.__dict__.pop(attention.HELD, None)
        for module in self.allowed:
            module.__dict__.pop(READS_ONLY, None)
        if self.route == "attention":
            for config in self.configs():
                current = config._attn_implementation
                own = attention.own_implementation(current)
                config._attn_implementation_internal = own
                if own != current:
                    attention.forget(current)

    def take_gates(self, gates: list[Gates]) -> None:
        """Let these layers blend their heads by gates, and no others."""
        for old in self.gates:
            old.remove()
        for new in gates:
            new.hook()
        self.gates = gates

    def name_attention(self) -> None:
        """Let the configs name the attention with the prefix, over the one that they name now.

        The name stays while the prefix is off: that attention then hands everything on as it is.
        """
        self.number = attention.name(self.configs(), self.prefix, self.number)

    def configs(self) -> list[Any]:
        """Those of the holders and of the attention modules, each once."""
        configs = [module.config for module in (*self.holders, *self.modules)]
        return list({id(config): config for config in configs}.values())

    def checkpointing(self, holder: nn.Module) -> bool:
        """Whether layers are computed again in backward."""
        if not holder.training or not torch.is_grad_enabled():
            return False
        return any(getattr(m, "gradient_checkpointing", False) for m in holder.modules())


class _Before:
    """The pre-forward hook of one holder: a class, so that it can be copied and pickled."""

    def __init__(self, hooks: Hooks, index: int) -> None:
        self.hooks, self.index = hooks, index

    def __call__(
        self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hooks, prefix = self.hooks, self.hooks.prefix
        if hooks.route == "attention" and not attention.is_recording():
            hooks.name_attention()
        if not prefix.is_on():
            return None
        axis = hooks.feeders[0].layer.tokens if hooks.feeders else 2
        given = Arguments(hooks.names[self.index], args, kwargs, axis)
        if any(hasattr(given[n], attention.PLAIN) for n in ("past_key_values", "attention_mask")):
            return None
        pad = positions.padding_id(holder)
        positions.check_mask(given)
        if (
            prefix.window == "like_token" and prefix.has_windows
            and mask_is_packed(given, given["past_key_values"])
        ):  # fmt: skip
            raise ValueError(
                f"{type(holder).__name__}: position_ids start anew within a row, which says that "
                "texts are packed; a prefix that windows leave behind needs each text padded"
            )
        batch, length = positions.tokens(given).shape[:2]
        if (
            torch.compiler.is_compiling()
            and prefix.window == "like_token"
            and prefix.has_windows
            and all(given[n] is None for n in ("attention_mask", "position_ids", "past_key_values"))
        ):  # a traced model without a mask always asks for packed texts, which moved() would miss
            device = positions.tokens(given).device
            given["attention_mask"] = torch.ones(batch, length, dtype=torch.long, device=device)
        takes_numbers = "position_ids" in hooks.names[self.index]
        if hooks.rule is not None and takes_numbers:
            counted = prefix.shift(batch)
            shift = counted if prefix.position == "shift" else 0
            if hooks.only_distance:
                counted = prefix.shift(batch, gated=True)
            if hooks.route == "cache" or prefix.position == "shift" or hooks.rule == "counted":
                positions.renumber(given, hooks.rule, pad, shift, counted)
        prefix.before_forward(holder, given)
        if not torch.compiler.is_compiling():
            for gates in hooks.gates:
                gates.come_last()
        positions.check_table(given, hooks.rule, pad, hooks.rows[self.index], prefix.position)
        if hooks.route == "attention":
            if "encoder_attention_mask" in hooks.names[self.index]:
                _see_all_encoded(given)
            _cover(given, prefix, batch)
        elif hooks.route == "cache":
            _view_cache(given, hooks, holder, batch)
        embeddings = given["inputs_embeds"]
        if (
            embeddings is not None and not embeddings.requires_grad and hooks.checkpointing(holder)
        ):  # re-entrant checkpointing passes gradients on only where an input asks for one
            given["inputs_embeds"] = embeddings.detach().requires_grad_(True)
        return given.args, given.kwargs


class _Embedded:
    """After the embedding of a holder: its output asks for a gradient where that is needed."""

    def __init__(self, hooks: Hooks, index: int) -> None:
        self.hooks, self.index = hooks, index

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        holder = self.hooks.holders[self.index]
        if (
            self.hooks.prefix.is_on()
            and not output.requires_grad
            and self.hooks.checkpointing(holder)
        ):
            output.requires_grad_(True)


def _see_all_encoded(given: Arguments) -> None:
    """A mask for cross-attention where the caller gave none, to have the prefix's columns."""
    encoded = given["encoder_hidden_states"]
    if encoded is not None and given["encoder_attention_mask"] is None:
        shape = encoded.shape[:2]
        given["encoder_attention_mask"] = torch.ones(shape, dtype=torch.long, device=encoded.device)


def _cover(given: Arguments, prefix: Any, batch: int) -> None:
    """Put the prefix's columns in front of masks with four dimensions, which the caller built."""
    for name in ("attention_mask", "encoder_attention_mask"):
        mask = given[name]
        if isinstance(mask, dict):
            given[name] = {
                kind: _covered(name, m, given, prefix, batch) for kind, m in mask.items()
            }
        elif mask is not None:
            given[name] = _covered(name, mask, given, prefix, batch)


def _covered(name: str, mask: Any, given: Arguments, prefix: Any, batch: int) -> Any:
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    stamp: attention.Stamp | None = getattr(mask, attention.COVERED, None)
    if stamp is not None:
        if (stamp.owner, stamp.names) == (id(prefix), prefix.names()):
            return mask
        mask = mask[..., stamp.columns :]  # another model's, from which this one was copied
    if prefix.window == "like_token":
        raise ValueError(
            f"{name} has 4 dimensions, which say who sees whom; a prefix that is seen like_token "
            "needs a 2-D mask"
        )
    tokens = positions.tokens(given)
    visible = prefix.visible(Query(batch, tokens.shape[1], 0, None, None, tokens.device))
    return attention.stamped(put_in_front(mask, visible, prefix.columns()), prefix)


def _view_cache(given: Arguments, hooks: Hooks, holder: Any, batch: int) -> None:
    """Route A: a view in the place of the cache, and a mask that covers the prefix."""
    prefix, cache = hooks.prefix, given["past_key_values"]
    use_cache = given["use_cache"]
    if use_cache is None:
        use_cache = getattr(holder.config, "use_cache", False)
    if hooks.checkpointing(holder):
        _check_checkpointing(holder, positions.seen(given))
        cache = None
    elif cache is None and use_cache:
        from transformers import DynamicCache

        cache = DynamicCache(config=holder.config)
    if mask_is_packed(given, cache):
        raise ValueError(
            f"{type(holder).__name__}: position_ids start anew within a row, which says that texts "
            "are packed; a prefix that enters through the cache cannot keep them apart: pad instead"
        )
    tokens, mask, order = positions.tokens(given), given["attention_mask"], None
    device, columns = tokens.device, prefix.columns()
    visible = prefix.visible(Query(batch, tokens.shape[1], 0, None, None, device))
    ordered = hooks.by_slot and prefix.is_ordered()
    if mask is None and (visible is not None or ordered):
        slots = positions.seen(given) + tokens.shape[1]
        mask = torch.ones(batch, slots, dtype=torch.long, device=device)
    if mask is not None:
        if mask.dim() == 4:
            if ordered:
                raise ValueError(
                    "attention_mask has 4 dimensions, which say who sees whom; a gated prefix "
                    "beside others needs a 2-D mask where attention counts distance (ALiBi)"
                )
            mask = put_in_front(mask, visible, columns)
        elif hooks.by_slot:
            if visible is None:
                visible = torch.ones(batch, 1, 1, columns, dtype=torch.bool, device=device)
            mask, order = before_tokens(mask, visible[:, 0, 0], prefix.rank(device))
        elif visible is None:
            mask = F.pad(mask, (columns, 0), value=1)
        else:
            mask = torch.cat([visible[:, 0, 0].to(mask.dtype), mask], dim=1)
    given["attention_mask"] = mask
    given["past_key_values"] = PrefixedCache(prefix, cache, order)


def mask_is_packed(given: Arguments, cache: Any) -> bool:
    """Whether transformers would take the row for several texts, by its position_ids alone."""
    numbers = given["position_ids"]
    if numbers is None or given["attention_mask"] is not None or cache is not None:
        return False
    return not torch.compiler.is_compiling() and bool((numbers.diff(dim=-1) != 1).any())


def _after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The caller's cache in the output, in the place of the view of it."""
    if isinstance(output, tuple):
        found = (o.inner if isinstance(o, PrefixedCache) else o for o in output)
        return tuple(o for o in found if o is not None)
    if isinstance(output.get("past_key_values"), PrefixedCache):
        inner = output["past_key_values"].inner
        return type(output)(**{**output, "past_key_values": inner})
    return output


def allow_checkpointing(holders: list[nn.Module]) -> list[nn.Module]:
    """Tell transformers' checkpointed layers to keep the cache; returns the layers.

    transformers takes the cache, and with it the prefix, from checkpointed layers, unless a layer
    says that it only reads the cache, as it does with a view.
    """
    layers = [m for holder in holders for m in holder.modules() if hasattr(type(m), READS_ONLY)]
    for layer in layers:
        layer.__dict__[READS_ONLY] = True
    return layers


def _check_checkpointing(holder: nn.Module, seen: int) -> None:
    if not any(hasattr(type(module), READS_ONLY) for module in holder.modules()):
        raise ValueError(
            f"{type(holder).__name__}: gradient checkpointing would take the prefix from its "
            "layers; this needs a transformers whose layers can be checkpointed with a cache"
        )
    if seen:
        raise ValueError(
            f"{type(holder).__name__}: gradient checkpointing while training on a cache of {seen} "
            "tokens, which transformers would drop; pass the whole text, or call eval()"
        )
