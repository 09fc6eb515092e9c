"""Prefix attention without joining keys: two attentions, merged through their log-sum-exp.

The softmax over prefix and tokens together is a weighted mean of the softmax over each.  Its
weights are the sums of exponentials; lse is the logarithm of such a sum.  FlashAttention (Dao et
al. 2022) merges its blocks in the same way:

    q --+-- attention over the tokens, causal kernel --> y_x, lse_x --+
        |                                                             +--> y, lse
        +-- attention over the prefix, which all see --> y_p, lse_p --+

    y = y_x + sigmoid(lse_p - lse_x) (y_p - y_x)          lse = log(exp(lse_x) + exp(lse_p))

Joining copies all keys and values and needs a mask, and with a mask the kernel cannot skip the half
of the scores that causality forbids.  Here no key is copied.
"""

from typing import Any

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from minipeft.adapters.products import product_dtype, without_autocast
from minipeft.prefix import check_prefix, check_tokens, joined_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def why_not_merge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = True,
    dropout: float = 0.0,
) -> str | None:
    """Why `merged_prefix_attention` cannot take these arguments; None if it can.

    Attention over joined keys can.  Shapes are taken to belong together.
    """
    tensors = (q, k, v, prefix_k, prefix_v)
    if mask is not None:
        return "there is a mask"
    if dropout:
        return "there is dropout"
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return "a tensor subclass"
    if {x.device.type for x in tensors} not in ({"cpu"}, {"meta"}):  # meta: sizes alone
        return f"not all tensors are on the CPU (q: {q.device})"
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtypes of q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one of float"
    if v.shape[-1] != q.shape[-1]:
        return f"values of size {v.shape[-1]}, keys of size {q.shape[-1]}; the kernel wants one"
    if is_causal and 1 < q.shape[-2] != k.shape[-2]:
        return f"{q.shape[-2]} causal queries over {k.shape[-2]} keys: the kernel aligns upper left"
    if 0 in q.shape or 0 in k.shape:
        return "no tokens"  # the kernel divides by these sizes
    if not torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]  # CPU's too
        return "torch.nn.attention.sdpa_kernel excludes flash attention"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):  # type: ignore[no-untyped-call]
        return "forward-mode differentiation"
    return None


def merge_is_faster(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, is_causal: bool
) -> bool:
    """Whether merging beats joining, for arguments that both take: a rule made of measurements.

    The figures are merge / join, medians of one thread on an AVX-512 CPU, head_dim 64, prefixes of
    4 to 128; `python -m benchmarks.prefix_attention` measures again.
    """
    t, mib = q.shape[-2], 2**20
    small = q.itemsize == 2
    train_tokens = q.requires_grad or k.requires_grad or v.requires_grad
    train_prefix = prefix_k.requires_grad or prefix_v.requires_grad
    if torch.is_grad_enabled() and (train_tokens or train_prefix):
        if not train_tokens and t >= (16 if small else 64):
            # No backward over the tokens.  float32: 0.6-0.9 at 64, 0.4-0.5 at 512, 1.0-1.4 at 32
            # and below; bfloat16, float16: 0.2-0.9 at 16, 0.1-0.5 at 512.
            return True
        if t <= 8:
            return False  # one query over 512 keys: 0.8-1.3
    if t > 8:
        # The causal kernel skips blocks of 512 keys, so up to 512 tokens it has nothing to skip
        # (0.8-1.2 there); 0.8-0.9 at 576, 0.7 at 1024, 0.5-0.6 at 2048.  Without causality merging
        # only spares the copy, which is little beside many queries (0.5-1.3).
        return is_causal and t >= 576
    # Few queries: the copy is what costs.  float32: 0.8-1.0 at 2 MiB of tokens, 0.1-1.0 from 4 MiB
    # on; bfloat16, float16: 1.0 at 4 MiB, 0.4-0.9 from 8 MiB on.  One query of grouped heads in a
    # small dtype: 0.1-0.5 from 256 KiB on, as here the queries of a group are one product.
    least = 8 * mib if small else 4 * mib
    if t == 1 and small and q.shape[1] != k.shape[1]:
        least = mib // 4
    return k.numel() * k.itemsize + v.numel() * v.itemsize >= least


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """`prefix_attention`, merged where it can be and is faster; over joined keys otherwise."""
    tensors = (q, k, v, prefix_k, prefix_v)
    if merge_is_faster(*tensors, is_causal=is_causal) and not why_not_merge(
        *tensors, mask=mask, is_causal=is_causal, dropout=dropout
    ):
        return merged_prefix_attention(*tensors, is_causal=is_causal, scale=scale)
    return joined_attention(*tensors, mask=mask, is_causal=is_causal, scale=scale, dropout=dropout)


def merged_prefix_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s d"],
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    is_causal: bool,
    scale: float | None = None,
) -> Float[Tensor, "b h t d"]:
    """`prefix_attention` where no mask is needed, without copying keys; on the CPU.

    h is a multiple of g.  `prefix_k` and `prefix_v` (g, p, d) are for all rows, (b, g, p, d) for
    each its own; they are rounded to q's dtype and then work in float32 (float64 for float64), so
    that their gradients are summed in it.  With `is_causal` t must be s or 1.  `scale` None:
    1 / sqrt(d).  The result has q's dtype; under autocast, autocast's.

    Backward keeps its inputs, the result and one float32 number for each query and head.  Where
    neither q, k nor v need a gradient (the first layer of a frozen model), only the prefix's is
    computed.  A second derivative raises a RuntimeError.

    Raises:
        ValueError: shapes that do not belong together, or a case `why_not_merge` names.

    >>> q = k = v = torch.zeros(1, 2, 3, 4)
    >>> y = merged_prefix_attention(q, k, v, k[0], v[0] + 1, is_causal=False)
    >>> y[0, 0, 0]  # six equal scores: the mean of three zeros and three ones
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    check_tokens(q, k, v, None, is_causal=is_causal)
    check_prefix(k, v, prefix_k, prefix_v)
    reason = why_not_merge(q, k, v, prefix_k, prefix_v, is_causal=is_causal)
    if reason is not None:
        raise ValueError(f"merged_prefix_attention: {reason}; use prefix_attention")
    is_causal = is_causal and q.shape[2] > 1
    dtype = product_dtype(q)  # as autocast treats attention
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with without_autocast(q.device):
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, prefix_k, prefix_v)):
            return _Merged.apply(q, k, v, prefix_k, prefix_v, is_causal, scale)  # type: ignore[no-any-return, no-untyped-call]
        return _forward(q, k, v, prefix_k, prefix_v, is_causal, scale)[0]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The merged result (b, h, t, d) in q's dtype, and lse (b, h, t) in float32 or float64."""
    y_x, lse_x = _flash(q, k, v, is_causal, scale)
    if not pk.shape[-2]:
        return y_x, lse_x
    pk, pv = _prefix(q, pk, pv)
    y_p, lse_p = _flash(q.to(pk.dtype), pk, pv, False, scale)
    share = torch.sigmoid(lse_p - lse_x).unsqueeze(-1)
    y = torch.lerp(y_x.to(y_p.dtype), y_p, share).to(q.dtype)
    return y, torch.logaddexp(lse_x, lse_p)


class _Merged(torch.autograd.Function):
    """`_forward`, and the gradients of each part under the common softmax.

    A softmax over all keys has probabilities exp(score - lse), and the gradient of the scores is
    probability * (dy . v - dy . y).  Both need y and lse, which all keys share, and otherwise one
    key and value at a time.  So the flash kernel's backward is exact on any part of the keys, if
    it is given the merged y and lse.  dq is the sum of the parts.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor,
        is_causal: bool, scale: float | None,
    ) -> Tensor:  # fmt: skip
        y, lse = _forward(q, k, v, pk, pv, is_causal, scale)
        ctx.save_for_backward(q, k, v, pk, pv, y, lse)
        ctx.is_causal, ctx.scale = is_causal, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (dy, *ctx.saved_tensors, ctx.needs_input_grad, ctx.is_causal, ctx.scale)
        # with create_graph: what comes out must not look like a constant
        compute = _Gradients.apply if torch.is_grad_enabled() else _gradients
        return *compute(*arguments), None, None


class _Gradients(torch.autograd.Function):
    """`_gradients`, not to be differentiated.

    torch's once_differentiable is not enough: where dy is a constant it returns gradients without
    a graph, and a penalty on them would train nothing, silently.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            "merged_prefix_attention has no second derivative (nor has flash attention); call "
            "prefix_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH) to get one"
        )


def _gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, y: Tensor, lse: Tensor,
    needed: tuple[bool, ...], is_causal: bool, scale: float | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, prefix_k, prefix_v; a part of which none is needed gets none."""
    dq = dk = dv = None
    dpk, dpv = (torch.zeros_like(x) for x in (pk, pv))
    with without_autocast(q.device):
        if any(needed[:3]):
            dq, dk, dv = _flash_backward(dy, q, k, v, y, lse, is_causal, scale)
        if pk.shape[-2] and (needed[0] or any(needed[3:5])):
            keys, values = _prefix(q, pk, pv)
            dy, queries, y = (x.to(keys.dtype) for x in (dy, q, y))
            dq_p, *of_rows = _flash_backward(dy, queries, keys, values, y, lse, False, scale)
            dq = dq_p if dq is None else dq_p.add_(dq)
            dpk, dpv = (
                d.sum_to_size(x.shape).to(x.dtype) for d, x in zip(of_rows, (pk, pv), strict=True)
            )
    return None if dq is None else dq.to(q.dtype), dk, dv, dpk, dpv


def _prefix(q: Tensor, pk: Tensor, pv: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix keys and values for each row, (b, g, p, d): rounded to q's dtype, held in float32."""
    held = torch.promote_types(q.dtype, torch.float32)
    pk, pv = (x.to(q.dtype).to(held).expand(len(q), *x.shape[-3:]) for x in (pk, pv))
    return pk, pv


def _flash(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention (b, h, t, d) and its lse (b, h, t), in float32 for the small dtypes."""
    repeats = q.shape[1] // k.shape[1]
    q, k, v = _equal_heads(q, k, v, is_causal)
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        *map(_dense_rows, (q, k, v)), 0.0, is_causal, scale=scale
    )
    if repeats > 1 and not is_causal:
        y = rearrange(y, "b g (r t) d -> b (g r) t d", r=repeats)
        lse = rearrange(lse, "b g (r t) -> b (g r) t", r=repeats)
    return y, lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
    is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v for a part of the keys; y and lse are those of all keys."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1 and not is_causal:
        grad, y = (rearrange(x, "b (g r) t d -> b g (r t) d", r=repeats) for x in (grad, y))
        lse = rearrange(lse, "b (g r) t -> b g (r t)", r=repeats)
    q, k, v = _equal_heads(q, k, v, is_causal)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *map(_dense_rows, (grad, q, k, v, y)), lse, 0.0, is_causal, scale=scale
    )
    if repeats > 1 and is_causal:
        dk, dv = (reduce(x, "b (g r) s d -> b g s d", "sum", r=repeats) for x in (dk, dv))
    elif repeats > 1:
        dq = rearrange(dq, "b g (r t) d -> b (g r) t d", r=repeats)
    return dq, dk, dv


def _equal_heads(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with one number of heads; not every version of the kernel knows grouped ones.

    Without causality the queries of a group can follow each other, and no key is copied.
    """
    repeats = q.shape[1] // k.shape[1]
    if repeats == 1:
        return q, k, v
    if not is_causal:
        return rearrange(q, "b (g r) t d -> b g (r t) d", r=repeats), k, v
    k, v = (repeat(x, "b g s d -> b (g r) s d", r=repeats) for x in (k, v))
    return q, k, v


def _dense_rows(x: Tensor) -> Tensor:
    """x with the numbers of a row side by side and rows apart: the kernel reads no other stride."""
    return x if x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] else x.contiguous()
