"""Reading a 4-bit weight in Triton: from bytes to values, from scale codes to scales.

Four bytes are one 32-bit register: eight codes.  On NVIDIA a code is looked up by byte permutation,
`prmt`, which picks four bytes out of eight by four selectors of three bits.  Three of them read a
table of sixteen bytes: one for the codes 0 to 7, one for 8 to 15, and one that picks by the fourth
bit.  A 16-bit value takes two tables, a float32 value four:

    four codes & 7        -> prmt(bytes of codes 0-7), prmt(bytes of codes 8-15)
    their fourth bits     -> prmt(the one, the other): one byte of each of four values
    again for each byte of a value, and the bytes of a value are put beside each other

Sixteen permutations and five other instructions for eight weights of 16 bits; no memory is read.
The tables are constants in the text.  The compiler moves half of them into registers again and
again, on the multiplier's pipe, which is idle here; as values loaded by the program they took more
registers and a trip through shared memory.

Elsewhere (AMD, Triton's interpreter, a codebook that is not NF4's and so known to the device only)
values are read from a table of 16 floats, which one cache line holds.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipeft.double_quant import dynamic_codebook
from minipeft.nf4 import NF4_CODEBOOK


@functools.cache
def float_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """NF4's sixteen values, and the 256 of the scale codes."""
    values = torch.tensor(NF4_CODEBOOK, dtype=torch.float32, device=device)
    return values, torch.tensor(dynamic_codebook(), dtype=torch.float32, device=device)


def _planes(values: Sequence[float], dtype: torch.dtype) -> list[list[str]]:
    """The values' bytes by place, the lowest first; each as four words of four values' bytes."""
    rounded = torch.tensor(values, dtype=dtype)
    places = rounded.element_size()
    raw = rounded.view(torch.uint8).view(16, places).tolist()
    return [
        [f"0x{bytes(raw[4 * word + i][place] for i in (3, 2, 1, 0)).hex()}" for word in range(4)]
        for place in range(places)
    ]


def lookup(values: Sequence[float], dtype: torch.dtype) -> str:
    """PTX that makes eight values of four bytes; operands: the results, then the bytes.

    Results belong to bytes: four registers with the pair of 16-bit values of a byte, the first in
    the low half; or eight, the first values of the four bytes in float32, then the second ones.
    """
    planes = _planes(values, dtype)
    codes = 4 if len(planes) == 2 else 8
    lines = [
        ".reg .b32 sel<2>, half<2>, low, high, plane<4>, pair<2>;",
        f"and.b32 sel0, ${codes}, 0x77777777;",
        f"shr.u32 half0, ${codes}, 1;",
        "lop3.b32 half0, half0, 0x44444444, 0x32103210, 0xea;",  # (half & 0x4...) | 0x3210...
        "shr.u32 sel1, sel0, 16;",
        "shr.u32 half1, half0, 16;",
    ]
    for side in range(2):  # four weights each
        for place, words in enumerate(planes):
            lines += [
                f"prmt.b32 low, {words[0]}, {words[1]}, sel{side};",
                f"prmt.b32 high, {words[2]}, {words[3]}, sel{side};",
                f"prmt.b32 plane{place}, low, high, half{side};",
            ]
        # a byte's first weight is its high nibble, so the second selector of a pair comes first
        for pair, order in enumerate(("0x4051", "0x6273")):
            if len(planes) == 2:
                lines.append(f"prmt.b32 ${2 * side + pair}, plane0, plane1, {order};")
                continue
            out = 2 * side + pair
            lines += [
                f"prmt.b32 pair0, plane0, plane1, {order};",
                f"prmt.b32 pair1, plane2, plane3, {order};",
                f"prmt.b32 ${out}, pair0, pair1, 0x5410;",
                f"prmt.b32 ${out + 4}, pair0, pair1, 0x7632;",
            ]
    return "{\n" + "\n".join(lines) + "\n}"


BFLOAT16 = tl.constexpr(lookup(NF4_CODEBOOK, torch.bfloat16))
FLOAT16 = tl.constexpr(lookup(NF4_CODEBOOK, torch.float16))
FLOAT32 = tl.constexpr(lookup(NF4_CODEBOOK, torch.float32))
FOUR_REGISTERS = tl.constexpr("=r,=r,=r,=r,r")
EIGHT_REGISTERS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r")


@triton.jit
def values(codes, codebook, dtype: tl.constexpr, PERMUTE: tl.constexpr):
    """Codebook values of bytes (ROWS, WIDTH) in `dtype`, (ROWS, 2 * WIDTH): high nibbles first.

    PERMUTE: NF4's values, by byte permutation; four neighbouring bytes are then one thread's.
    """
    ROWS: tl.constexpr = codes.shape[0]
    WIDTH: tl.constexpr = codes.shape[1]
    if not PERMUTE:
        high = tl.load(codebook + (codes >> 4)).to(dtype)
        low = tl.load(codebook + (codes & 15)).to(dtype)
    elif dtype == tl.float32:
        high, low = tl.inline_asm_elementwise(
            FLOAT32, EIGHT_REGISTERS, [codes], (tl.float32, tl.float32), is_pure=True, pack=4
        )
    else:
        pairs = tl.inline_asm_elementwise(
            BFLOAT16 if dtype == tl.bfloat16 else FLOAT16, FOUR_REGISTERS, [codes], tl.int32,
            is_pure=True, pack=4,
        )  # fmt: skip
        high = pairs.to(tl.int16).to(dtype, bitcast=True)
        low = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(high, low).reshape(ROWS, 2 * WIDTH)


@triton.jit
def decoded_scales(
    code, block, scale, offset, dynamic, NESTED: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """float32 scales of the blocks with these numbers, of what `absmax` holds for them."""
    if NESTED:
        scales = tl.load(dynamic + code) * tl.load(scale + block // GROUP) + tl.load(offset)
    else:
        scales = code
    return scales
