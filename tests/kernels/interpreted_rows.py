"""Adapters by row under Triton's interpreter, on the CPU: run by test_triton.py.

References are loops over rows and slots in float64.  Results and sums lie in memory that was NaN
before, with NaN on both sides; rows of x that use no slot are NaN.
"""

import random

import pytest
import torch

import minipeft as mp
from minipeft import ops
from minipeft.fast.backend import tried_first
from minipeft.layers import LoRABank, bank
from minipeft_kernels.triton import rows

CASES = 60
# units of rounding: the factors, h and the result are each rounded once (2^-9 and 2^-12 at most);
# float32 sums of up to 600 products round each by 2^-24
ROUNDED = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-20}


def random_rows(rng: random.Random, m: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows next to each other, with gaps, or stored as columns."""
    kind, values = rng.choice(["dense", "gaps", "columns"]), torch.randn(m, width).to(dtype)
    if kind == "gaps":
        wide = torch.full((m, width + 3), float("nan"), dtype=dtype)
        wide[:, :width] = values
        return wide[:, :width]
    return values.T.contiguous().T if kind == "columns" else values


class Case:
    """Random factors, gate and input."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.dtype, factors = rng.choice(list(ROUNDED)), rng.choice(list(ROUNDED))
        capacity, rank = rng.choice([1, 2, 5, 8, 64]), rng.choice([1, 3, 16, 17, 32, 65, 130])
        k, n = rng.choice([1, 31, 64, 130, 530]), rng.choice([1, 7, 64, 129, 300])
        count = rng.choice([1, 1, 3, 8, 17])
        self.each = rng.choice([1, 1, 1, 2, 16, 70])
        self.m = m = count * self.each
        gates = 1 if rng.random() < 0.1 else count
        self.gate = (torch.rand(gates, capacity) < rng.choice([0.1, 0.5, 1.5 / capacity])).float()
        if rng.random() < 0.3:  # strengths other than 1
            self.gate *= torch.randint(1, 5, self.gate.shape) / 4
        if rng.random() < 0.3:
            self.gate = self.gate.T.contiguous().T
        self.a = (torch.randn(capacity, rank, k) / k**0.5).to(factors)
        self.b = (torch.randn(capacity, rank, n) / rank**0.5).to(factors)
        if rng.random() < 0.3:
            self.a = self.a.transpose(1, 2).contiguous().transpose(1, 2)
        self.out, self.x = (random_rows(rng, m, width, self.dtype) for width in (n, k))
        self.by_token = self.gate.repeat_interleave(m // gates, dim=0)
        self.off = ~self.by_token.bool().any(1)
        self.x[self.off] = float("nan")

    def expected(self) -> torch.Tensor:
        y = self.out.double()
        a, b = (t.to(self.dtype).double() for t in (self.a, self.b))
        for i in range(self.m):
            for slot, strength in enumerate(self.by_token[i].double()):
                if strength:
                    y[i] += strength * (self.x[i].double() @ a[slot].T) @ b[slot]
        return y


@pytest.mark.parametrize("seed", range(CASES))
def test_rows(seed, allocations):
    case = Case(seed)
    got = rows.add_rows(case.out, case.x, case.a, case.b, case.gate)
    expected = case.expected()
    assert got.dtype == case.dtype and got.shape == case.out.shape
    assert torch.equal(got[case.off], case.out[case.off])  # in every bit
    assert float((got.double() - expected).norm() / expected.norm()) < ROUNDED[case.dtype]


def test_sums_in_parts():
    case = Case(0)
    assert rows.tiles(8, 4096, 1, 16, 2)["parts"] == 16
    assert rows.tiles(2048, 4096, 512, 16, 2)["parts"] == 4
    assert rows.tiles(case.m, 530, case.each, 16, 2)["parts"] == 2


def test_minus_zero_stays():
    out = torch.full((2, 32), -0.0)
    y = rows.add_rows(out, torch.ones(2, 8), torch.ones(1, 1, 8), torch.ones(1, 1, 32),
                      torch.tensor([[0.0], [1.0]]))  # fmt: skip
    assert torch.signbit(y[0]).all() and (y[1] == 8).all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (4, 3, 8)])
def test_shapes_as_the_plain_form_takes_them(shape):
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[: 1 if len(shape) == 1 else 2]
    x, a, b = torch.randn(shape), torch.randn(2, 3, 8), torch.randn(2, 3, 5)
    out = torch.randn(*shape[:-1], 5)
    expected = bank.add_rows(out, x, a, b, gate)
    got = rows.add_rows(out, x, a, b, gate)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected)


def test_more_than_the_kernel_takes_goes_to_the_plain_form():
    x, out, gate = torch.randn(2, 8), torch.randn(2, 5), torch.ones(2, 65)
    a, b = torch.randn(65, 2, 8), torch.randn(65, 2, 5)
    got = rows.add_rows(out, x, a, b, gate)
    assert torch.equal(got, bank.add_rows(out, x, a, b, gate))


def test_a_layer_through_the_table():
    row = ops.Implementation(
        "lora_rows", "triton", lambda *_: True, "minipeft_kernels.triton.rows", "add_rows"
    )
    gate = torch.tensor([[1.0, 0], [0, 0], [1, 1]])
    layer = LoRABank(torch.nn.Linear(40, 33), 2, 4, gate=gate).eval()
    for slot in range(2):
        layer.load(slot, torch.randn(4, 40), torch.randn(33, 4))
    x = torch.randn(6, 5, 40)
    with torch.no_grad():
        expected = layer(x)
        with tried_first(row):
            assert mp.backend()["lora_rows"] == "triton"
            got = layer(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # sums in another order
    with tried_first(row):  # a gradient is wanted: the plain form has one
        (grad,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    assert grad.shape == x.shape and grad.abs().sum() > 0
