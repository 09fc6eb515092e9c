"""NF4: properties, then the numpy reference, then bitsandbytes, then the published values."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft import NF4_CODEBOOK, dequantize_nf4, nf4, quantize_nf4, use_kernels
from minipeft.fast import nf4 as fast
from minipeft.ops import Packed
from minipeft.quantized.codebooks import FP4, normal_float_codebook
from tests import reference
from tests.strategies import weights

BLOCK_SIZES = st.sampled_from([32, 64, 128, 4096])
HALF_WIDEST_GAP = max(b - a for a, b in pairwise(NF4_CODEBOOK)) / 2


def nibbles(packed):
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


@given(w=weights(), block_size=BLOCK_SIZES)
def test_the_error_is_at_most_half_the_widest_gap_times_absmax(w, block_size):
    packed, absmax = quantize_nf4(w, block_size=block_size)
    decoded = dequantize_nf4(packed, absmax, w.shape, block_size=block_size)
    bound = HALF_WIDEST_GAP * absmax.repeat_interleave(block_size)[: w.numel()].view(w.shape)
    # 1e-6: the float32 product's and the reciprocal's rounding; 2**-126: a block that became zero
    assert ((decoded - w.float()).abs() <= bound * (1 + 1e-6) + 2.0**-126).all()


@given(w=weights(), block_size=BLOCK_SIZES)
def test_quantising_what_was_decoded_changes_nothing(w, block_size):
    packed, absmax = quantize_nf4(w, block_size=block_size)
    decoded = dequantize_nf4(packed, absmax, w.shape, block_size=block_size)
    again = quantize_nf4(decoded, block_size=block_size)
    zero = (absmax == 0).repeat_interleave(block_size)[: w.numel()]
    nonzero = absmax > 0  # a normal block may decode to values below the normal range, not absmax
    assert torch.equal(again[1][nonzero], absmax[nonzero])
    assert torch.equal(nibbles(again[0])[: w.numel()][~zero], nibbles(packed)[: w.numel()][~zero])


@given(exponent=st.integers(-60, 60), seed=st.integers(0, 1000))
def test_codes_do_not_change_when_a_block_is_scaled_by_a_power_of_two(exponent, seed):
    w = torch.randn(256, generator=torch.Generator().manual_seed(seed))
    packed, absmax = quantize_nf4(w)
    scaled, scaled_absmax = quantize_nf4(w * 2.0**exponent)
    assert torch.equal(packed, scaled)
    assert torch.equal(absmax * 2.0**exponent, scaled_absmax)


@given(w=weights([torch.float16, torch.bfloat16]), block_size=BLOCK_SIZES)
def test_sixteen_bit_weights_encode_as_their_float32_values(w, block_size):
    for ours, theirs in zip(
        quantize_nf4(w, block_size=block_size),
        quantize_nf4(w.float(), block_size=block_size),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("chunk", [32, 64, 4096, 2**30])
def test_chunks_change_no_bit(chunk, monkeypatch):
    w = torch.randn(301, 77)
    expected = quantize_nf4(w)
    decoded = dequantize_nf4(*expected, w.shape, dtype=torch.bfloat16)
    monkeypatch.setattr(fast, "chunk_elements", lambda device: chunk)
    found = quantize_nf4(w)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(dequantize_nf4(*found, w.shape, dtype=torch.bfloat16), decoded)


def test_one_and_two_threads_give_the_same_bytes():
    w, before = torch.randn(1024, 1024), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            packed, absmax = quantize_nf4(w)
            results.append((packed, absmax, dequantize_nf4(packed, absmax, w.shape)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_zero_block_is_nibble_7_and_decodes_to_zero():
    w = torch.cat([torch.zeros(64), torch.randn(64), torch.zeros(5)])
    packed, absmax = quantize_nf4(w)
    assert (nibbles(packed)[:64] == 7).all()
    assert (nibbles(packed)[128:] == 7).all()
    assert absmax[0] == absmax[2] == 0
    decoded = dequantize_nf4(packed, absmax, w.shape)
    assert (decoded[:64] == 0).all()
    assert (decoded[128:] == 0).all()


def test_a_block_below_the_normal_range_is_a_zero_block():
    tiny = torch.finfo(torch.float32).tiny
    w = torch.stack([torch.full((64,), tiny / 2), torch.full((64,), tiny)])
    packed, absmax = quantize_nf4(w)
    assert absmax.tolist() == [0, tiny]
    assert set(nibbles(packed).view(2, 64)[0].tolist()) == {7}
    assert set(nibbles(packed).view(2, 64)[1].tolist()) == {15}


@pytest.mark.parametrize("n", [0, 1, 2, 63, 65, 129])
def test_every_count_is_legal(n):
    w = torch.randn(n)
    packed, absmax = quantize_nf4(w)
    assert packed.shape == ((n + 1) // 2,)
    assert absmax.shape == (math.ceil(n / 64),)
    assert dequantize_nf4(packed, absmax, (n,)).shape == (n,)
    if n % 2:
        assert packed[-1] & 15 == 7


def test_views_are_quantised_as_what_they_show():
    w = torch.randn(96, 130).T[:, ::2]
    for ours, theirs in zip(quantize_nf4(w), quantize_nf4(w.contiguous()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [True, "plain"])
@settings(max_examples=200)
@given(w=weights(), block_size=BLOCK_SIZES)
def test_equals_the_reference_in_every_bit(rows, w, block_size):
    with use_kernels(rows):
        packed, absmax = quantize_nf4(w, block_size=block_size)
        codes, scales = reference.quantize_nf4(w.float().numpy(), block_size)
        np.testing.assert_array_equal(packed.numpy(), codes)
        np.testing.assert_array_equal(absmax.numpy(), scales)
        values = reference.dequantize_nf4(codes, scales, w.numel(), block_size).reshape(w.shape)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            decoded = dequantize_nf4(packed, absmax, w.shape, block_size=block_size, dtype=dtype)
            assert torch.equal(decoded, torch.from_numpy(values).to(dtype))


@settings(max_examples=200)
@given(w=weights(), block_size=BLOCK_SIZES, own_codebook=st.booleans(), strided=st.booleans())
def test_the_plain_functions_equal_the_fast_ones_in_every_bit(w, block_size, own_codebook, strided):
    if strided and w.dim() > 1:
        w = w.transpose(0, 1)[:, ::2]
    packed, absmax = nf4.encode(w, block_size)
    for plain, quick in zip((packed, absmax), fast.quantize(w, block_size), strict=True):
        assert torch.equal(plain, quick)
    codebook = torch.tensor(FP4) if own_codebook else None
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        weight = Packed(packed, absmax, block_size, codebook=codebook)
        plain = nf4.decode(weight, list(w.shape), dtype)
        quick = fast.dequantize(weight, list(w.shape), dtype)
        # as bytes: minus zero is not zero
        assert torch.equal(plain.view(torch.uint8), quick.view(torch.uint8))


def encode_scaled(x):
    """Codes of values in [-1, 1], each in a block whose absmax is 1."""
    blocks = torch.ones(len(x), 32)
    blocks[:, 0] = x
    packed, _ = quantize_nf4(blocks, block_size=32)
    return nibbles(packed).view(len(x), 32)[:, 0]


def neighbours(x, steps):
    found = [x]
    up = down = x
    for _ in range(steps):
        up = torch.nextafter(up, torch.tensor(2.0))
        down = torch.nextafter(down, torch.tensor(-2.0))
        found += [up, down]
    return torch.cat(found).clamp(-1, 1)


def test_the_encoding_table_is_exact_at_midpoints_bin_edges_and_in_between():
    book = torch.tensor(NF4_CODEBOOK)
    midpoints = (book[1:] + book[:-1]) / 2
    edges = torch.arange(4097) / 2048 - 1
    x = torch.cat([
        neighbours(midpoints, 4), neighbours(edges, 3), neighbours(book, 2),
        torch.rand(2**18) * 2 - 1,
    ])  # fmt: skip
    # bucketize with right=False puts a value that equals a boundary below it: strictly above
    assert torch.equal(encode_scaled(x).long(), torch.bucketize(x, midpoints))


def test_midpoints_go_down_and_the_next_float_goes_up():
    book = torch.tensor(NF4_CODEBOOK)
    midpoints = (book[1:] + book[:-1]) / 2
    assert encode_scaled(midpoints).tolist() == list(range(15))
    assert encode_scaled(torch.nextafter(midpoints, torch.tensor(2.0))).tolist() == list(
        range(1, 16)
    )


@pytest.mark.parametrize("rows", [True, "plain"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [(0, 0, 0), (1, 2, 40), (2, 4, 64)])
def test_the_first_value_that_is_not_finite_is_named(bad, index, rows):
    w = torch.randn(3, 5, 65)
    w[index] = bad
    w[2, 4, 64] = math.nan if index == (2, 4, 64) else w[2, 4, 64]
    place = rf"index \({index[0]}, {index[1]}, {index[2]}\)"
    with use_kernels(rows), pytest.raises(ValueError, match=place):
        quantize_nf4(w)


@pytest.mark.parametrize("block_size", [0, 1, 16, 48, 8192, -64])
def test_other_block_sizes_raise(block_size):
    with pytest.raises(ValueError, match="block_size"):
        quantize_nf4(torch.randn(64), block_size=block_size)
    with pytest.raises(ValueError, match="block_size"):
        dequantize_nf4(*quantize_nf4(torch.randn(64)), (64,), block_size=block_size)


def test_bad_input_raises(plain_python):
    """Without the annotations' own checks, which would come first."""
    print(
        plain_python("""
import pytest, torch
from minipeft import quantize_nf4, dequantize_nf4
from minipeft.quantized.codebooks import normal_float_codebook
for w in (torch.arange(64), torch.zeros(64, dtype=torch.uint8), torch.randn(64).double()):
    with pytest.raises(ValueError, match="dtype"):
        quantize_nf4(w)
with pytest.raises(TypeError, match="list"):
    quantize_nf4([1.0, 2.0])
packed, absmax = quantize_nf4(torch.randn(100))
for args in ((packed[:-1], absmax, (100,)), (packed, absmax[:-1], (100,)),
             (packed, absmax, (99, 2)),
             (packed.int(), absmax, (100,)), (packed, absmax.half(), (100,))):
    with pytest.raises(ValueError, match="dequantize_nf4"):
        dequantize_nf4(*args)
with pytest.raises(ValueError, match="dtype"):
    dequantize_nf4(packed, absmax, (100,), dtype=torch.int32)
for bits in (1, 9):
    with pytest.raises(ValueError, match="bits"):
        normal_float_codebook(bits)
""")
    )


def test_extra_memory_is_below_64_mib(plain_python):
    """Resident memory at its highest, above what holds the weight and the result."""
    printed = plain_python(
        """
import torch
from pathlib import Path
from minipeft import quantize_nf4

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) / 1024

w = torch.randn(2**25).bfloat16()  # 64 MiB
quantize_nf4(w[:2**20])  # code and tables are loaded
result_mib = w.numel() * (0.5 + 4 / 64) / 2**20
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
quantize_nf4(w)
print("extra MiB:", status("VmHWM") - before - result_mib)
""",
        MINIPEFT_KERNELS="1",
    )
    print(printed)
    assert float(printed.split(":")[1]) < 64


def test_random_cases_have_no_unexplained_difference():
    from benchmarks.nf4_sweep import sweep

    ours, theirs = sweep(150)
    assert ours["elements"] > 100_000
    assert ours["codes"] == ours["absmax"] == ours["decoded"] == 0
    assert theirs["unexplained"] == 0


@pytest.mark.slow
def test_two_thousand_random_cases(capsys):
    from benchmarks.nf4_sweep import sweep

    ours, theirs = sweep(2000)
    with capsys.disabled():
        print("\nreference:", dict(ours), "\nbitsandbytes:", dict(theirs))
    assert ours["codes"] == ours["absmax"] == ours["decoded"] == 0
    assert theirs["unexplained"] == 0


def test_equals_bitsandbytes_on_whole_blocks():
    peer = pytest.importorskip("bitsandbytes.functional")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        w = torch.randn(128, 256).to(dtype)
        theirs, state = peer.quantize_4bit(w, quant_type="nf4", blocksize=64)
        packed, absmax = quantize_nf4(w)
        assert torch.equal(packed, theirs.flatten())
        assert torch.equal(absmax, state.absmax)
        decoded = dequantize_nf4(packed, absmax, w.shape, dtype=dtype)
        assert torch.equal(decoded, peer.dequantize_4bit(theirs, state))


def test_the_codebook_is_the_published_one():
    assert tuple(reference.NF4.tolist()) == NF4_CODEBOOK


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_other_widths_are_ascending_from_minus_one_to_one_and_hold_zero(bits):
    values = normal_float_codebook(bits)
    assert len(set(values)) == len(values) == 2**bits
    assert list(values) == sorted(values)
    assert (values[0], values[-1]) == (-1.0, 1.0)
    assert 0.0 in values


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_default_dtype_does_not_change_nf4(plain_python, dtype):
    script = f"""
import torch
torch.set_default_dtype(torch.{dtype})
import minipeft
w = torch.randn(64, 256, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
packed, absmax = minipeft.quantize_nf4(w)
decoded = minipeft.dequantize_nf4(packed, absmax, w.shape)
code, scale, offset = minipeft.quantize_absmax(absmax)
print(minipeft.NF4_CODEBOOK, packed.sum().item(), decoded.double().sum().item(),
      code.sum().item(), scale.sum().item(), offset.item())
"""
    assert plain_python(script) == plain_python(script.replace(dtype, "float32"))
