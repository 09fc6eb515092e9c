"""Random NF4 cases against numpy and bitsandbytes: `python -m benchmarks.nf4_sweep`.

Every bit is compared.  Against the reference nothing may differ.  Against bitsandbytes (its CPU
code) each difference is put down to a cause that can be checked on the case itself:

    tail division     its quantiser divides by absmax in the last, partial block
    tiny scale        it clamps absmax at 1e-38; here a block below the normal range is zero
    misaligned rows   its AVX-512 decoder takes the scale of the wrong block if rows of a multiple
                      of 16 are no multiple of the block (and blocks are below 2,048)
    subnormal bf16    its conversion to bfloat16 (VCVTNEPS2BF16) makes values below 2**-126 zero
"""

import argparse
import random
import sys
from collections import Counter
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from benchmarks.output import add_output, keep
from minipeft import dequantize_nf4, quantize_nf4
from tests import reference

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case(seed: int) -> tuple[Tensor, int]:
    """One random weight and block size: ragged shapes, zeros, tiny blocks, ties."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = rng.choice([
        (rng.randint(0, 5000),),
        (rng.randint(1, 60), rng.randint(1, 200)),
        (rng.randint(1, 40), rng.choice([48, 64, 80, 128, 192, 256, 448, 1008])),
        (rng.randint(1, 4), rng.randint(1, 20), rng.randint(1, 70)),
    ])  # fmt: skip
    w = torch.randn(shape, generator=generator)
    kind = rng.choice(["normal", "normal", "zeros", "ties", "tiny"])
    if kind == "zeros":
        w = w * (torch.rand(shape, generator=generator) < 0.02)
    elif kind == "ties":
        book = torch.tensor(reference.NF4)
        grid = torch.cat([book, (book[1:] + book[:-1]) / 2])
        w = grid[torch.randint(len(grid), shape, generator=generator)]
    elif kind == "tiny":
        w = w * 2.0 ** rng.randint(-149, -120)
    return w.to(rng.choice(DTYPES)), rng.choice(BLOCK_SIZES)


def same(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise equality; -0.0 equals 0.0."""
    return a.flatten() == b.flatten()


def against_reference(w: Tensor, block_size: int) -> Counter[str]:
    """Numbers of differing codes, scales and decoded values (decoded to w's dtype)."""
    packed, absmax = quantize_nf4(w, block_size=block_size)
    decoded = dequantize_nf4(packed, absmax, w.shape, block_size=block_size, dtype=w.dtype)
    codes, scales = reference.quantize_nf4(w.float().numpy(), block_size)
    values = reference.dequantize_nf4(codes, scales, w.numel(), block_size)
    return Counter({
        "elements": w.numel(),
        "codes": int((packed.numpy() != codes).sum()),
        "absmax": int((absmax.numpy().view(np.uint32) != scales.view(np.uint32)).sum()),
        "decoded": int((~same(decoded, torch.from_numpy(values).to(w.dtype))).sum()),
    })  # fmt: skip


def against_bitsandbytes(w: Tensor, block_size: int) -> Counter[str]:
    """Differing elements by cause; 'unexplained' is what has none."""
    import bitsandbytes.functional as peer

    counts: Counter[str] = Counter()
    n = w.numel()
    if n == 0:
        return counts
    packed, absmax = quantize_nf4(w, block_size=block_size)
    theirs, state = peer.quantize_4bit(w, quant_type="nf4", blocksize=block_size)
    block = torch.arange(n) // block_size
    tail = (block == n // block_size) & (n % block_size != 0)
    true_absmax = torch.zeros(len(absmax)).scatter_reduce(
        0, block, w.float().abs().flatten(), "amax"
    )
    tiny = (true_absmax < 1.2e-38)[block]  # zero here below 2**-126, clamped there at 1e-38

    def nibbles(p: Tensor) -> Tensor:
        return torch.stack([p >> 4, p & 15], dim=1).flatten()[:n]

    codes = nibbles(packed) != nibbles(theirs.flatten())
    scale = (absmax != state.absmax.flatten())[block]
    counts["codes: tiny scale"] = int((codes & tiny).sum())
    counts["codes: tail division"] = int((codes & tail & ~tiny).sum())
    counts["absmax: tiny scale"] = int((scale & tiny).sum())
    counts["unexplained"] = int((codes & ~tiny & ~tail).sum()) + int((scale & ~tiny).sum())
    decoded = dequantize_nf4(theirs.flatten(), state.absmax.flatten(), (n,), block_size=block_size)
    their_values = peer.dequantize_4bit(theirs, state).flatten()
    wrong = ~same(decoded.to(w.dtype), their_values)
    columns = w.shape[-1]
    if columns % 16 == 0 and columns % block_size != 0 and block_size < 2048:
        counts["decoded: misaligned rows"] = int(wrong.sum())
    else:
        flushed = (decoded.abs() < 2.0**-126) & (their_values == 0) & (w.dtype == torch.bfloat16)
        counts["decoded: subnormal bf16"] = int((wrong & flushed).sum())
        counts["unexplained"] += int((wrong & ~flushed).sum())
    return counts


def sweep(cases: int) -> tuple[Counter[str], Counter[str]]:
    """Totals over the first `cases` seeds; the second is empty without bitsandbytes."""
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    peers = find_spec("bitsandbytes") is not None
    for seed in range(cases):
        w, block_size = case(seed)
        ours.update(against_reference(w, block_size))
        if peers:
            theirs.update(against_bitsandbytes(w, block_size))
    return ours, theirs


def main() -> int:
    """Print the totals and write them; exit status 1 if a difference has no cause."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    add_output(parser)
    arguments = parser.parse_args()
    ours, theirs = sweep(arguments.cases)
    weights = ours.pop("elements")
    print(f"{arguments.cases} cases, {weights:,} weights")
    print("differences from the numpy reference:", dict(ours))
    print("differences from bitsandbytes:", dict(theirs) or "not installed (minipeft[peers])")
    keep(arguments, "nf4_sweep", cases=arguments.cases, weights=weights, reference=dict(ours),
         bitsandbytes=dict(theirs) if theirs else None)  # fmt: skip
    return int(any(ours.values()) or theirs["unexplained"] > 0)


if __name__ == "__main__":
    sys.exit(main())
