"""Prefix: the prefixes of one model, which of them are on, and for which rows of a batch."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT, give_name
from minipeft.inject import after_swap, put, restoring, tell
from minipeft.integrations.transformers import probe
from minipeft.integrations.transformers.attention import Part
from minipeft.integrations.transformers.hooks import Hooks
from minipeft.integrations.transformers.masks import Query, of_rows, within_window
from minipeft.integrations.transformers.prompt_runs import RunPrompt
from minipeft.layers.trained import TrainedModule
from minipeft.model.rows import refuse_rows
from minipeft.prefix import KVShape, PrefixEncoder

NAME = "minipeft_prefix"  # of the submodule in the model


class NotProvedWarning(UserWarning):
    """A prefix was attached without proof that the model sees it as it should."""


def check_key(caller: str, name: str) -> None:
    """Raise ValueError if a ModuleDict cannot hold a module under this name."""
    if hasattr(nn.ModuleDict, name) or name in nn.ModuleDict().__dict__:
        raise ValueError(f"{caller}: name={name!r} means something in a ModuleDict; choose another")


class Prefix(nn.Module):
    """The prefixes attached to a model, registered in it as the submodule `minipeft_prefix`.

    `encoders` has a PrefixEncoder (or a RunPrompt) for each name, `encoder` is the one called
    "default", or the first.  `position` and `window` say how the model counts the prefix (see
    attach_prefix), `route` how it reaches attention, `locations` where each layer is.
    minipeft.use_adapters and disable_adapters say which are on.
    """

    model: nn.Module
    encoders: Any  # an nn.ModuleDict
    row_columns: Tensor | None  # (rows, columns) while rows use prefixes of their own

    def __init__(self, model: nn.Module, reach: probe.Reach, *, position: str, window: str) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.position, self.window, self.route = position, window, reach.route
        self.kv_shapes: list[KVShape] = reach.shapes
        self.locations = reach.locations
        self.doubts: list[str] = []  # what could not be proved of the model (proof.py)
        self.left_out = reach.left_out  # what of the model has no prefix, and why
        self.layers = reach.chosen  # the numbers of the model's layers; None: all that there are
        self.causal, self.has_windows = reach.causal, reach.has_windows
        self.served: tuple[str, ...] | None = None  # the names in rows; None: no rows were given
        self.register_buffer("row_columns", None, persistent=False)
        self.heads: dict[str, list[str]] = {}  # by prefix: modules that train with it
        # in __dict__: as a submodule, the model would contain itself
        self.__dict__["model"] = model
        self.hooks = Hooks(self, reach)

    def report(self) -> str:
        """Where the prefixes are, what of the model has none, and what was not proved of it."""
        lines = [f"{len(self.kv_shapes)} layers of {', '.join(dict.fromkeys(self.locations))}"]
        lines += [f"left out: {what}: {why}" for what, why in self.left_out.items()]
        if self.layers is not None:
            lines.append("not asked: whether tokens put back as a prefix count as these tokens")
        return "\n".join(lines + [f"not proved: {doubt}" for doubt in self.doubts])

    # --- what attention asks (attention.Owner) ---

    def taking_part(self) -> dict[str, Any]:
        """The encoders whose columns are in the mask, by name, in their order."""
        on = {name: encoder for name, encoder in self.encoders.items() if encoder.enabled}
        if self.served is None or not any(name in on for name in self.served):
            return on if self.served is None else {}
        if off := [name for name in self.served if name not in on]:
            raise ValueError(f"prefix {off[0]!r} is off, and rows use it; call use_adapters again")
        return {name: on[name] for name in self.served}

    def names(self) -> tuple[str, ...]:
        """Which prefixes take part."""
        return tuple(self.taking_part())

    def is_on(self) -> bool:
        """Whether any prefix takes part."""
        return bool(self.taking_part())

    def columns(self) -> int:
        """The number of their positions."""
        return sum(encoder.prefix_length for encoder in self.taking_part().values())

    def layer(self, layer: int) -> list[Part]:
        """Their keys, values and gates in one layer."""
        return [self._part(encoder, layer) for encoder in self.taking_part().values()]

    def _part(self, encoder: Any, layer: int) -> Part:
        if isinstance(encoder, RunPrompt):
            return encoder.part(layer)
        k, v = encoder.layer(layer)
        if k.is_meta:
            raise ValueError(
                "the prefix has no values (meta device): offload the model first, then attach"
            )
        return Part(k, v, encoder.gate(layer), encoder.prefix_length)

    def visible(self, query: Query) -> Tensor | None:
        """Which columns each query sees, (batch, 1, 1 or queries, columns); None: all."""
        window = query.window if self.window == "like_token" else None
        if window is None:
            return None if self.row_columns is None else self._of_rows(query)[:, None, None]
        seen, tokens = self._of_rows(query), self._tokens(query.device)
        near = within_window(seen & tokens, query.token_index(), window, chunked=query.chunked)
        return (near | (seen & ~tokens)[:, None])[:, None]

    def as_tokens(self, query: Query) -> Tensor | None:
        """How many tokens the prefix is to each row, where text is cut in chunks; else None."""
        if self.window != "like_token" or not query.chunked:
            return None
        return (self._of_rows(query) & self._tokens(query.device)).sum(1)

    def _of_rows(self, query: Query) -> Tensor:
        """Which columns belong to each row, (batch, columns)."""
        if self.row_columns is None:
            return torch.ones(query.batch, self.columns(), dtype=torch.bool, device=query.device)
        return of_rows(self.row_columns.to(query.device), query.batch)

    def _tokens(self, device: torch.device) -> Tensor:
        """Which columns count as tokens before the text.

        Those of a gated prefix do not: it starts as if there were no prefix.
        """
        counted = [
            torch.full((encoder.prefix_length,), not getattr(encoder, "gated", False))
            for encoder in self.taking_part().values()
        ]
        return torch.cat(counted).to(device)

    def is_ordered(self) -> bool:
        """Whether columns have different ranks."""
        return len({getattr(e, "gated", False) for e in self.taking_part().values()}) > 1

    def rank(self, device: torch.device) -> Tensor:
        """How near to the text each column stands where distance is counted in slots, at most 0.

        A gated prefix stands before the others, so that it moves none of them.
        """
        return self._tokens(device).long() - 1

    def shift(self, batch: int, *, gated: bool = False) -> int | Tensor:
        """By how much tokens are numbered higher: a number, or (batch, 1) by row.

        `gated` counts the columns of gated prefixes too, which move no token.
        """
        if self.row_columns is None:
            encoders = self.taking_part().values()
            counted = [e for e in encoders if gated or not getattr(e, "gated", False)]
            return sum(int(encoder.prefix_length) for encoder in counted)
        columns = of_rows(self.row_columns, batch)
        if not gated:
            columns = columns & self._tokens(columns.device)
        return columns.sum(1, keepdim=True)

    def before_forward(self, holder: nn.Module, given: Any) -> None:
        """Let prompts run: their keys and values come from the model itself."""
        running = [e for e in self.taking_part().values() if isinstance(e, RunPrompt)]
        if running:
            cache = given["past_key_values"]
            if cache is None and given["use_cache"] and not torch.is_grad_enabled():
                from transformers import DynamicCache

                cache = given["past_key_values"] = DynamicCache(config=holder.config)  # type: ignore[arg-type]
            for encoder in running:
                encoder.before_forward(holder, cache, self.hooks.modules)

    # --- switching ---

    @property
    def encoder(self) -> Any:
        """The encoder called "default", or the first one."""
        return self.encoders[DEFAULT if DEFAULT in self.encoders else next(iter(self.encoders))]

    @property
    def enabled(self) -> bool:
        """Whether the model sees a prefix; setting it switches all of them."""
        return self.is_on()

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for encoder in self.encoders.values():
            encoder.enabled = value

    def serve_rows(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Let row i of every batch use the prefixes named in rows[i] and no others.

        A batch of a multiple of as many rows repeats each: beams, several answers.  Names of
        other adapters are passed over: `use_adapters(model, rows=...)` calls this.
        """
        self.served = tuple(name for name in self.encoders if any(name in row for row in rows))
        device, old = next(self.parameters()).device, self.row_columns
        with torch.inference_mode(False):  # changed in place later, in whatever mode
            parts = [
                torch.tensor([[name in row] for row in rows]).expand(-1, encoder.prefix_length)
                for name, encoder in self.encoders.items()
                if name in self.served
            ]
            self.row_columns = torch.cat(parts, dim=1).to(device) if parts else None
            new = self.row_columns
            if new is not None and old is not None and new.shape == old.shape:
                self.row_columns = old.copy_(new)  # in place: a compiled model stays compiled
        for name, encoder in self.encoders.items():
            encoder.enabled = name in self.served

    def run_by_the_model(self) -> list[str]:
        """The names of prompts whose keys come from layers of the model."""
        return [name for name, encoder in self.encoders.items() if isinstance(encoder, RunPrompt)]

    def stop_rows(self) -> None:
        """All rows use what is on again."""
        self.row_columns = self.served = None

    def _check(self, name: str) -> None:
        if name not in self.encoders:
            raise ValueError(f"there is no prefix {name!r}; the model has {list(self.encoders)}")

    # --- values ---

    def load_kv(self, pairs: Any, *, name: str = DEFAULT) -> None:
        """Start from keys and values: pairs per layer, or the cache of a run over real tokens.

        Raises:
            ValueError: shapes of another model or length, or an encoder with an MLP.
        """
        if pairs is None:
            raise ValueError("load_kv: got None; was the model run with use_cache=True?")
        if hasattr(pairs, "layers"):
            pairs = [(layer.keys, layer.values) for layer in pairs.layers]
        self._table_of("load_kv", name).load_kv(pairs)

    def load_tokens(self, input_ids: Tensor, *, name: str = DEFAULT, **inputs: Tensor) -> None:
        """Start from the keys and values of real tokens, without any prefix before them.

        `input_ids` is (1, prefix_length): cut a longer text yourself, as in
        tokenizer(text, return_tensors="pt").input_ids[:, :prefix_length].  An encoder-decoder needs
        `decoder_input_ids` (1, prefix_length) too.

        Raises:
            ValueError: another number of tokens, or an encoder with an MLP.
        """
        encoder = self._table_of("load_tokens", name)
        for doubt in self.doubts:
            warnings.warn(f"load_tokens: {doubt}", NotProvedWarning, stacklevel=2)
        refuse_rows("load_tokens", self.model)
        expected = (1, encoder.prefix_length)
        for what, ids in {"input_ids": input_ids, **inputs}.items():
            if tuple(ids.shape) != expected:
                raise ValueError(
                    f"load_tokens: {what} has shape {tuple(ids.shape)}; the prefix takes {expected}"
                )
        if probe.is_encoder_decoder(self.model) and "decoder_input_ids" not in inputs:
            raise ValueError("load_tokens: an encoder-decoder needs decoder_input_ids too")
        on = [encoder for encoder in self.encoders.values() if encoder.enabled]
        self.enabled = False
        try:
            with probe.errors_of("load_tokens"):
                seen = probe.look(self.model, input_ids=input_ids, **inputs)
        finally:
            for part in on:
                part.enabled = True
        if self.route == "cache":
            encoder.load_kv(seen.pairs)
        else:
            by_module = {id(m): pair for m, pair in zip(seen.modules, seen.pairs, strict=True)}
            encoder.load_kv([by_module[id(module)] for module in self.hooks.modules])

    def bake(self, *, name: str = DEFAULT) -> None:
        """Replace an MLP or a prompt by the tables it produces, for good.

        Optimisers must be built anew.
        """
        self._check(name)
        refuse_rows("bake", self.model)
        old = self.encoders[name]
        baked = old.bake(self) if isinstance(old, RunPrompt) else old.bake()
        give_name(name, [baked])
        self.encoders[name] = baked

    def _table_of(self, caller: str, name: str) -> PrefixEncoder:
        self._check(name)
        encoder = self.encoders[name]
        if not isinstance(encoder, PrefixEncoder):
            raise ValueError(f"{caller}: a {type(encoder).__name__} makes its keys and values")
        return encoder

    def remove(self, *, name: str | None = None, heads: bool = True) -> None:
        """Take one prefix off, or all, and the heads that came with them unless `heads` is False.

        Without any, the model computes as before, bit for bit.

        Raises:
            ValueError: no such prefix, rows that use prefixes of their own, or a head with another
                adapter over it (minipeft.remove takes both).  Nothing has changed then.
        """
        chosen = list(self.encoders) if name is None else [name]
        bases: dict[str, nn.Module] = {}
        for own in chosen:
            self._check(own)
            for place in self.heads.get(own, []) if heads else []:
                head = self.model.get_submodule(place)
                if not isinstance(head, TrainedModule):
                    raise ValueError(
                        f"remove: {place} has another adapter over it; remove that first"
                    )
                bases[place] = head.base
        if name is not None and self.served is not None:
            raise ValueError("rows use prefixes of their own; call use_adapters with names first")
        with restoring(self.model):
            put(self.model, bases)
            for own in chosen:
                self.heads.pop(own, None)
                del self.encoders[own]
            if not self.encoders:
                delattr(self.model, NAME)
            tell(self.model)
        if not self.encoders:
            self.hooks.remove()

    def extra_repr(self) -> str:
        where = f"locations={sorted(set(self.locations))}"
        if self.left_out:
            where += f", left_out={list(self.left_out)}"
        return f"position={self.position!r}, window={self.window!r}, route={self.route!r}, {where}"


def _follow(model: nn.Module) -> None:
    """Modules of the model were swapped: gates are hooked to those that are there now."""
    for part in model.modules():
        for gates in part.hooks.gates if isinstance(part, Prefix) else ():
            gates.follow()


after_swap.append(_follow)
