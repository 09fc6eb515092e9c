"""The Triton kernels under the interpreter, on the CPU: run by test_triton.py.

Every bit must be what the PyTorch implementation computes; nothing beyond the result may be
written.  Programs run one after another here: races are not seen.
"""

import random

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import minipeft as mp
from minipeft import ops
from minipeft.fast.backend import tried_first
from minipeft_kernels.triton import nf4
from tests.kernels.conftest import read_bfloat16, round_to_bfloat16

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = 400
GUARD = 4096


def case(seed: int):
    """Packed weight, shape and dtype: tails of every kind, zero and tiny blocks."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = rng.choice([
        (rng.randint(1, 40),), (rng.randint(1, 5000),), (rng.randint(1, 40), rng.randint(1, 130)),
        (rng.randint(1, 16), rng.choice([32, 64, 192, 256, 320])),
    ])  # fmt: skip
    block_size = rng.choice([32, 64, 64, 128, 256, 1024, 4096])
    w = torch.randn(shape) * 2.0 ** rng.choice([0, -8, -60, -120])
    if rng.random() < 0.3:
        w = w * (torch.rand(shape) < 0.05)
    packed, absmax = mp.quantize_nf4(w, block_size=block_size)
    weight = ops.Packed(packed, absmax, block_size)
    if rng.random() < 0.7:
        code, scale, offset = mp.quantize_absmax(absmax)
        weight = ops.Packed(packed, code, block_size, scale, offset)
    return weight, list(shape), rng.choice(DTYPES)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({4: torch.int32, 2: torch.int16}[t.element_size()])


def test_the_sweep(capsys):
    weights = differing = 0
    for seed in range(CASES):
        weight, shape, dtype = case(seed)
        expected = torch.ops.minipeft.dequantize_nf4(*weight, shape, dtype)
        got = nf4.dequantize(weight, shape, dtype)
        assert got.dtype == dtype and got.shape == expected.shape
        weights += got.numel()
        differing += int((bits(got) != bits(expected)).sum())
    with capsys.disabled():
        print(f"\n{CASES} cases, {weights:,} weights: {differing} differ in any bit")
    assert differing == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 2 * nf4.TILE - 1, 2 * nf4.TILE + 1, 9000])
def test_nothing_is_written_beyond_the_result(n, dtype):
    packed, absmax = mp.quantize_nf4(torch.randn(n))
    code, scale, offset = mp.quantize_absmax(absmax)
    weight = ops.Packed(packed, code, 64, scale, offset)
    around = torch.full((GUARD + n + GUARD,), float("nan"), dtype=dtype)
    nf4.dequantize_into(around[GUARD : GUARD + n], weight)
    expected = torch.ops.minipeft.dequantize_nf4(*weight, [n], dtype)
    assert torch.equal(around[GUARD : GUARD + n], expected)
    assert around[:GUARD].isnan().all() and around[GUARD + n :].isnan().all()


def test_a_buffer_with_gaps_is_refused():
    packed, absmax = mp.quantize_nf4(torch.randn(64))
    with pytest.raises(ValueError, match="expected contiguous"):
        nf4.dequantize_into(torch.empty(64, 2)[:, 0], ops.Packed(packed, absmax, 64))


def test_no_weights():
    empty = ops.Packed(torch.empty(0, dtype=torch.uint8), torch.empty(0), 64)
    assert nf4.dequantize(empty, [0, 8], torch.float32).shape == (0, 8)


def test_chosen_through_the_table_for_a_layer_and_its_backward():
    row = ops.Implementation(
        "dequantize_nf4", "triton", lambda *_: True, "minipeft_kernels.triton.nf4", "dequantize"
    )
    layer = mp.NF4Linear.from_linear(torch.nn.Linear(192, 65).bfloat16())
    x = torch.randn(3, 192, dtype=torch.bfloat16, requires_grad=True)

    def run():
        y = layer(x)
        (grad,) = torch.autograd.grad(y.float().square().sum(), x)
        return y, grad

    expected = run()
    with tried_first(row):
        assert mp.backend()["dequantize_nf4"] == "triton"
        for got, wanted in zip(run(), expected, strict=True):
            assert torch.equal(got, wanted)
        with mp.use_kernels(False):
            assert mp.backend()["dequantize_nf4"].startswith("pytorch (not triton: kernels are off")


def test_the_interpreter_still_needs_its_repair():
    import triton.language as tl

    from tests.kernels.conftest import original

    values = torch.randn(1000).numpy()
    names = [f"arg{i}" for i in range(2)]
    assert names and interpreter._convert_float is not original
    cut = original(values, tl.float32, tl.bfloat16, None)
    tiny = np.array([1], dtype=np.uint16)  # the smallest subnormal number
    read = original(tiny, tl.bfloat16, tl.float32, None).view(np.float32)
    wrong = (cut.view("uint16") != round_to_bfloat16(values)).any() or read != read_bfloat16(tiny)
    assert wrong, "remove the repair"
