"""Other data types: against a loop over float32 numbers, the published tables, bitsandbytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minipeft as mp
from minipeft import NF4_CODEBOOK
from minipeft.quantized.codebooks import (
    FP4,
    FP4_E3M0,
    dequantize_blockwise,
    int_codebook,
    normal_float_codebook,
    quantize_blockwise,
)

CODEBOOKS = {
    "NF4": NF4_CODEBOOK, "FP4": FP4, "E3M0": FP4_E3M0, "Int4": int_codebook(4),
    "NF2": normal_float_codebook(2), "NF3": normal_float_codebook(3),
    "NF8": normal_float_codebook(8), "Int8": int_codebook(8),
    "two": (1.0, -0.5), "one-sided": (0.0, 1.0),
}  # fmt: skip


def slow_codes(w: np.ndarray, codebook: tuple[float, ...], block_size: int) -> list[int]:
    """Nearest value by comparing each weight with every float32 midpoint of neighbours."""
    values = np.array(codebook, dtype=np.float32)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    codes = []
    for start in range(0, len(w), block_size):
        block = w[start : start + block_size]
        absmax = np.abs(block).max()
        tiny = absmax < np.finfo(np.float32).tiny
        scale = np.float32(0) if tiny else np.float32(1) / absmax
        for x in block * scale:
            place = 0
            while place + 1 < len(order):
                middle = (values[order[place]] + values[order[place + 1]]) / np.float32(2)
                if not x > middle:
                    break
                place += 1
            codes.append(order[place])
    return codes


def unpacked(codes: torch.Tensor, n: int, codebook: tuple[float, ...]) -> list[int]:
    if len(codebook) <= 16:
        codes = torch.stack([codes >> 4, codes & 15], dim=1).flatten()
    return codes[:n].tolist()


@pytest.mark.parametrize("name", CODEBOOKS)
@given(n=st.integers(0, 200), block_size=st.sampled_from([32, 64]), ties=st.booleans())
def test_codes_equal_a_loop(name, n, block_size, ties):
    codebook = CODEBOOKS[name]
    if ties:
        grid = torch.tensor(codebook)
        grid = torch.cat([grid, (grid[:, None] + grid).flatten() / 2])
        w = grid[torch.randint(len(grid), (n,))]
    else:
        w = torch.randn(n) * (torch.rand(n) < 0.9)
    codes, absmax = quantize_blockwise(w, codebook, block_size=block_size)
    assert unpacked(codes, n, codebook) == slow_codes(w.numpy(), codebook, block_size)
    decoded = dequantize_blockwise(codes, absmax, (n,), codebook, block_size=block_size)
    table, own = torch.tensor(codebook), torch.tensor(unpacked(codes, n, codebook), dtype=torch.int)
    scales = absmax.repeat_interleave(block_size)[:n]
    assert torch.equal(decoded, table[own] * scales)


@pytest.mark.parametrize("shape", [(101,), (33, 77), (5, 64), (0,), (3, 5, 70)])
def test_nf4_is_the_same_by_either_path(shape):
    w = torch.randn(shape)
    packed, absmax = mp.quantize_nf4(w)
    codes, scales = quantize_blockwise(w, NF4_CODEBOOK)
    assert torch.equal(codes, packed) and torch.equal(scales, absmax)
    decoded = dequantize_blockwise(codes, scales, shape, NF4_CODEBOOK, dtype=torch.bfloat16)
    assert torch.equal(decoded, mp.dequantize_nf4(packed, absmax, shape, dtype=torch.bfloat16))


def test_fp4_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(64, 64)
    theirs, state = functional.quantize_4bit(w, quant_type="fp4", blocksize=64)
    codes, absmax = quantize_blockwise(w, FP4)
    assert torch.equal(codes, theirs.flatten())
    decoded = dequantize_blockwise(codes, absmax, w.shape, FP4)
    assert torch.equal(decoded, functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize(
    ("name", "block_size", "published", "deviation"),
    [
        ("NF4", 32, 0.067746, 0.000069), ("NF4", 64, 0.072798, 0.000074),
        ("NF4", 128, 0.076831, 0.000091), ("NF4", 4096, 0.092547, 0.000360),
        ("FP4", 32, 0.088925, 0.000111), ("FP4", 64, 0.096543, 0.000111),
        ("FP4", 128, 0.102969, 0.000111), ("FP4", 4096, 0.129536, 0.000612),
    ],
)  # fmt: skip
def test_mean_error_on_gaussian_weights(name, block_size, published, deviation, capsys):
    """bitsandbytes' published means and deviations; its own limit is seven deviations."""
    w = torch.randn(1024, 1024)
    codebook = CODEBOOKS[name]
    codes, absmax = quantize_blockwise(w, codebook, block_size=block_size)
    decoded = dequantize_blockwise(codes, absmax, w.shape, codebook, block_size=block_size)
    error = float((decoded - w).abs().mean())
    with capsys.disabled():
        print(
            f"\n{name}, blocks of {block_size}: mean error {error:.6f}, published {published:.6f}"
        )
    assert abs(error - published) <= 7 * deviation


def test_int4_is_fifteen_levels():
    assert int_codebook(4) == tuple((torch.arange(-7, 8) / 7).tolist())
    assert len(int_codebook(8)) == 255 and len(normal_float_codebook(3)) == 8


@pytest.mark.parametrize(
    ("codebook", "message"),
    [
        ((1.0,), "1 values"), (tuple([1.0] * 257), "257 values"), ((-2.0, 1.0), "-2.0"),
        ((-0.5, 0.5), "magnitude 1"), ((float("nan"), 1.0), "expected values in"),
    ],
)  # fmt: skip
def test_codebooks_that_are_none(codebook, message):
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(torch.randn(4), codebook)


def test_bad_states():
    codes, absmax = quantize_blockwise(torch.randn(64), int_codebook(4))
    with pytest.raises(ValueError, match="takes 33 bytes and 2 scales"):
        dequantize_blockwise(codes, absmax, (65,), int_codebook(4))
    codes[3] = 0xF0
    with pytest.raises(ValueError, match="code 15 in a codebook of 15"):
        dequantize_blockwise(codes, absmax, (64,), int_codebook(4))
    with pytest.raises(ValueError, match="bits=9"):
        int_codebook(9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_weight_that_is_not_finite_is_named(bad):
    w = torch.randn(7, 5, 30).transpose(0, 2)
    w[11, 4, 3] = bad
    w[20, 0, 0] = bad
    with pytest.raises(ValueError, match=r"index \(11, 4, 3\) of a tensor of shape \(30, 5, 7\)"):
        quantize_blockwise(w, int_codebook(4))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4), data=st.data(),
    step=st.integers(1, 2),
)  # fmt: skip
def test_views_that_are_not_contiguous(sizes, data, step):
    order = data.draw(st.permutations(range(len(sizes))))
    w = torch.randn(sizes).permute(order)[::step]
    for got, wanted in zip(mp.quantize_nf4(w), mp.quantize_nf4(w.contiguous()), strict=True):
        assert torch.equal(got, wanted)
