"""LoRA adapters by row: each row of a batch is multiplied by the factors of its own slots alone.

A gate (rows, capacity) says which slots a row uses.  Two kernels, shrink and expand:

    h = x A[slot]^T                              y = out + sum over slots of gate h B[slot]

          K: divided among `parts`                      N
       +--------+--------+--------+                 +--------+--------+
    BM | part 0 | part 1 | ..     |              BM | BN     | ..     |
       +--------+--------+--------+                 +--------+--------+
    a program for each slot, which returns at     a program goes through the slots that its rows
    once if none of its BM rows uses the slot     use, and adds up the parts of h in their order

The grid covers all slots, whatever the gate holds: nothing waits for the device or is allocated by
its values, so a CUDA graph serves other rows when the gate is changed in place.  No atomics: the
same input gives the same bits.  A row that uses no slot keeps the bits of `out`.

Budget.  One token for each of m rows reads the factors of its slots, rank * (K + N) numbers, from
memory once and from the L2 cache again for each row (expand) or 16 rows (shrink).  Factors are read
in their own dtype and rounded to that of `out` in registers; PyTorch's form writes them rounded to
memory in each call.  h takes parts * m * capacity * rank numbers, used or not: 16 MiB for 2,048
tokens and 32 slots of rank 16.

Constants.  Rows of a batch that decodes differ, so shrink takes the 16 that a matrix instruction
has at least, and expand a row by itself, without matrix instructions: a program has one slot to
wait for.  64 rows where each row of the batch has as many tokens: they use the same slots.  BR, at
most 64 ranks at a time (16 where expand has 64 rows), bounds the registers of high ranks.  Up to 16
parts: 256 columns of K = 4096 for each, since one slot alone would keep few multiprocessors busy.
Plain twin: minipeft.layers.bank.add_rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipeft.layers import bank
from minipeft_kernels.triton.launch import card_of, lanes_of, launch, on

# beyond them the PyTorch form computes, and in float32 on AMD, where registers do not suffice
MOST_SLOTS, MOST_RANK = 64, 256
AMD_THREADS = 256  # of a program: with 128, warps of 32 threads have too few registers


@triton.jit
def _gates(gate, m, M, each, capacity, slot, DTYPE: tl.constexpr):
    """What rows m have in the gate for a slot, rounded to DTYPE as the plain version does."""
    return tl.load(gate + (m // each) * capacity + slot, mask=m < M, other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=["M", "each", "capacity", "rank"])
def shrink_kernel(
    x, a, gate, hidden, M, K, each, capacity, rank, row_of_x,
    RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """hidden[part, m, slot, r] = sum over the part's k of x[m, k] a[slot, r, k], r < RANK.

    For the rows that use the slot; nothing is written for others.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    slot, part = tl.program_id(1) // (RANK // BR), tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.program_id(1) % (RANK // BR) * BR + tl.arange(0, BR)
    mine = _gates(gate, m, M, each, capacity, slot, DTYPE) != 0
    if tl.max(mine.to(tl.int32), axis=0) == 0:
        return
    steps = tl.cdiv(K, BK * tl.num_programs(2))
    first_k = part * steps * BK
    x += m[:, None].to(tl.int64) * row_of_x
    a += (slot * rank + r[None, :]).to(tl.int64) * K
    acc = tl.zeros((BM, BR), tl.float32)
    for step in range(steps):
        k = first_k + step * BK + tl.arange(0, BK)
        rows = tl.load(x + k[None, :], mask=mine[:, None] & (k < K)[None, :], other=0.0)
        factor = tl.load(a + k[:, None], mask=(r < rank)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(rows, factor.to(DTYPE), acc, input_precision="ieee")
    at = ((part * M + m).to(tl.int64) * capacity + slot) * RANK
    tl.store(
        hidden + at[:, None] + r[None, :], acc.to(hidden.dtype.element_ty), mask=mine[:, None]
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "each", "capacity", "rank"])
def expand_kernel(
    hidden, b, gate, out, y, M, N, each, capacity, rank, row_of_out,
    RANK: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[m, n] = out[m, n] + sum over slots and r of gate[m, slot] hidden[m, slot, r] b[slot, r, n].

    hidden is summed over its PARTS and rounded to out's dtype first.  SLOTS, RANK: powers of two.
    """
    DTYPE: tl.constexpr = y.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n, slots = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, SLOTS)
    inside = (m < M)[:, None] & (slots < capacity)[None, :]
    gates = tl.load(gate + (m // each)[:, None] * capacity + slots[None, :], mask=inside, other=0.0)
    uses = (gates.to(DTYPE) != 0).to(tl.int32)
    used = tl.max(uses, axis=0)  # by any of the rows
    acc = tl.zeros((BM, BN), tl.float32)
    slot = tl.min(tl.where(used > 0, slots, SLOTS), axis=0)
    while slot < SLOTS:
        strength = _gates(gate, m, M, each, capacity, slot, DTYPE).to(tl.float32)[:, None]
        for first in range(0, RANK, BR):
            r = first + tl.arange(0, BR)
            h = tl.zeros((BM, BR), tl.float32)
            for part in tl.static_range(PARTS):
                at = ((part * M + m).to(tl.int64) * capacity + slot) * RANK
                h += tl.load(hidden + at[:, None] + r[None, :], mask=strength != 0, other=0.0)
            h = (h.to(DTYPE).to(tl.float32) * strength).to(DTYPE)
            at = (slot * rank + r)[:, None].to(tl.int64) * N + n[None, :]
            factor = tl.load(b + at, mask=(r < rank)[:, None] & (n < N)[None, :], other=0.0)
            if BM == 1:
                column = h.to(tl.float32).reshape(BR, 1)
                terms = column * factor.to(DTYPE).to(tl.float32)
                acc += tl.sum(terms, axis=0)[None, :]
            else:
                acc = tl.dot(h, factor.to(DTYPE), acc, input_precision="ieee")
        slot = tl.min(tl.where((used > 0) & (slots > slot), slots, SLOTS), axis=0)
    mask = (m < M)[:, None] & (n < N)[None, :]
    base = tl.load(out + m[:, None].to(tl.int64) * row_of_out + n[None, :], mask=mask, other=0.0)
    total = (base.to(tl.float32) + acc).to(DTYPE)
    y += m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y, tl.where((tl.max(uses, axis=1) > 0)[:, None], total, base), mask=mask)


def tiles(m: int, k: int, each: int, rank: int, itemsize: int) -> dict[str, int]:
    """Sizes of the tiles for m tokens, `each` of them in a row of the gate; see the top."""
    padded = max(16, triton.next_power_of_2(rank))  # a matrix instruction sums over 16
    br = min(64, padded)
    rows = 16 if each < 64 or itemsize == 4 else 64
    alone = each < 16
    most = max(1, min(16, 128 // -(-m // rows), k // 256))
    return {
        "RANK": padded, "BR": br, "rows": rows, "BK": 64 if rows == 64 or br == 64 else 128,
        "parts": 1 << (most.bit_length() - 1),
        "rows_out": 1 if alone else rows, "BN": 4096 // br if alone else 128,
        "BR_out": 16 if rows == 64 else br,
    }  # fmt: skip


def add_rows(out: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """The operator lora_rows, on CUDA and ROCm devices (or with TRITON_INTERPRET=1)."""
    (capacity, rank, k), n = a.shape, b.shape[2]
    card = card_of(out.device)
    takes = card != "old" and not (card == "amd" and out.element_size() == 4)
    if not takes or capacity > MOST_SLOTS or rank > MOST_RANK:
        return bank.add_rows(out, x, a, b, gate)
    x, flat = x.to(out.dtype).reshape(-1, k), out.reshape(-1, n)
    x = x if x.stride(1) == 1 else x.contiguous()
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    a, b, gate = a.contiguous(), b.contiguous(), gate.to(out.device).contiguous()
    m = len(flat)
    y = out.new_empty(m, n)
    if not y.numel():
        return y.view(out.shape)
    each = m // len(gate)
    t = tiles(m, k, each, rank, out.element_size())
    kind = out.dtype if t["parts"] == 1 else torch.float32
    hidden = out.new_empty(t["parts"], m, capacity, t["RANK"], dtype=kind)
    warps = AMD_THREADS // lanes_of(out.device) if card == "amd" else 4
    with on(out, x, a, b):
        launch(
            shrink_kernel, (-(-m // t["rows"]), capacity * (t["RANK"] // t["BR"]), t["parts"]),
            (x, a, gate, hidden, m, k, each, capacity, rank, x.stride(0)),
            {"RANK": t["RANK"], "BM": t["rows"], "BK": t["BK"], "BR": t["BR"]}, warps, 3,
        )  # fmt: skip
        launch(
            expand_kernel, (-(-m // t["rows_out"]), -(-n // t["BN"]), 1),
            (hidden, b, gate, flat, y, m, n, each, capacity, rank, flat.stride(0)),
            {"RANK": t["RANK"], "SLOTS": triton.next_power_of_2(capacity), "PARTS": t["parts"],
             "BM": t["rows_out"], "BN": t["BN"], "BR": t["BR_out"]}, warps, 1,
        )  # fmt: skip
    return y.view(out.shape)
