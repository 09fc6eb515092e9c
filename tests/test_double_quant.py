"""Scales of scales: properties, the numpy reference, bitsandbytes' map."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft import NF4Linear, dequantize_absmax, quantize_absmax
from minipeft.double_quant import dynamic_codebook, ordered_mean
from tests import reference

MAP = np.array(dynamic_codebook(), dtype=np.float32)


@st.composite
def scales(draw):
    """Block scales as weights have them, some groups constant, zero, or with an outlier."""
    n = draw(st.sampled_from([1, 2, 255, 256, 257, 700]))
    absmax = np.random.default_rng(draw(st.integers(0, 10**6))).gamma(20, 0.004, n)
    kind = draw(st.sampled_from(["normal", "constant", "zeros", "outlier"]))
    if kind == "constant":
        absmax[:] = 0.07
    elif kind == "zeros":
        absmax[: n // 2] = 0
    elif kind == "outlier":
        absmax[0] = 5.0
    return torch.from_numpy(absmax.astype(np.float32))


@given(absmax=scales(), block_size=st.sampled_from([1, 7, 256]))
def test_equals_the_reference(absmax, block_size):
    code, scale, offset = quantize_absmax(absmax, block_size=block_size)
    expected = reference.quantize_absmax(absmax.numpy(), MAP, block_size)
    # the offset is a float64 sum rounded to float32; fsum is exact: they meet unless the exact
    # mean lies within 1e-13 of a rounding boundary, which these inputs do not
    assert offset.item() == expected[2]
    np.testing.assert_array_equal(code.numpy(), expected[0])
    np.testing.assert_array_equal(scale.numpy(), expected[1])
    decoded = dequantize_absmax(code, scale, offset, block_size=block_size)
    values = reference.dequantize_absmax(*expected, MAP, block_size)
    np.testing.assert_array_equal(decoded.numpy(), values)


@given(absmax=scales())
def test_the_error_is_at_most_half_the_widest_gap_of_the_map(absmax):
    code, scale, offset = quantize_absmax(absmax)
    error = (dequantize_absmax(code, scale, offset) - absmax).abs()
    bound = scale.repeat_interleave(256)[: len(absmax)] * float(np.diff(MAP).max()) / 2
    # the sum with the offset is rounded to float32 once more
    assert (error <= bound + 2e-7 * (absmax + offset.abs())).all()


def test_the_mean_does_not_depend_on_threads_or_chunks(monkeypatch):
    x = torch.rand(300_001)
    expected = ordered_mean(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ordered_mean(x), expected)
    finally:
        torch.set_num_threads(before)
    # values up to 1: a rounding of float32, 2**-24
    assert abs(expected.item() - x.double().mean().item()) < 1e-7


def test_zero_rows_decode_to_exactly_zero_under_double_quantisation():
    linear = torch.nn.Linear(128, 64)
    with torch.no_grad():
        linear.weight[10:20] = 0
        linear.weight[0, 0] = 50  # an outlier: the decoded scale of a zero block is then not zero
    layer = NF4Linear.from_linear(linear)
    assert (layer.absmax[10:20] != 0).any()
    assert (layer.weight[10:20] == 0).all()


def test_bad_input_raises():
    with pytest.raises(ValueError, match="finite"):
        quantize_absmax(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="block_size"):
        quantize_absmax(torch.ones(3), block_size=0)
    code, scale, offset = quantize_absmax(torch.rand(300))
    with pytest.raises(ValueError, match="scales"):
        dequantize_absmax(code, scale[:1], offset)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="bitsandbytes makes another map where torch.linspace rounds twice",
)
def test_the_map_is_bitsandbytes():
    peer = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(peer.create_dynamic_map(signed=True), torch.from_numpy(MAP))


def test_no_table_depends_on_the_processor(plain_python):
    script = """
import hashlib, torch
from minipeft.double_quant import dynamic_codebook
from minipeft.nf4 import normal_float_codebook
tables = [dynamic_codebook(), *(normal_float_codebook(bits) for bits in range(2, 9))]
print([hashlib.sha256(torch.tensor(table).numpy().tobytes()).hexdigest() for table in tables])
"""
    own = plain_python(script)
    assert plain_python(script, ATEN_CPU_CAPABILITY="default") == own
    # of the map that bitsandbytes 0.50 makes on a processor with fused multiply-add
    assert own.startswith("['e732639a65f497b4")


def test_the_map_equals_its_independent_construction():
    # float64 there, float32 linspace and products here: at most two roundings apart
    np.testing.assert_allclose(MAP, reference.dynamic_map(), rtol=3e-7, atol=0)
