"""attach_prompt: prompt tuning and P-tuning v1 on a Hugging Face decoder."""

from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT
from minipeft.integrations.transformers.attach import attach
from minipeft.integrations.transformers.prefixes import Prefix
from minipeft.integrations.transformers.prompt_runs import RunPrompt
from minipeft.layers.prompt import PromptEmbedding, PromptEncoder
from minipeft.model.peft_words import in_our_words

KINDS = ("table", "mlp")


@in_our_words
def attach_prompt(
    model: nn.Module,
    prompt_length: int,
    *,
    name: str = DEFAULT,
    kind: str = "table",
    hidden: int | None = None,
    init: str | Tensor = "random",
    init_std: float = 0.02,
    position: str | None = None,
    window: str | None = None,
    train_head: bool = True,
) -> Prefix:
    """Put trainable embeddings before the text of a decoder.

    `kind` "table" is prompt tuning (Lester et al. 2021): the embeddings are trained as they are.
    "mlp" is P-tuning v1 (Liu et al. 2021): an MLP makes them, whose inner size is `hidden` (None:
    that of the embeddings); `bake` drops it after training.  A table starts from N(0, init_std)
    (`init` "random"), from embeddings of different tokens drawn from the vocabulary ("vocabulary"),
    or from those of a text: `init` is then a tensor of token ids, (n,) or (1, n), which are
    repeated or cut to the length.

    The prompt runs through the model once in each forward, for all rows of the batch.  Its keys and
    values come before those of the text, as in a deep prefix, so caches, masks and outputs are
    those of the text.  Names, rows, `position`, `window` and heads are as in `attach_prefix`.
    `bake` makes the prompt a deep prefix, which needs no run.

    Raises:
        TypeError: not a transformers model.
        ValueError: an encoder or encoder-decoder, whose text and prompt see each other; another
            kind or init; otherwise as `attach_prefix`.
    """
    if kind not in KINDS:
        raise ValueError(f"attach_prompt: kind={kind!r}; choose one of {KINDS}")
    if kind != "table" and not (isinstance(init, str) and init == "random"):
        raise ValueError("attach_prompt: init is for kind='table'; a network starts by itself")
    if isinstance(init, str) and init not in ("random", "vocabulary"):
        raise ValueError(
            f"attach_prompt: init={init!r}; expected 'random', 'vocabulary' or token "
            "ids: tokenizer(text, return_tensors='pt').input_ids"
        )

    def make(prefix: Prefix) -> RunPrompt:
        check_decoder("attach_prompt", model, prefix)
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        size = int(table.embedding_dim)
        if kind != "table":
            return RunPrompt(PromptEncoder(prompt_length, size, hidden=hidden))
        source = PromptEmbedding(prompt_length, size, init_std=init_std)
        if isinstance(init, Tensor):
            source.load_table(_embedded(table, init, prompt_length))
        elif init == "vocabulary":
            if prompt_length > table.num_embeddings:
                raise ValueError(
                    f"attach_prompt: prompt_length={prompt_length} of {table.num_embeddings} "
                    "tokens; each is drawn once"
                )
            drawn = torch.randperm(int(table.num_embeddings))[:prompt_length]
            source.load_table(_embedded(table, drawn, prompt_length))
        return RunPrompt(source)

    return attach(
        model, prompt_length, make, caller="attach_prompt", name=name, position=position,
        window=window, train_head=train_head,
    )  # fmt: skip


def _embedded(table: Any, ids: Tensor, prompt_length: int) -> Tensor:
    """The ids' embeddings, repeated or cut to the length, as the model gets them: some scale."""
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or not ids.numel() or ids.shape[-1:] != (ids.numel(),):
        raise ValueError(
            f"attach_prompt: init is {ids.dtype} of shape {tuple(ids.shape)}; expected the token "
            "ids of one text"
        )
    ids, (low, high) = ids.reshape(-1).long(), (int(ids.min()), int(ids.max()))
    if low < 0 or high >= table.num_embeddings:
        raise ValueError(
            f"attach_prompt: init has ids from {low} to {high}; the model has 0 to "
            f"{table.num_embeddings - 1}"
        )
    chosen = ids[torch.arange(prompt_length) % len(ids)].to(table.weight.device)
    with torch.no_grad():
        rows: Tensor = table(chosen)
    return rows.float()


def check_decoder(caller: str, model: nn.Module, prefix: Prefix) -> None:
    """Raise ValueError unless text never looks ahead: a prompt's keys then do not depend on it."""
    if set(prefix.locations) != {"self"} or not prefix.causal:
        raise ValueError(
            f"{caller}: {type(model).__name__} is not a decoder: its text and a prompt would see "
            "each other; use attach_prefix"
        )
