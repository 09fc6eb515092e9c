"""Against attention over joined keys, in float64."""

import torch

import minipeft as mp


def test_a_blend_equals_attention_over_joined_keys(mine):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    prefix_k, prefix_v = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    found = mine.blended(q, k, v, prefix_k, prefix_v)
    with mp.use_kernels("plain"):  # joined keys
        wanted = mp.prefix_attention(
            q[None], k[None], v[None], prefix_k, prefix_v, is_causal=False
        )[0]
    torch.testing.assert_close(found, wanted)


def test_large_scores_do_not_overflow(mine):
    torch.manual_seed(0)
    q, k, v = 60 * torch.randn(3, 2, 5, 8)
    prefix_k, prefix_v = 60 * torch.randn(2, 2, 3, 8)
    assert mine.blended(q, k, v, prefix_k, prefix_v).isfinite().all()
