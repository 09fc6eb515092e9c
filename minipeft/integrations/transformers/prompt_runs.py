"""Input-level prompts on a Hugging Face model, by the machinery of deep prefixes.

Tokens of a causal model never look ahead.  So the keys and values of P prompt embeddings before
the text do not depend on the text: one run of the model over the prompt alone gives them for all
rows of a batch.  From there on the prompt is a prefix: caches, masks and outputs are those of the
text, and a prompt can be on in one row and off in another.
"""

import threading
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers import attention, positions
from minipeft.integrations.transformers.attention import PLAIN, Part
from minipeft.integrations.transformers.positions import names_of
from minipeft.prefix import PrefixEncoder

KEPT = "_minipeft_prompts"  # on a cache: the keys and values of the prompts it was filled with
Pairs = list[tuple[Tensor, Tensor]]


class Run:
    """What one run over a prompt gave; a class, since a list cannot be held by a weak reference."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs


class LastRun:
    """The last run of each thread, for as long as the thread lives.

    Backward may compute a layer again in a thread of its own, which has run nothing.  That thread
    gets the last run of any thread, while the thread that made it lives.  Compiled code cannot ask
    for its thread and keeps one run for all.  A copy starts without a run: tensors of a graph
    cannot be copied.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._latest: weakref.ref[Run] | None = None
        self._traced: Run | None = None

    def set(self, run: Run) -> None:
        """This thread's last run is this one."""
        if torch.compiler.is_compiling():
            self._traced = run
            return
        self._own.run, self._traced = run, None
        self._latest = weakref.ref(run)

    def get(self) -> Run | None:
        """The last run of this thread, or of any; None: there is none."""
        if torch.compiler.is_compiling():
            return self._traced
        found: Run | None = getattr(self._own, "run", None)
        if found is None and self._latest is not None:
            found = self._latest()
        return found or self._traced

    def __reduce__(self) -> tuple[type["LastRun"], tuple[()]]:
        return LastRun, ()


class RunPrompt(nn.Module):
    """The keys and values of prompt embeddings, by a run of the model over them.

    `source()` gives the embeddings (prompt_length, embedding_dim): a PromptEmbedding (prompt
    tuning) or a PromptEncoder (P-tuning v1).
    """

    source: Any

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source
        self.last = LastRun()
        self.key = uuid.uuid4().hex  # on caches: an id() may be another prompt's later

    @property
    def prefix_length(self) -> int:
        """Its positions."""
        return int(self.source.prompt_length)

    @property
    def enabled(self) -> bool:
        """Whether it is on."""
        return bool(self.source.enabled)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.source.enabled = value

    def before_forward(self, holder: nn.Module, cache: Any, modules: list[nn.Module]) -> None:
        """Run the prompt, before each forward in which it takes part.

        Without gradients the run stays with the cache, so that the later turns of a conversation
        use the keys with which the cache was filled.
        """
        compiling = torch.compiler.is_compiling()
        keeps = cache is not None and not torch.is_grad_enabled() and not compiling
        kept = cache.__dict__.setdefault(KEPT, {}) if keeps else {}
        run = kept.get(self.key) if keeps and cache.get_seq_length() else None
        if run is None:
            _refuse_reentrant(holder)
            run = Run(run_prompt(holder, self.source(), modules))
            kept[self.key] = run
        self.last.set(run)

    def part(self, layer: int) -> Part:
        """The keys and values of the last run, in one layer."""
        run = self.last.get()
        if run is None:
            raise RuntimeError("the prompt has not been run: call the model, not a part of it")
        k, v = run.pairs[layer]
        return Part(k, v, None, self.prefix_length)

    def bake(self, prefix: Any) -> PrefixEncoder:
        """The keys and values that the prompt has now, as a prefix."""
        encoder = PrefixEncoder(prefix.kv_shapes, self.prefix_length)
        holder = prefix.hooks.holders[0]
        with positions.quietly(holder):
            pairs = run_prompt(holder, self.source(), prefix.hooks.modules)
        encoder.load_kv(pairs)
        encoder.to(next(self.parameters()).device).train(self.training)
        encoder.enabled = self.enabled
        return encoder


def run_prompt(holder: Any, rows: Tensor, modules: list[nn.Module]) -> Pairs:
    """Keys and values per layer, (kv_heads, prompt, dim), of embeddings (prompt, dim).

    They are what the attention `modules` get (route A, which knows none: what the cache keeps).
    Gradients flow.  No prefix takes part: a mark says so, on the mask or (route A) on the cache.
    """
    from transformers import DynamicCache

    table = holder.get_input_embeddings().weight
    dtype = table.dtype if table.is_floating_point() else next(holder.parameters()).dtype
    given: dict[str, Any] = {"inputs_embeds": rows[None].to(table.device, dtype)}
    if "position_ids" in names_of(holder):
        given["position_ids"] = torch.arange(len(rows), device=table.device)[None]
    if modules:
        ahead = torch.ones(len(rows), len(rows), dtype=torch.bool, device=table.device).triu(1)
        mask = torch.zeros_like(ahead, dtype=dtype).masked_fill(ahead, torch.finfo(dtype).min)
        given["attention_mask"] = mask = mask[None, None]
        setattr(mask, PLAIN, True)
    if modules and not torch.compiler.is_compiling():
        with _as_plain_run(holder), attention.recording(graph=True) as calls:
            holder(**given, use_cache=False)
        seen = {call.module: (call.k[0], call.v[0]) for call in calls}
        return [seen[module] for module in modules]
    cache: Any = DynamicCache()  # without a config: no layer of it forgets
    cache.__dict__[PLAIN] = True
    with _as_plain_run(holder):  # tracing cannot record
        holder(**given, past_key_values=cache, use_cache=True)
    pairs = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    if modules and len(pairs) != len(modules):
        raise ValueError(
            f"{type(holder).__name__}: {len(pairs)} of {len(modules)} layers keep keys of their "
            "own in the cache, where a compiled model reads a prompt's; bake the prompt, or do "
            "not compile"
        )
    return pairs


@contextmanager
def _as_plain_run(holder: nn.Module) -> Iterator[None]:
    """Without checkpointing, which would drop the cache: a prompt is short."""
    on = [m for m in holder.modules() if getattr(m, "gradient_checkpointing", False) is True]
    try:
        for module in on:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _refuse_reentrant(holder: nn.Module) -> None:
    if not (holder.training and torch.is_grad_enabled()):
        return
    for module in holder.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            settings = getattr(
                getattr(module, "_gradient_checkpointing_func", None), "keywords", {}
            )
            if settings.get("use_reentrant", True):
                raise ValueError(
                    "a prompt's keys come from one run for all layers, whose graph re-entrant "
                    "checkpointing would walk once a layer; enable it with "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
