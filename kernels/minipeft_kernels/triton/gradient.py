"""grad W for a few rows of grad, without a transposed copy of the packed weight.

The product's other direction: the sum runs over the rows of W, in which codes are not neighbours.
A tile of W is decoded as it lies, (BN, BK), and is the right factor as it is; tensor cores want its
columns, and shared memory turns it (Triton puts it there).

    slice 0 of a step   +----+
                     BN | BK |         K / BK programs, each works through all rows of W
                        +----+         (or a part of it)
    slice 1             | .. |

A slice's scales belong to rows of W, so to columns of grad: fast multiplies grad by them, BM of it
for each scale and not BK weights, and rounds grad * scale to its dtype.  float16 has no exponents
for that (gradients are small), so it is always `exact`: weights are multiplied in float32 and
rounded as the plain version does.  Plain twin: minipeft.qlora.input_gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipeft.double_quant import ABSMAX_BLOCK_SIZE
from minipeft.fast import linear as fast
from minipeft.ops import Packed
from minipeft_kernels.triton.codes import decoded_scales, values
from minipeft_kernels.triton.launch import can_permute, card_of, launch, on, pointers
from minipeft_kernels.triton.product import add_parts, takes
from minipeft_kernels.triton.selection import Plan, plan_for


@triton.jit(do_not_specialize=["M"])
def gradient_kernel(
    grad, packed, absmax, scale, offset, codebook, dynamic, out, M, N, K, row_of_grad, row_bytes,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, PERMUTE: tl.constexpr,
    EXACT: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """out[part, m, k] = sum over the part's n of grad[m, n] W[n, k].

    K is a multiple of BLOCK, BLOCK of BK; EVEN: N is one of parts * SLICES * BN.
    """
    DTYPE: tl.constexpr = grad.dtype.element_ty
    # Triton spreads a 4-bit factor's sum over 32 terms; of a sum of 16 it makes wrong numbers
    tl.static_assert(BN >= 32 or not PERMUTE or tl.float32 == DTYPE)
    STEP: tl.constexpr = SLICES * BN
    part, parts, first_m = tl.program_id(1), tl.num_programs(1), tl.program_id(2) * BM
    first_k = tl.program_id(0) * BK
    steps = tl.cdiv(N, STEP * parts)
    first_n = part * steps * STEP

    row_g, row_w = tl.arange(0, SLICES * BM), tl.arange(0, SLICES * BN)
    m = first_m + row_g % BM
    n_g = first_n + (row_g // BM * BN)[:, None] + tl.arange(0, BN)[None, :]
    n_w = first_n + row_w
    grad += m[:, None].to(tl.int64) * row_of_grad + n_g
    bytes_ = first_k // 2 + tl.arange(0, BK // 2)
    per_row = K // BLOCK
    mine = first_k // BLOCK

    # as in product.py: scale codes are loaded a step ahead, and decoded in the loop
    code = tl.load(absmax + tl.minimum(n_w, N - 1).to(tl.int64) * per_row + mine)
    acc = tl.zeros((BM, BK) if SLICES == 1 else (SLICES, BM, BK), tl.float32)
    for step in range(steps):
        at = step * STEP
        n = tl.minimum(n_w + at, N - 1)
        if EVEN:
            rows = tl.load(grad + at, mask=(m < M)[:, None], other=0.0)
        else:
            rows = tl.load(grad + at, mask=(m < M)[:, None] & (n_g + at < N), other=0.0)
        codes = tl.load(packed + n[:, None].to(tl.int64) * row_bytes + bytes_[None, :])
        block = n.to(tl.int64) * per_row + mine
        scales = decoded_scales(code, block, scale, offset, dynamic, NESTED, GROUP)
        later = tl.minimum(n_w + at + STEP, N - 1)
        code = tl.load(absmax + later.to(tl.int64) * per_row + mine)
        if EXACT:
            w = (values(codes, codebook, tl.float32, PERMUTE) * scales[:, None]).to(DTYPE)
        else:
            w = values(codes, codebook, DTYPE, PERMUTE)
            of_column = scales.reshape(SLICES, 1, BN).broadcast_to(SLICES, BM, BN)
            rows = (rows.to(tl.float32) * of_column.reshape(SLICES * BM, BN)).to(DTYPE)
        if SLICES == 1:
            acc = tl.dot(rows, w, acc, input_precision="ieee")
        else:
            acc = tl.dot(
                rows.reshape(SLICES, BM, BN), w.reshape(SLICES, BN, BK), acc,
                input_precision="ieee",
            )  # fmt: skip

    if SLICES > 1:
        acc = tl.sum(acc, axis=0)
    m, k = first_m + tl.arange(0, BM), first_k + tl.arange(0, BK)
    out += (part * M + m[:, None]).to(tl.int64) * K + k[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])


def input_gradient(grad: Tensor, weight: Packed, in_features: int) -> Tensor:
    """The operator nf4_linear_input_gradient, on CUDA and ROCm devices.

    What the kernel does not take goes to the PyTorch row, as in `product.linear`.
    """
    if not takes(grad, in_features, weight.block_size) or not grad.shape[-1]:
        return fast.input_gradient(grad, weight, in_features)
    return gradient(grad, weight, in_features)


def gradient(
    grad: Tensor,
    weight: Packed,
    in_features: int,
    *,
    exact: bool = False,
    plan: Plan | None = None,
) -> Tensor:
    """grad W, in grad's dtype; few rows, and in_features a multiple of the block size."""
    *leading, n = grad.shape
    grad = grad if grad.dim() == 2 else grad.reshape(-1, n)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    m, k = grad.shape[0], in_features
    plan = plan or plan_for(
        "nf4_linear_input_gradient", m, n, k, grad.element_size(), card_of(grad.device)
    )
    bk = min(64, weight.block_size)
    out = grad.new_empty(m, k)
    split = plan.parts > 1
    partial = grad.new_empty(plan.parts, m, k, dtype=torch.float32) if split else out
    with on(weight.packed, grad, weight.absmax):
        launch(
            gradient_kernel, (k // bk, plan.parts, -(-m // plan.rows)),
            (grad, *pointers(weight), partial, m, n, k, grad.stride(0), k // 2),
            {
                "NESTED": weight.scale is not None, "BLOCK": weight.block_size,
                "GROUP": ABSMAX_BLOCK_SIZE, "PERMUTE": can_permute(weight),
                "EXACT": exact or grad.dtype != torch.bfloat16,
                "EVEN": n % (plan.parts * plan.slices * plan.tile) == 0,
                "BM": plan.rows, "BN": plan.tile, "BK": bk, "SLICES": plan.slices,
            },
            plan.warps, plan.stages,
        )  # fmt: skip
        if split:
            add_parts(partial, None, out)
    return out if len(leading) == 1 else out.view(*leading, k)
