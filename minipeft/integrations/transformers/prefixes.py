"""Prefix: the prefixes of one model, which of them are on, and for which rows of a batch."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT, give_name, stacks
from minipeft.inject import put, restoring, tell
from minipeft.integrations.transformers import probe
from minipeft.integrations.transformers.attention import Part
from minipeft.integrations.transformers.hooks import Hooks
from minipeft.integrations.transformers.masks import Query, of_rows, within_window
from minipeft.integrations.transformers.prompt_runs import RunPrompt
from minipeft.layers.trained import TrainedModule
from minipeft.model.rows import ByRow, refuse_rows
from minipeft.prefix import KVShape, PrefixEncoder

NAME = "minipeft_prefix"  # of the submodule in the model


def check_key(caller: str, name: str) -> None:
    """Raise ValueError if a ModuleDict cannot hold a module under this name."""
    if hasattr(nn.ModuleDict, name) or name in nn.ModuleDict().__dict__:
        raise ValueError(f"{caller}: name={name!r} means something in a ModuleDict; choose another")


def _counts(encoder: Any) -> bool:
    """Whether it counts as tokens before the text; a gated one starts as nothing and does not."""
    return not getattr(encoder, "gated", False)


class Prefix(nn.Module):
    """The prefixes attached to a model, registered in it as the submodule `minipeft_prefix`.

    `encoders` has a PrefixEncoder for each name, `encoder` is the one called "default", or the
    first.  `position` and `window` say how the model counts the prefix (see attach_prefix),
    `route` how it reaches attention, `locations` where each layer of an encoder is.  Which are on
    is for minipeft.use_adapters, disable_adapters or the context `use` to say.
    """

    model: nn.Module
    row_columns: Tensor | None  # (rows, columns) while rows use prefixes of their own

    def __init__(self, model: nn.Module, reach: probe.Reach, *, position: str, window: str) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.position, self.window, self.route = position, window, reach.route
        self.kv_shapes: list[KVShape] = reach.shapes
        self.locations = reach.locations
        self.causal, self.has_windows = reach.causal, reach.has_windows
        self.rows: list[tuple[str, ...]] | None = None  # None: all rows use what is on
        self.served: tuple[str, ...] = ()  # the names in rows, in the order of encoders
        self.register_buffer("row_columns", None, persistent=False)
        self.heads: dict[str, list[str]] = {}  # by prefix: modules that train with it
        # in __dict__: as a submodule, the model would contain itself
        self.__dict__["model"] = model
        self.hooks = Hooks(self, reach)

    # --- what attention asks (attention.Owner) ---

    def taking_part(self) -> list[Any]:
        """The encoders whose columns are in the mask, in their order."""
        if self.rows is None:
            return [encoder for encoder in self._all() if encoder.enabled]
        found = {name: self._by_name()[name] for name in self.served}
        if not any(encoder.enabled for encoder in found.values()):
            return []
        if off := [name for name, encoder in found.items() if not encoder.enabled]:
            raise ValueError(f"prefix {off[0]!r} is off, and rows use it; call use_adapters again")
        return list(found.values())

    def names(self) -> tuple[str, ...]:
        """Which prefixes take part."""
        part = {id(encoder) for encoder in self.taking_part()}
        return tuple(name for name, encoder in self.encoders.items() if id(encoder) in part)

    def is_on(self) -> bool:
        """Whether any prefix takes part."""
        return bool(self.taking_part())

    def columns(self) -> int:
        """The number of their positions."""
        return sum(encoder.prefix_length for encoder in self.taking_part())

    def layer(self, layer: int) -> list[Part]:
        """Their keys, values and gates in one layer."""
        return [self._part(encoder, layer) for encoder in self.taking_part()]

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
        like_token = self.window == "like_token" and query.window is not None
        if self.rows is None and not like_token:
            return None
        if self.rows is None:
            seen = torch.ones(query.batch, self.columns(), dtype=torch.bool, device=query.device)
        else:
            assert self.row_columns is not None
            seen = of_rows(self.row_columns.to(query.device), query.batch)
        if like_token:
            assert query.window is not None
            tokens = torch.cat(
                [torch.full((e.prefix_length,), _counts(e)) for e in self.taking_part()]
            )
            tokens = tokens.to(seen.device)
            near = within_window(seen & tokens, query.token_index(), query.window)
            return (near | (seen & ~tokens)[:, None])[:, None]
        return seen[:, None, None]

    def shift(self, batch: int) -> int | Tensor:
        """By how much tokens are numbered higher: a number, or (batch, 1) by row."""
        counted = [e.prefix_length if _counts(e) else 0 for e in self.taking_part()]
        if self.rows is None:
            return sum(counted)
        assert self.row_columns is not None
        columns = of_rows(self.row_columns, batch)
        parts = torch.split(columns, [e.prefix_length for e in self.taking_part()], dim=1)
        return torch.stack(
            [part[:, :n].sum(1) for part, n in zip(parts, counted, strict=True)]
        ).sum(0)[:, None]

    def before_forward(self, holder: nn.Module, given: Any) -> None:
        """Let prompts run: their keys and values come from the model itself."""
        running = [e for e in self.taking_part() if isinstance(e, RunPrompt)]
        if running:
            cache = given["past_key_values"]
            if cache is None and given["use_cache"] and not torch.is_grad_enabled():
                from transformers import DynamicCache

                cache = given["past_key_values"] = DynamicCache(config=holder.config)  # type: ignore[arg-type]
            for encoder in running:
                encoder.before_forward(holder, cache, by_attention=self.route == "attention")

    # --- switching ---

    @property
    def encoder(self) -> Any:
        """The encoder called "default", or the first one."""
        return self.encoders[DEFAULT] if DEFAULT in self.encoders else self._all()[0]

    @property
    def enabled(self) -> bool:
        """Whether the model sees a prefix; setting it switches all of them."""
        return self.is_on()

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for encoder in self._all():
            encoder.enabled = value

    def add_encoder(self, name: str, encoder: PrefixEncoder) -> None:
        """Let a further encoder join, under a name that is free; see minipeft.add_adapter.

        Raises:
            ValueError: it has other layers, or gates where only the cache is reached.
        """
        check_key("add_adapter", name)
        if encoder.kv_shapes != self.kv_shapes:
            raise ValueError(
                f"add_adapter: the encoder has layers {encoder.kv_shapes[:2]} "
                f"({len(encoder.kv_shapes)}); the model's prefixes {self.kv_shapes[:2]} "
                f"({len(self.kv_shapes)})"
            )
        if encoder.gated and self.route == "cache":
            raise ValueError("add_adapter: a model reached through its cache takes no gates")
        encoder.to(next(self.parameters()).device).train(self.training)
        encoder.enabled = encoder.enabled and self.rows is None
        self.encoders[name] = encoder

    def serve_rows(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Let row i of every batch use the prefixes named in rows[i] and no others.

        A batch of a multiple of as many rows repeats each: beams, several answers.  Names of
        other adapters are passed over: `use_adapters(model, rows=...)` calls this.
        """
        rows = [tuple(name for name in row if name in self.encoders) for row in rows]
        used = set(itertools.chain.from_iterable(rows))
        device = next(self.parameters()).device
        with torch.inference_mode(False):  # changed in place later, in whatever mode
            parts = [
                torch.tensor([[name in row] for row in rows]).expand(-1, encoder.prefix_length)
                for name, encoder in self._by_name().items()
                if name in used
            ]
            columns = torch.cat(parts, dim=1).to(device) if parts else None
        if (
            columns is not None
            and self.row_columns is not None
            and (columns.shape == self.row_columns.shape)
        ):
            self.row_columns.copy_(columns)  # in place: a compiled model stays compiled
        else:
            self.row_columns = columns
        self.rows, self.served = rows, tuple(name for name in self.encoders if name in used)
        for name, encoder in self._by_name().items():
            encoder.enabled = name in used

    def run_by_the_model(self) -> list[str]:
        """The names of prompts whose keys come from layers of the model."""
        return [name for name, encoder in self.encoders.items() if isinstance(encoder, RunPrompt)]

    def stop_rows(self) -> None:
        """All rows use what is on again."""
        self.rows, self.row_columns, self.served = None, None, ()

    @contextmanager
    def use(self, rows: str | Iterable[str | Iterable[str] | None] | None) -> Iterator[None]:
        """Within this context: one prefix by its name, none (None), or one entry for each row.

        `use("poet")`, `use(None)`, `use(["poet", None, ["poet", "lawyer"]])`.

        Raises:
            ValueError: a name that no prefix has, or heads that differ by row already; nothing has
                changed then.
        """
        heads = self._head_layers()
        before = self.rows, self.served, {n: e.enabled for n, e in self._by_name().items()}
        with torch.inference_mode(False):
            columns = None if self.row_columns is None else self.row_columns.clone()
        heads_before = [(layer, layer.enabled) for layers in heads.values() for layer in layers]
        try:
            if rows is None or isinstance(rows, str):
                if rows is not None:
                    self._check(rows)
                self.stop_rows()
                for name, encoder in self._by_name().items():
                    encoder.enabled = name == rows
                for name, layers in heads.items():
                    for layer in layers:
                        layer.enabled = name == rows
            else:
                wanted = [(r,) if isinstance(r, str) else tuple(r or ()) for r in rows]
                for name in itertools.chain.from_iterable(wanted):
                    self._check(name)
                if not wanted:
                    raise ValueError("use: rows is empty; expected an entry for each row")
                if any(layer.enabled for layers in heads.values() for layer in layers):
                    raise ValueError(
                        "use: a head trains with a prefix and would answer for every row; run the "
                        "rows of each prefix in a batch of their own"
                    )
                self.serve_rows(wanted)
            yield
        finally:
            self.rows, self.served, self.row_columns = before[0], before[1], columns
            for name, encoder in self._by_name().items():
                encoder.enabled = before[2].get(name, encoder.enabled)
            for layer, enabled in heads_before:
                layer.enabled = enabled

    def _head_layers(self) -> dict[str, list[TrainedModule]]:
        """The layers of the heads that came with each prefix, also below other adapters."""
        stacked = stacks(self.model)
        places = itertools.chain.from_iterable(self.heads.values())
        if any(isinstance(layer, ByRow) for place in places for layer in stacked.get(place, [])):
            raise ValueError(
                "use: the head of a prefix differs by row (use_adapters(rows=)); call "
                "minipeft.use_adapters(model, names) first"
            )
        return {
            name: [x for p in places for x in stacked.get(p, []) if isinstance(x, TrainedModule)]
            for name, places in self.heads.items()
        }

    def _check(self, name: str) -> None:
        if name not in self.encoders:
            raise ValueError(f"there is no prefix {name!r}; the model has {list(self.encoders)}")

    def _all(self) -> list[Any]:
        return list(self.encoders.values())

    def _by_name(self) -> dict[str, Any]:
        return dict(self.encoders.items())

    # --- values ---

    def load_kv(self, pairs: Any, *, name: str | None = None) -> None:
        """Start from keys and values: pairs per layer, or the cache of a run over real tokens.

        Raises:
            ValueError: shapes of another model or length, or an encoder with an MLP.
        """
        layers: Iterable[Any] | None = getattr(pairs, "layers", None)
        if pairs is None:
            raise ValueError("load_kv: got None; was the model run with use_cache=True?")
        encoder = self._table_of("load_kv", name)
        encoder.load_kv(pairs if layers is None else [(c.keys, c.values) for c in layers])

    def load_tokens(self, input_ids: Tensor, *, name: str | None = None, **inputs: Tensor) -> None:
        """Start from the keys and values of real tokens, without any prefix before them.

        `input_ids` is (1, prefix_length): cut a longer text yourself, as in
        tokenizer(text, return_tensors="pt").input_ids[:, :prefix_length].  An encoder-decoder needs
        `decoder_input_ids` (1, prefix_length) too.

        Raises:
            ValueError: another number of tokens, or an encoder with an MLP.
        """
        encoder = self._table_of("load_tokens", name)
        refuse_rows("load_tokens", self.model)
        expected = (1, encoder.prefix_length)
        for what, ids in {"input_ids": input_ids, **inputs}.items():
            if tuple(ids.shape) != expected:
                raise ValueError(
                    f"load_tokens: {what} has shape {tuple(ids.shape)}; the prefix takes {expected}"
                )
        if probe.is_encoder_decoder(self.model) and "decoder_input_ids" not in inputs:
            raise ValueError("load_tokens: an encoder-decoder needs decoder_input_ids too")
        with self.use(None), probe.errors_of("load_tokens"):
            seen = probe.look(self.model, input_ids=input_ids, **inputs)
        if self.route == "cache":
            encoder.load_kv(seen.pairs)
        else:
            by_module = {id(m): pair for m, pair in zip(seen.modules, seen.pairs, strict=True)}
            encoder.load_kv([by_module[id(module)] for module in self.hooks.modules])

    def bake(self, *, name: str | None = None) -> None:
        """Replace an MLP or a prompt by the tables it produces, for good.

        Optimisers must be built anew.
        """
        old = self._named(name)
        refuse_rows("bake", self.model)
        key = next(n for n, e in self.encoders.items() if e is old)
        baked = old.bake(self) if isinstance(old, RunPrompt) else old.bake()
        give_name(key, [baked])
        self.encoders[key] = baked

    def _named(self, name: str | None) -> Any:
        if name is None and len(self.encoders) > 1:
            raise ValueError(f"which prefix? name= one of {list(self.encoders)}")
        if name is None:
            return self.encoder
        self._check(name)
        return self.encoders[name]

    def _table_of(self, caller: str, name: str | None) -> PrefixEncoder:
        encoder = self._named(name)
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
        if name is not None and self.rows is not None:
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
        where = (
            "" if set(self.locations) == {"self"} else f", locations={sorted(set(self.locations))}"
        )
        return f"position={self.position!r}, window={self.window!r}, route={self.route!r}{where}"
