"""The same bytes as the library's."""

import torch

import minipeft as mp


def test_bytes_and_scale_equal_the_library(mine):
    torch.manual_seed(0)
    for _ in range(20):
        w = torch.randn(64)
        packed, absmax = mp.quantize_nf4(w)
        found, scale = mine.quantize(w.tolist(), mp.NF4_CODEBOOK)
        assert found == bytes(packed.tolist())
        assert scale == absmax.item()
