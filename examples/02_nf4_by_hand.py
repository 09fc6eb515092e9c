"""NF4 by hand: one block of 64 weights before and after, and what a weight costs."""

import torch

import minipeft as mp

torch.manual_seed(0)

w = torch.randn(64)  # one block
absmax = w.abs().max()
codebook = torch.tensor(mp.NF4_CODEBOOK)
nearest = (w[:, None] / absmax - codebook).abs().argmin(dim=1)  # the definition, by brute force

packed, scales = mp.quantize_nf4(w)
decoded = mp.dequantize_nf4(packed, scales, w.shape)
codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()  # the high nibble comes first
print("weights:", " ".join(f"{value:6.3f}" for value in w[:6]))
print("codes:  ", " ".join(f"{code:6d}" for code in codes[:6]))
print("decoded:", " ".join(f"{value:6.3f}" for value in decoded[:6]))

big = torch.randn(1024, 1024)
packed, scales = mp.quantize_nf4(big)
code, scale, offset = mp.quantize_absmax(scales)
plain_bits = 8 * (packed.nbytes + scales.nbytes) / big.numel()
double_bits = 8 * sum(t.nbytes for t in (packed, code, scale, offset)) / big.numel()
print(f"bits per weight: {plain_bits:.3f}, with double quantisation {double_bits:.3f}")

twice = mp.dequantize_absmax(code, scale, offset)
errors = [
    (mp.dequantize_nf4(packed, a, big.shape) - big).abs().mean().item() for a in (scales, twice)
]
print(f"mean error: {errors[0]:.5f}, with double quantisation {errors[1]:.5f}")

assert torch.equal(codes.long(), nearest) and torch.equal(decoded, codebook[nearest] * absmax)
assert double_bits < 4.13 and errors[1] < 1.01 * errors[0]
