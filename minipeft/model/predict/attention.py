"""Attention on the meta device takes the kernel that it would take on the real one.

On the meta device torch computes scaled_dot_product_attention by its formula, which keeps a number
for each pair of tokens.  On a CPU and on a GPU a fused kernel keeps the result and one number for
each query.  Which kernel a CPU takes is asked of torch itself, on two tokens with values.

The operator itself is replaced, for meta tensors and for a while.  So it does not matter who calls
it: a model, nn.MultiheadAttention, or backward where checkpointing computes a layer again.
"""

import threading
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FORMULA = torch.ops.aten._scaled_dot_product_attention_math
_one_at_a_time = threading.RLock()  # the replacement holds for all threads of the process


class FusedAttention:
    """Within this context, attention over meta tensors takes the kernel of this device type.

    It works in every thread; another thread that enters one waits until this one has ended.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def __enter__(self) -> "FusedAttention":
        _one_at_a_time.acquire()
        library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        self._library = library
        library.impl("scaled_dot_product_attention", self._attention, "AutogradMeta")
        return self

    def __exit__(self, *_: Any) -> None:
        self._library._destroy()
        _one_at_a_time.release()

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if not self._is_fused(q, k, v, attn_mask, dropout_p > 0, is_causal, enable_gqa):
            out: Tensor = FORMULA(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
            return out
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch does so too
            seen, zero = attn_mask.logical_not(), torch.zeros((), dtype=q.dtype, device="meta")
            attn_mask = torch.where(seen, float("-inf"), zero)
        fused: Tensor = FUSED(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return fused

    def _is_fused(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: bool,
        is_causal: bool, enable_gqa: bool,
    ) -> bool:  # fmt: skip
        """Whether the device takes a fused kernel."""
        if not q.dim() == k.dim() == v.dim() == 4:  # (batch, heads, tokens, size)
            return False
        if self.device_type != "cpu":
            return True
        if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in (q, k, v)):
            return False
        of_mask = None if mask is None else (mask.dtype, mask.dim(), mask.requires_grad)
        sizes = [(x.shape[1], x.shape[-1]) for x in (q, k, v)]
        return _is_fused_on_cpu(q.dtype, *sizes, of_mask, dropout, is_causal, enable_gqa)


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
    dtype: torch.dtype, queries: tuple[int, int], keys: tuple[int, int], values: tuple[int, int],
    mask: tuple[torch.dtype, int, bool] | None, dropout: bool, is_causal: bool, enable_gqa: bool,
) -> bool:  # fmt: skip
    """Whether a CPU takes the fused kernel: two tokens of these heads and sizes are tried.

    A pair is the number of heads and their size; of a mask, the dtype, the number of axes and
    whether it takes part in backward.
    """
    q, k, v = (torch.zeros(1, h, 2, size, dtype=dtype) for h, size in (queries, keys, values))
    given = None
    if mask is not None:
        of, axes, trains = mask
        given = torch.zeros([1] * (axes - 2) + [2, 2][:axes], dtype=of).requires_grad_(trains)
    with torch.no_grad(), _Seen() as seen:  # nothing is saved for a backward
        F.scaled_dot_product_attention(
            q, k, v, given, 0.1 * dropout, is_causal, enable_gqa=enable_gqa
        )
    return any("flash_attention_for_cpu" in name for name in seen.names)
