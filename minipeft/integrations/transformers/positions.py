"""Positions and masks of a transformers model that has a prefix."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers.arguments import Arguments, names_of

TABLES = ("wpe", "embed_positions", "position_embeddings")  # learned absolute positions


def _seen(given: Arguments) -> Any:
    """How many tokens the cache holds; a tensor where the cache is static."""
    cache = given["past_key_values"]
    return 0 if cache is None else cache.get_seq_length()


def _tokens(given: Arguments) -> Tensor:
    """A tensor (batch, tokens, ...) of the call."""
    ids = given["input_ids"]
    tokens: Tensor = given["inputs_embeds"] if ids is None else ids
    return tokens


def check_mask(given: Arguments) -> None:
    """Raise ValueError unless a 2-D mask covers the cached and the new tokens, and them alone."""
    mask, seen = given["attention_mask"], _seen(given)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not isinstance(seen, int):
        return
    expected = seen + _tokens(given).shape[1]
    if mask.shape[1] != expected:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens; expected {expected}, cached and new "
            "ones together (the prefix takes no part in it)"
        )


def shift(given: Arguments, prefix_length: int) -> None:
    """Number the tokens from prefix_length on, or from the given positions plus that."""
    positions = given["position_ids"]
    if positions is None:
        tokens = _tokens(given)
        count = torch.arange(tokens.shape[1], device=tokens.device)
        positions = (count + _seen(given))[None]
    given["position_ids"] = positions + prefix_length


def table_rows(base: nn.Module) -> int | None:
    """How many positions a learned table holds; None where positions are computed."""
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding):
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None


def check_table(given: Arguments, rows: int | None) -> None:
    """Raise ValueError if a position lies beyond a learned table of `rows`."""
    if rows is None:
        return
    positions = given["position_ids"]
    if positions is None:
        last = int(_seen(given)) + _tokens(given).shape[1] - 1
    else:
        last = int(positions.max()) if positions.numel() else -1
    if last >= rows:
        raise ValueError(
            f"position {last} is beyond the model's table of {rows} positions; prefix and text "
            "must fit it together (or attach with position='none')"
        )


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run_tokens(model: nn.Module, count: int, **arguments: Any) -> Any:
    """The model's output for the tokens 0, 1, 2, ...

    Raises:
        ValueError: the model cannot be run like this.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.arange(count, device=device)[None]
    with _quietly(model):
        try:
            return model(input_ids=ids, use_cache=False, **arguments)
        except Exception as error:
            raise ValueError(
                f"attach_prefix: {type(model).__name__} could not be run on {count} tokens: {error}"
            ) from error


def check_rule(base: nn.Module) -> None:
    """Raise ValueError unless the model numbers its tokens 0, 1, 2, ..., padded or not.

    That is what `shift` adds to.  Looked at with three tokens of which the middle one is padding:
    a model that counts what the mask keeps would see the outer two side by side.
    """
    if "position_ids" not in names_of(base):
        raise ValueError(
            f"attach_prefix: {type(base).__name__} takes no position_ids; use position='none'"
        )
    device = base.get_input_embeddings().weight.device  # type: ignore[operator]
    mask = torch.tensor([[1, 0, 1]], device=device)
    counted = torch.arange(3, device=device)[None]
    own = run_tokens(base, 3, attention_mask=mask)
    same = run_tokens(base, 3, attention_mask=mask, position_ids=counted)
    if not torch.equal(own.last_hidden_state[:, -1], same.last_hidden_state[:, -1]):
        raise ValueError(
            f"attach_prefix: {type(base).__name__} does not number its tokens 0, 1, 2, ... by "
            "itself, so they cannot be shifted; use position='none'"
        )
