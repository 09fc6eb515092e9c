"""Input-level prompts on a Hugging Face model, by the machinery of deep prefixes.

Tokens of a causal model never look ahead.  So the keys and values of P prompt embeddings before
the text do not depend on the text: one run of the model over the prompt alone gives them, for all
rows of a batch at once, and from there on the prompt is a prefix.  Caches, masks and outputs stay
those of the text, and a prompt can be on in one row and off in another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers import positions
from minipeft.integrations.transformers.attention import Part
from minipeft.prefix import PrefixEncoder
from minipeft.prompt import ZeroGatedPrompt


class Prompted(nn.Module):
    """Among a model's prefixes, one that a prompt makes; `source` is the prompt's module."""

    source: Any
    shifts = True  # whether tokens are numbered from behind it

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

    def before_forward(self, holder: nn.Module, *, seen: Any) -> None:
        """Called before each forward in which it takes part; `seen` tokens are in the cache."""

    def part(self, layer: int, prefix: Any) -> Part:
        """Keys, values and gate in one layer."""
        raise NotImplementedError


class RunPrompt(Prompted):
    """The keys and values of prompt embeddings, by a run of the model over them.

    `source()` gives the embeddings (prompt_length, embedding_dim): a PromptEmbedding (prompt
    tuning) or a PromptEncoder (P-tuning v1).
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source
        self.pairs: list[tuple[Tensor, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pairs": None}  # tensors of a graph cannot be copied

    def before_forward(self, holder: nn.Module, *, seen: Any) -> None:
        """Run the prompt.

        A conversation that goes on without gradients keeps what its first turn ran: its cache was
        computed with that.
        """
        if (
            self.pairs is not None
            and isinstance(seen, int)
            and seen
            and not torch.is_grad_enabled()
        ):
            return
        _refuse_reentrant(holder)
        self.pairs = run_prompt(holder, self.source())

    def part(self, layer: int, prefix: Any) -> Part:
        """The keys and values of the last run."""
        if self.pairs is None:
            raise RuntimeError("the prompt has not been run: call the model, not a part of it")
        k, v = self.pairs[layer]
        return Part(k, v, None, self.prefix_length)

    def bake(self, prefix: Any) -> PrefixEncoder:
        """The keys and values that the prompt has now, as a prefix."""
        encoder = PrefixEncoder(prefix.kv_shapes, self.prefix_length)
        holder = prefix.hooks.holders[0]
        prefix.paused = True
        try:
            with positions.quietly(holder):
                encoder.load_kv(run_prompt(holder, self.source()))
        finally:
            prefix.paused = False
        encoder.to(next(self.parameters()).device).train(self.training)
        encoder.enabled = self.enabled
        return encoder


class ZeroGated(Prompted):
    """LLaMA-Adapter: prompts go through each layer's own key and value projections.

    No position is applied to them, they have a softmax of their own, and tanh of a gate that
    starts at 0 scales what they add.  Layers before the last `n_layers` have none.
    """

    shifts = False
    source: ZeroGatedPrompt

    def __init__(self, source: ZeroGatedPrompt, first: int) -> None:
        super().__init__()
        self.source, self.first = source, first

    def part(self, layer: int, prefix: Any) -> Part:
        """Keys and values of one layer's prompt; empty in layers without."""
        shape = prefix.kv_shapes[layer]
        if layer < self.first:
            device = next(self.parameters()).device
            k, v = (torch.zeros(shape.kv_heads, 0, size, device=device)
                    for size in (shape.key_dim, shape.value_dim))  # fmt: skip
            zero = torch.zeros(prefix.query_heads[layer], device=device)
            return Part(k, v, zero, self.prefix_length, apart=True)
        rows, gate = self.source.layer(layer - self.first)
        attention = prefix.hooks.modules[layer]
        k, v = (
            projection(rows.to(projection.weight.dtype)).view(len(rows), shape.kv_heads, -1)
            for projection in (attention.k_proj, attention.v_proj)
        )
        norm = getattr(attention, "k_norm", None)
        k = k if norm is None else norm(k)
        return Part(k.transpose(0, 1), v.transpose(0, 1), gate, self.prefix_length, apart=True)


def run_prompt(holder: Any, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values per layer, (kv_heads, prompt, dim), of embeddings (prompt, dim); gradients
    flow."""
    from transformers import DynamicCache

    table = holder.get_input_embeddings().weight
    dtype = table.dtype if table.is_floating_point() else next(holder.parameters()).dtype
    cache: Any = DynamicCache()  # without a config: no layer of it forgets
    with _as_plain_run(holder):
        holder(
            inputs_embeds=rows[None].to(table.device, dtype), past_key_values=cache, use_cache=True
        )
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


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
