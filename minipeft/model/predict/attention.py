"""Attention on the meta device takes the kernel that it would take on the real one.

On the meta device torch computes scaled_dot_product_attention by its formula, which keeps a number
for each pair of tokens.  On a CPU and on a GPU a fused kernel keeps the result and one number for
each query.  Which kernel a CPU takes is asked of torch itself, on two tokens with values.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class FusedAttention(TorchFunctionMode):
    """Within this context, attention over meta tensors takes the kernel of this device type."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args and args[0].is_meta:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if self.device_type == "cpu" and not _is_fused_on_cpu(
            q.dtype, (q.shape[1], q.shape[-1]), (k.shape[1], k.shape[-1]), v.shape[-1],
            None if attn_mask is None else attn_mask.dtype, dropout_p > 0, is_causal, enable_gqa,
        ):  # fmt: skip
            out: Tensor = F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return out
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch does so too
            added = torch.zeros_like(attn_mask, dtype=q.dtype)
            attn_mask = added.masked_fill_(attn_mask.logical_not(), float("-inf"))
        fused: Tensor = FUSED(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return fused


class WithinModules:
    """`mode` is on while a module of `model` runs, also where backward computes it again.

    A mode around the backward itself would not do: torch takes it off for that call.
    """

    def __init__(self, mode: FusedAttention, model: nn.Module) -> None:
        self.mode, self.depth = mode, 0
        self.handles: list[Any] = []
        for module in model.modules():
            self.handles.append(module.register_forward_pre_hook(self.enter))
            self.handles.append(module.register_forward_hook(self.leave, always_call=True))

    def enter(self, *_: Any) -> None:
        """The outermost module begins, or another within it."""
        if not self.depth:
            self.mode.__enter__()  # type: ignore[no-untyped-call]
        self.depth += 1

    def leave(self, *_: Any) -> None:
        """It ends."""
        self.depth -= 1
        if not self.depth:
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@cache
def _is_fused_on_cpu(
    dtype: torch.dtype, queries: tuple[int, int], keys: tuple[int, int], values: int,
    mask: torch.dtype | None, dropout: bool, is_causal: bool, enable_gqa: bool,
) -> bool:  # fmt: skip
    """Whether a CPU takes the fused kernel: two tokens of these heads and sizes are tried."""
    (heads, size), (kv_heads, key_size) = queries, keys
    q = torch.zeros(1, heads, 2, size, dtype=dtype)
    k = torch.zeros(1, kv_heads, 2, key_size, dtype=dtype)
    v = torch.zeros(1, kv_heads, 2, values, dtype=dtype)
    given = None if mask is None else torch.zeros(1, 1, 2, 2, dtype=mask)
    with torch.no_grad(), _Seen() as seen:  # nothing is saved for a backward
        F.scaled_dot_product_attention(
            q, k, v, given, 0.1 * dropout, is_causal, enable_gqa=enable_gqa
        )
    return any("flash_attention_for_cpu" in name for name in seen.names)
