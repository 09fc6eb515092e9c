"""x W^T + bias for a few rows of x, in one pass over the packed weight.

A weight of N x K takes N K / 2 bytes, a quarter of its 16-bit size, and for a few rows reading the
weight is what a product costs.  So each code is read once, decoded in registers, multiplied there:

          K: each program works through all of it (or a part of it)
        +---------------------------------------------------+
     BN | slice 0 | slice 1 | .. | slice 0 | slice 1 | .. |      N / BN programs
        +---------------------------------------------------+
        a slice is BN x BK weights, the work of one warp; a step has SLICES of them

Tensor cores multiply a slice, W (BN, BK) by x^T (BK, BM): W is the left factor, since its rows
are then sixteen of a matrix instruction and the tokens only eight.  Slices of a step are batches of
the product, so that every warp has K's of its own and no weight is decoded twice; they are added
up at the end, through shared memory.

BK is at most a block, so a slice's row has one scale.  It multiplies the sum over the slice, not
the weights: BM multiplications for 64 weights and not 64, and codebook values rounded to 16 bits
are all that is rounded before the sum (fast).  `exact` multiplies the weights in float32 and rounds
them as the plain version does: equal products, summed in another order.

Budget of an iteration, for each weight (sm_90, BM 8, BN 32, 4 warps): 2.0 byte permutations, 0.6
shifts and masks, 1.3 moves of constants, 0.1 matrix instructions, 1.2 for the rest.  Loads of x and
W go to shared memory `num_stages` steps ahead; scale codes, which are too narrow for that, are
loaded one step ahead into registers (Triton
stages no loop that carries a value over two steps).  Plain twin: minipeft.qlora.linear.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipeft.double_quant import ABSMAX_BLOCK_SIZE
from minipeft.fast import linear as fast
from minipeft.ops import Packed
from minipeft_kernels.triton.codes import decoded_scales, values
from minipeft_kernels.triton.launch import can_permute, card_of, launch, on, pointers
from minipeft_kernels.triton.selection import MOST_ROWS, Plan, plan_for


@triton.jit(do_not_specialize=["M", "rank", "scaling"])
def product_kernel(
    x, packed, absmax, scale, offset, codebook, dynamic, bias, low, b, out, M, N, K, row_of_x,
    row_bytes, rank, scaling,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, PERMUTE: tl.constexpr,
    EXACT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """out[part, m, n] = sum over the part's k of x[m, k] W[n, k] (+ bias[n], unless split).

    With RANK, a power of two of at least 32 and `rank`, the first part adds the branch of LoRA,
    scaling * sum over r of low[m, r] b[n, r].  K is a multiple of BLOCK, BLOCK of BK; EVEN: K is
    one of parts * SLICES * BK too.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    STEP: tl.constexpr = SLICES * BK
    part, parts, first_m = tl.program_id(1), tl.num_programs(1), tl.program_id(2) * BM
    steps = tl.cdiv(K, STEP * parts)
    first_k = part * steps * STEP

    # rows of the tiles of x and W: those of slice 0, then of slice 1, ..  (All slices of a row of W
    # side by side would be loaded in longer pieces; in shared memory they take more turns, and an
    # H100 needed 10% more time.)
    row_x, row_w = tl.arange(0, SLICES * BM), tl.arange(0, SLICES * BN)
    m = first_m + row_x % BM
    n = tl.minimum(tl.program_id(0) * BN + row_w % BN, N - 1)  # rows beyond N are not stored
    k_x, k_w = first_k + row_x // BM * BK, first_k + row_w // BN * BK
    x += m[:, None].to(tl.int64) * row_of_x + k_x[:, None] + tl.arange(0, BK)[None, :]
    packed += (
        n[:, None].to(tl.int64) * row_bytes + k_w[:, None] // 2 + tl.arange(0, BK // 2)[None, :]
    )
    of_row = n.to(tl.int64) * (K // BLOCK)  # number of the row's first block

    # the first scale codes; they are decoded in the loop, so that W's own loads start before it
    code = tl.load(absmax + of_row + tl.minimum(k_w, K - 1) // BLOCK)
    acc = tl.zeros((BN, BM) if SLICES == 1 else (SLICES, BN, BM), tl.float32)
    for step in range(steps):
        at = step * STEP
        if EVEN:
            rows = tl.load(x + at, mask=(m < M)[:, None], other=0.0)
            codes = tl.load(packed + at // 2)
        else:
            rows = tl.load(x + at, mask=((m < M) & (k_x + at < K))[:, None], other=0.0)
            codes = tl.load(packed + at // 2, mask=(k_w + at < K)[:, None], other=0)
        block = of_row + tl.minimum(k_w + at, K - 1) // BLOCK
        scales = decoded_scales(code, block, scale, offset, dynamic, NESTED, GROUP)
        code = tl.load(absmax + of_row + tl.minimum(k_w + at + STEP, K - 1) // BLOCK)
        if EXACT:
            w = (values(codes, codebook, tl.float32, PERMUTE) * scales[:, None]).to(DTYPE)
        else:
            w = values(codes, codebook, DTYPE, PERMUTE)
        if SLICES == 1:
            product = tl.dot(w, rows.T, input_precision="ieee")
            factor = scales[:, None]
        else:
            columns = rows.reshape(SLICES, BM, BK).permute(0, 2, 1)
            product = tl.dot(w.reshape(SLICES, BN, BK), columns, input_precision="ieee")
            factor = scales.reshape(SLICES, BN, 1)
        acc += product if EXACT else product * factor

    if SLICES > 1:
        acc = tl.sum(acc, axis=0)
    m, n = first_m + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(bias + tl.minimum(n, N - 1)).to(tl.float32)[:, None]
    if RANK > 0:
        r = tl.arange(0, RANK)
        mine = (r < rank) & (part == 0)
        factor = tl.load(b + n[:, None] * rank + r[None, :], mask=(n < N)[:, None] & mine[None, :],
                         other=0.0)  # fmt: skip
        hidden = tl.load(low + m[:, None] * rank + r[None, :],
                         mask=(m < M)[:, None] & mine[None, :], other=0.0)  # fmt: skip
        acc += tl.dot(factor, hidden.T, input_precision="ieee") * scaling
    out += (part * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(out, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def add_parts_kernel(
    parts, bias, out, M, N, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """out[m, n] = sum of parts[part, m, n] in their order, + bias[n]; parts are float32."""
    m, n = tl.program_id(1), tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + (part * M + m).to(tl.int64) * N + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=n < N)


def add_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (m, n) = the sum of parts (count, m, n), + bias."""
    m, n = out.shape
    launch(
        add_parts_kernel, (-(-n // 512), m, 1),
        (parts, out if bias is None else bias, out, m, n),
        {"SPLIT": len(parts), "HAS_BIAS": bias is not None, "SIZE": 512}, 4, 1,
    )  # fmt: skip


class Branch(NamedTuple):
    """What LoRA adds: scaling * low b^T, with low = x A^T (rows, rank) and b (out, rank)."""

    low: Tensor
    b: Tensor
    scaling: float


def takes(x: Tensor, columns: int, block_size: int) -> bool:
    """Whether the kernels of few rows take such an input, and a weight of rows of `columns`."""
    rows = x.numel() // max(1, x.shape[-1])
    few = 0 < rows <= MOST_ROWS[card_of(x.device)].get(x.element_size(), 0)
    return few and columns > 0 and columns % block_size == 0


def linear(x: Tensor, weight: Packed, bias: Tensor | None, out_features: int) -> Tensor:
    """The operator nf4_linear, on CUDA and ROCm devices (or with TRITON_INTERPRET=1).

    Blocks that run over the ends of rows go to the PyTorch row, and so do more than MOST_ROWS rows.
    """
    if not takes(x, x.shape[-1], weight.block_size) or not out_features:
        return fast.linear(x, weight, bias, out_features)
    return product(x, weight, bias, out_features)


def product(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    out_features: int,
    *,
    branch: Branch | None = None,
    exact: bool = False,
    plan: Plan | None = None,
) -> Tensor:
    """x W^T + bias, in x's dtype; x has few rows, whose length is a multiple of the block size.

    `branch` is added before the result is rounded.
    """
    *leading, k = x.shape
    x = x if x.dim() == 2 else x.reshape(-1, k)
    x = x if x.stride(1) == 1 else x.contiguous()
    m, n = x.shape[0], out_features
    plan = plan or plan_for("nf4_linear", m, n, k, x.element_size(), card_of(x.device))
    bk = min(64, weight.block_size)
    bias = None if bias is None else bias.contiguous()
    low, b, rank, scaling, padded = x, x, 1, 0.0, 0
    if branch is not None and branch.b.shape[1]:
        low, b, scaling = (
            branch.low.reshape(m, -1).contiguous(),
            branch.b.contiguous(),
            branch.scaling,
        )
        rank = b.shape[1]
        padded = max(32, triton.next_power_of_2(rank))
    out = x.new_empty(m, n)
    split = plan.parts > 1
    partial = x.new_empty(plan.parts, m, n, dtype=torch.float32) if split else out
    with on(weight.packed, x, weight.absmax, bias):
        launch(
            product_kernel,
            (-(-n // plan.tile), plan.parts, -(-m // plan.rows)),
            (x, *pointers(weight), x if bias is None else bias, low, b, partial, m, n, k,
             x.stride(0), k // 2, rank, scaling),
            {
                "NESTED": weight.scale is not None, "BLOCK": weight.block_size,
                "GROUP": ABSMAX_BLOCK_SIZE, "PERMUTE": can_permute(weight),
                "EXACT": exact or x.dtype == torch.float32,
                "HAS_BIAS": bias is not None and not split,
                "EVEN": k % (plan.parts * plan.slices * bk) == 0,
                "BM": plan.rows, "BN": plan.tile, "BK": bk, "SLICES": plan.slices, "RANK": padded,
            },
            plan.warps, plan.stages,
        )  # fmt: skip
        if split:
            add_parts(partial, bias, out)
    return out if len(leading) == 1 else out.view(*leading, n)


def product_with_lora(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    out_features: int,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> Tensor:
    """x W^T + bias + scaling * (x a^T) b^T, a (rank, in) and b (out, rank) of x's dtype.

    The branch is added to the float32 sums, so the result is rounded once; as operators apart
    (plain twin: minipeft.lora.add_lora over minipeft.qlora.linear) it is rounded twice.
    """
    low = torch.nn.functional.linear(x, a)
    if not takes(x, x.shape[-1], weight.block_size) or not out_features:
        out = fast.linear(x, weight, bias, out_features)
        flat = torch.addmm(out.view(-1, out_features), low.view(-1, len(a)), b.T, alpha=scaling)
        return flat.view(out.shape)
    return product(x, weight, bias, out_features, branch=Branch(low, b, scaling))
