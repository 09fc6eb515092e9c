"""Rows of new tokens in PEFT's files: trained tokens whose ids lie behind the base's table.

    saved        trainable_token_indices {"embed_tokens": [n, ..., n+k-1]} and k rows; for load_peft
                 `rows_before` n in the metadata
    loaded       onto n rows: behind them, as extend_vocabulary does, if the file has rows_before
                 onto n rows and k of extend_vocabulary: in place of these
                 onto a table of n + k rows: trained tokens, as PEFT has them

Tables that train whole are saved whole, with n + k rows, as PEFT's modules_to_save; they load onto
a table of n + k rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from minipeft.adapters.names import named
from minipeft.adapters.protocol import Adapter, innermost, is_adapter, linear_shape
from minipeft.layers.trained import TrainedModule
from minipeft.layers.vocabulary import LongerHead, LongerTable
from minipeft.model.vocabulary import named_by, settle_numbers, share_weights


def is_longer(module: object) -> bool:
    """Whether this is a table or a head with new rows behind it."""
    return isinstance(module, LongerTable | LongerHead)


def written_rows(
    place: str, stack: Sequence[Adapter]
) -> tuple[list[int] | None, dict[str, Tensor], bool]:
    """What to write of a stack whose outermost layer has new rows.

    The new tokens' ids (None: the module is saved whole), its tensors by their keys, and whether a
    head is tied to its table.

    Raises:
        ValueError: PEFT's format cannot express what lies below.
    """
    layer, below = stack[0], stack[1:]
    assert isinstance(layer, LongerTable | LongerHead)
    tied = isinstance(layer, LongerHead) and layer.table is not None
    if len(below) == 1 and isinstance(below[0], TrainedModule):
        return None, {f"{place}.{n}": v for n, v in layer.exact_parameters().items()}, tied
    if below:
        raise ValueError(
            f"save_peft: {place} has new rows over {type(below[0]).__name__}, which PEFT's format "
            "cannot express for a table of more rows; use adapter_state_dict with safetensors"
        )
    if isinstance(layer, LongerHead) and layer.table is not None:
        return [], {}, True  # PEFT follows tied weights by itself
    rows = layer.new_rows
    ids = list(range(layer.old_rows, layer.old_rows + len(rows)))
    return ids, {f"{place}.token_adapter.trainable_tokens_delta": rows}, False


def behind(
    where: str, model: nn.Module, module: nn.Module, rows_before: int | None, ids: Sequence[int],
    name: str,
) -> nn.Module | None:  # fmt: skip
    """The module that these rows go behind; None: they are rows of the table as it is.

    Raises:
        ValueError: the model has another number of rows.
    """
    count = rows_now(module)
    if is_longer(module):
        old: int = module.old_rows  # type: ignore[assignment]
        mine = any(id(a) == id(module) for s in named(model).get(name, {}).values() for a in s)
        if not mine or is_adapter(module.base):
            raise ValueError(
                f"{where}: the new rows in the model belong to another adapter, or lie over one; "
                "take that off first (minipeft.remove)"
            )
        if list(ids) != list(range(old, count)):
            raise ValueError(
                f"{where}: rows of tokens {_few(ids)}, and extend_vocabulary made {old} to "
                f"{count - 1} in the model"
            )
        return module.base  # type: ignore[return-value]
    if rows_before is None or count > max(ids):
        return None
    if rows_before != count or list(ids) != list(range(count, count + len(ids))):
        raise ValueError(
            f"{where}: new rows {_few(ids)} of a table that had {rows_before} rows, and the "
            f"model's has {count}; load it onto the model that it was trained on, or after the "
            "adapters that came before it (minipeft.merge_in_order)"
        )
    return module


def rows_now(module: nn.Module) -> int:
    """How many tokens a table or a head has rows for, with the new ones behind it."""
    count: int = getattr(module, "num_embeddings", getattr(module, "out_features", 0))
    return count


def _few(ids: Sequence[int]) -> str:
    return f"{ids[0]} to {ids[-1]} ({len(ids)} in all)"


def tied_heads(modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """The names of the linear layers that share the weight, or the codes, of a table."""
    return [
        other for other, module in modules.items()
        if other != name and linear_shape(innermost(module)) is not None
        and share_weights(modules[name], module)
    ]  # fmt: skip


def check_heads(model: nn.Module, made: Mapping[str, nn.Module], where: str) -> None:
    """Raise ValueError if the table got new rows and the model's head none, or the other way."""
    longer = {id(innermost(layer)): name for name, layer in made.items() if is_longer(layer)}
    if not longer:
        return
    for getter, what in (("get_input_embeddings", "table"), ("get_output_embeddings", "head")):
        module = named_by(model, getter)
        if module is not None and id(innermost(module)) not in longer:
            raise ValueError(
                f"{where}: has new rows for {next(iter(longer.values()))!r} and none for the "
                f"{what} ({getter}); call model.resize_token_embeddings first, which makes up "
                "those that are missing"
            )


def settle(model: nn.Module, made: Mapping[str, nn.Module], before: Mapping[str, Any]) -> None:
    """Let the model's numbers of the vocabulary follow the tables that were made."""
    for name, layer in made.items():
        if isinstance(layer, LongerTable):
            if isinstance(old := before.get(name), LongerTable):
                old.restore_base()
            settle_numbers(model, layer)
