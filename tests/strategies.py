"""Weights as hypothesis draws them: odd shapes, three dtypes, zeros, ties, tiny blocks."""

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = st.one_of(
    st.tuples(st.integers(0, 300)),
    st.tuples(st.integers(1, 7), st.sampled_from([1, 7, 63, 64, 65, 100, 128, 192])),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 33)),
)


@st.composite
def weights(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Tensor:
    """A tensor with normal values, some of them zero, tiny, or at a midpoint of NF4."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["normal", "zeros", "ties", "tiny", "mixed"]))
    if kind == "zeros":
        w = w * (torch.rand(shape, generator=generator) < 0.1)
    elif kind == "ties":
        from minipeft import NF4_CODEBOOK

        book = torch.tensor(NF4_CODEBOOK)
        grid = torch.cat([book, (book[1:] + book[:-1]) / 2])
        w = grid[torch.randint(len(grid), shape, generator=generator)]
    elif kind == "tiny":
        w = w * 2.0 ** draw(st.integers(-149, -120))
    elif kind == "mixed":
        w = w * 2.0 ** torch.randint(-30, 15, shape, generator=generator)
    return w.to(dtype)
