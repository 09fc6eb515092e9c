"""The byte permutation of codes.py, computed as a GPU would, on all bytes: run by test_triton.py.

Straight-line PTX of four instructions: prmt (in its default mode), and, shr, lop3.
"""

import random
import re

import numpy as np
import pytest
import torch

from minipeft.nf4 import NF4_CODEBOOK
from minipeft_kernels.triton.codes import lookup

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def permute(a: int, b: int, selectors: int) -> int:
    """prmt: each of four selectors picks a byte of b:a; its highest bit would repeat the sign."""
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picked = []
    for place in range(4):
        selector = selectors >> (4 * place) & 15
        byte = source[selector & 7]
        picked.append((0xFF if byte & 128 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Any function of three bits, by its table, on each bit."""
    out = 0
    for bit in range(32):
        row = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        out |= (table >> row & 1) << bit
    return out


def run(text: str, word: int) -> list[int]:
    """The result registers, with the last operand holding `word`."""
    count = max(int(number) for number in re.findall(r"\$(\d+)", text))
    registers = {f"${count}": word}
    functions = {
        "prmt.b32": permute, "lop3.b32": lop3,
        "and.b32": lambda a, b: a & b, "shr.u32": lambda a, b: a >> b,
    }  # fmt: skip
    for line in text.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        name, target, *sources = re.findall(r"[\w.$]+", line)
        values = [int(s, 0) if s[0].isdigit() else registers[s] for s in sources]
        registers[target] = functions[name](*values)
    return [registers[f"${i}"] for i in range(count)]


def decoded(text: str, word: int, dtype: torch.dtype) -> list[float]:
    """The eight values in the order of the weights."""
    registers = torch.from_numpy(np.array(run(text, word), dtype=np.uint32).view(np.int32))
    values = registers.view(dtype).tolist()
    if dtype != torch.float32:
        return values
    return [value for pair in zip(values[:4], values[4:], strict=True) for value in pair]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codebook", [NF4_CODEBOOK, tuple(torch.randn(16).tolist())], ids=len)
def test_every_byte_in_every_place(dtype, codebook):
    text, rng = lookup(codebook, dtype), random.Random(0)
    table = torch.tensor(codebook).to(dtype).float().tolist()
    words = [byte << (8 * place) for byte in range(256) for place in range(4)]
    words += [rng.getrandbits(32) for _ in range(1000)]
    for word in words:
        codes = [n for byte in word.to_bytes(4, "little") for n in (byte >> 4, byte & 15)]
        assert decoded(text, word, dtype) == [table[code] for code in codes]


def test_the_number_of_instructions():
    counts = {d: lookup(NF4_CODEBOOK, d).count(";") - 1 for d in DTYPES}
    assert counts == {torch.bfloat16: 21, torch.float16: 21, torch.float32: 45}  # for 8 weights
