"""attach_prompt and attach_zero_gated: prompt tuning, P-tuning v1 and LLaMA-Adapter's prompts."""

from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT
from minipeft.integrations.transformers.attach import attach
from minipeft.integrations.transformers.prefixes import Prefix
from minipeft.integrations.transformers.prompt_runs import RunPrompt, ZeroGated
from minipeft.layers.prompt import (
    PromptEmbedding,
    PromptEncoder,
    ZeroGatedPrompt,
)

KINDS = ("table", "lstm", "mlp")


def attach_prompt(
    model: nn.Module,
    prompt_length: int,
    *,
    name: str = DEFAULT,
    kind: str = "table",
    hidden: int | None = None,
    dropout: float = 0.0,
    init: str | Tensor = "random",
    init_std: float = 0.02,
    position: str | None = None,
    window: str | None = None,
    train_head: bool = True,
) -> Prefix:
    """Put trainable embeddings before the text of a decoder.

    `kind` "table" is prompt tuning (Lester et al. 2021): the embeddings are trained as they are.
    "lstm" and "mlp" are P-tuning v1 (Liu et al. 2021): a network of that kind makes them, whose
    inner size is `hidden` (None: that of the embeddings); `bake` drops it after training.  A table
    starts from N(0, init_std) (`init` "random"), from embeddings of tokens drawn from the
    vocabulary ("vocabulary"), or from those of a text: `init` is then a tensor of token ids, which
    are repeated or cut to the length.

    The prompt is run through the model once a forward, for all rows of the batch; its keys and
    values come before those of the text, as of a deep prefix.  So caches, masks and outputs are
    those of the text, and all that is said of `attach_prefix` holds: names, rows, `position`,
    `window`, heads.  `bake` makes it a deep prefix, for which nothing is run.

    Raises:
        TypeError: no transformers model.
        ValueError: an encoder or encoder-decoder, whose text and prompt see each other; another
            kind or init; otherwise as `attach_prefix`.
    """
    if kind not in KINDS:
        raise ValueError(f"attach_prompt: kind={kind!r}; choose one of {KINDS}")
    if kind != "table" and not (isinstance(init, str) and init == "random"):
        raise ValueError("attach_prompt: init is for kind='table'; a network starts by itself")
    if isinstance(init, str) and init not in ("random", "vocabulary"):
        raise ValueError(
            f"attach_prompt: init={init!r}; expected 'random', 'vocabulary' or token ids"
        )

    def make(prefix: Prefix) -> RunPrompt:
        check_decoder("attach_prompt", model, prefix)
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        size = int(table.embedding_dim)
        if kind != "table":
            return RunPrompt(
                PromptEncoder(prompt_length, size, hidden=hidden, kind=kind, dropout=dropout)
            )
        source = PromptEmbedding(prompt_length, size, init_std=init_std)
        if isinstance(init, Tensor):
            source.load_table(_embedded(table, init.reshape(-1), prompt_length))
        elif init == "vocabulary":
            drawn = torch.randperm(int(table.num_embeddings))[:prompt_length]
            source.load_table(_embedded(table, drawn, prompt_length))
        return RunPrompt(source)

    return attach(
        model, prompt_length, make, caller="attach_prompt", name=name, position=position,
        window=window, train_head=train_head,
    )  # fmt: skip


def attach_zero_gated(
    model: nn.Module,
    prompt_length: int,
    *,
    n_layers: int | None = None,
    name: str = DEFAULT,
    init_std: float = 0.02,
    train_head: bool = True,
) -> Prefix:
    """LLaMA-Adapter's prompts (Zhang et al. 2023): the model starts exactly as it was.

    In each of the last `n_layers` layers (None: all but the first two, or all of a model with
    fewer than three) trainable rows go through the layer's own k_proj and v_proj.  They are not
    rotated and have a softmax of their own, whose result is added to attention times tanh of a
    gate per head that starts at 0.  Tokens keep their positions.

    Raises:
        TypeError: no transformers model.
        ValueError: attention that is not reached through AttentionInterface or has no k_proj and
            v_proj; an encoder or encoder-decoder; otherwise as `attach_prefix`.
    """

    def make(prefix: Prefix) -> ZeroGated:
        depth = len(prefix.kv_shapes)
        count = n_layers if n_layers is not None else (depth - 2 if depth > 2 else depth)
        size, heads = sizes_for_zero_gated("attach_zero_gated", model, prefix, count)
        source = ZeroGatedPrompt(count, prompt_length, size, heads, init_std=init_std)
        return ZeroGated(source, depth - count)

    return attach(
        model, prompt_length, make, caller="attach_zero_gated", name=name, train_head=train_head
    )


def sizes_for_zero_gated(
    caller: str, model: nn.Module, prefix: Prefix, n_layers: int
) -> tuple[int, int]:
    """What the key projections take, and the number of query heads, in the last layers.

    Raises:
        ValueError: attention that is not reached by its function, has no k_proj and v_proj, or
            differs from layer to layer; another number of layers.
    """
    check_decoder(caller, model, prefix)
    modules: list[Any] = prefix.hooks.modules
    if not modules or not all(hasattr(m, "k_proj") and hasattr(m, "v_proj") for m in modules):
        raise ValueError(
            f"{caller}: {type(model).__name__} has no attention with k_proj and v_proj that looks "
            "up AttentionInterface; use attach_prefix(gated=True)"
        )
    if isinstance(n_layers, bool) or not 1 <= n_layers <= len(modules):
        raise ValueError(f"{caller}: n_layers={n_layers!r}; the model has {len(modules)}")
    found = {
        (int(module.k_proj.in_features), heads)
        for module, heads in list(zip(modules, prefix.query_heads, strict=True))[-n_layers:]
    }
    if len(found) != 1:
        raise ValueError(f"{caller}: layers of different sizes and heads {sorted(found)}")
    return found.pop()


def _embedded(table: Any, ids: Tensor, prompt_length: int) -> Tensor:
    """The ids' embeddings, repeated or cut to the length, as the model gets them: some scale."""
    if ids.is_floating_point() or not len(ids):
        raise ValueError(f"attach_prompt: init is {ids.dtype} of {len(ids)}; expected token ids")
    chosen = ids[torch.arange(prompt_length) % len(ids)].to(table.weight.device)
    with torch.no_grad():
        rows: Tensor = table(chosen)
    return rows.float()


def check_decoder(caller: str, model: nn.Module, prefix: Prefix) -> None:
    """Raise ValueError unless text never looks ahead: a prompt's keys then do not depend on it."""
    if set(prefix.locations) != {"self"} or not prefix.causal:
        raise ValueError(
            f"{caller}: {type(model).__name__} is no decoder: its text and a prompt would see each "
            "other; use attach_prefix"
        )
