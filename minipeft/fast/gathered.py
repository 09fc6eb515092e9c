"""Rows of a 4-bit table and experts of a 3-D weight: only what is asked for is decoded."""

import torch
from torch import Tensor

from minipeft.adapters import products
from minipeft.double_quant import ABSMAX_BLOCK_SIZE, dynamic_tables
from minipeft.fast.nf4 import chunk_elements, decode_into, pairs_of
from minipeft.ops import Packed
from minipeft.qlora import decode

ROW = "NF4Embedding: row {} of a table of {} rows"
EXPERT = "NF4Experts: expert {} of {}"


def check_numbers(message: str, numbers: Tensor, count: int) -> None:
    """Raise IndexError, with a wrong number and the count, unless all are in 0..count-1."""
    if numbers.numel():
        low, high = map(int, numbers.aminmax())
        if low < 0 or high >= count:
            raise IndexError(message.format(low if low < 0 else high, count))


def absmax_of_blocks(weight: Packed, blocks: Tensor) -> Tensor:
    """float32 scales of the blocks with these numbers, in their shape; the others stay codes."""
    wanted = blocks.reshape(-1)
    chosen = weight.absmax.reshape(-1).index_select(0, wanted)
    if weight.scale is not None and weight.offset is not None:
        values, _ = dynamic_tables(chosen.device)
        chosen = values.index_select(0, chosen.int())
        chosen.mul_(weight.scale.index_select(0, wanted // ABSMAX_BLOCK_SIZE)).add_(weight.offset)
    return chosen.view(blocks.shape)


def _decode_at(weight: Packed, index: Tensor) -> Tensor:
    """The float32 weights with these flat numbers."""
    byte = weight.packed.reshape(-1).index_select(0, (index // 2).reshape(-1)).int()
    pairs = pairs_of(weight).index_select(0, byte).view(torch.float32).view(-1, 2)
    values = pairs.gather(1, (index % 2).view(-1, 1)).view(index.shape)
    return values * absmax_of_blocks(weight, index // weight.block_size)


def embedding(
    rows: Tensor, weight: Packed, table_rows: int, dim: int, dtype: torch.dtype
) -> Tensor:
    """The operator nf4_embedding."""
    wanted = rows.reshape(-1).long()
    if wanted.device.type == "cpu":  # elsewhere it would wait for the device
        check_numbers(ROW, wanted, table_rows)
    out = torch.empty(wanted.numel(), dim, dtype=dtype, device=weight.packed.device)
    if dim % weight.block_size == 0:  # rows of whole blocks
        per_row = dim // weight.block_size
        blocks = wanted[:, None] * per_row + torch.arange(per_row, device=wanted.device)
        codes = weight.packed.view(table_rows, -1).index_select(0, wanted)
        scales = absmax_of_blocks(weight, blocks)
        decode_into(out, Packed(codes, scales, weight.block_size, codebook=weight.codebook))
    elif dim:
        step = max(1, chunk_elements(out.device) // dim)
        for first in range(0, wanted.numel(), step):
            part = wanted[first : first + step, None]
            out[first : first + step] = _decode_at(
                weight, part * dim + torch.arange(dim, device=wanted.device)
            )
    return out.view(*rows.shape, dim)


def one_expert(weight: Packed, number: int, n_experts: int) -> Packed:
    """Codes and float32 scales of one expert."""
    count = weight.absmax.numel() // n_experts
    blocks = torch.arange(number * count, (number + 1) * count, device=weight.absmax.device)
    codes, scales = weight.packed.view(n_experts, -1)[number], absmax_of_blocks(weight, blocks)
    return Packed(codes, scales, weight.block_size, codebook=weight.codebook)


def experts(
    x: Tensor, expert: Tensor, weight: Packed, shape: list[int], transposed: bool
) -> Tensor:
    """The operator nf4_experts."""
    n_experts, *matrix = shape
    order = expert.argsort(stable=True)  # rows of one expert together: one product for each
    found, counts = torch.unique_consecutive(expert[order], return_counts=True)
    inputs, places = (torch.split(t, counts.tolist()) for t in (x[order], order))
    out = x.new_empty(x.shape[0], matrix[1] if transposed else matrix[0])
    for number, part, rows in zip(found.tolist(), inputs, places, strict=True):
        if not 0 <= number < n_experts:
            raise IndexError(EXPERT.format(number, n_experts))
        dense = decode(one_expert(weight, number, n_experts), matrix, x.dtype)
        out[rows] = products.linear(part, dense.T if transposed else dense)
    return out
