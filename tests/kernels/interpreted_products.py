"""The products and the quantiser under Triton's interpreter, on the CPU: run by test_triton.py.

References are float64 products with the decoded weight.  Every result lies in memory that was NaN
before, with NaN on both sides; so do inputs, where the tensor's kind has a NaN.
"""

import random

import pytest
import torch

import minipeft as mp
from minipeft import ops
from minipeft.fast.backend import tried_first
from minipeft_kernels.triton import gradient, product, quantize
from minipeft_kernels.triton.selection import MOST_ROWS, Plan, rows_of

CASES = 120
GUARD = 2048
# rounding of the result alone: half a unit in the last place; a sum of float32 products rounds each
# of up to 400 terms by 2^-24
ROUNDED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
# in fast mode one factor more is rounded, the codebook's value (product) or grad times the scale
FACTORS = {dtype: 2 * bound for dtype, bound in ROUNDED.items()}


def guarded(t: torch.Tensor) -> torch.Tensor:
    """The same tensor within a larger one of NaN, or of ones where there is no NaN."""
    edge = float("nan") if t.is_floating_point() else 255
    around = torch.full((GUARD + t.numel() + GUARD,), edge, dtype=t.dtype)
    inside = around[GUARD : GUARD + t.numel()].view(t.shape)
    inside.copy_(t)
    return inside


class Case:
    """One random weight, input and plan."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.dtype = rng.choice(list(ROUNDED))
        self.m = rng.choice(
            [1, 2, 7, 8, 9, 16, *([17, 33, 64] if self.dtype.itemsize == 2 else [])]
        )
        self.n = rng.choice([1, 7, 31, 32, 33, 64, 65, 130])
        self.block_size = rng.choice([32, 64, 64, 64, 128, 256])
        self.k = self.block_size * rng.randint(1, max(1, 400 // self.block_size))
        packed, absmax = mp.quantize_nf4(torch.randn(self.n, self.k), block_size=self.block_size)
        codebook = None
        if rng.random() < 0.3:  # FP4 and others: values that are not NF4's, in any order
            codebook = torch.randn(16)
        scales = (guarded(absmax), None, None)
        if rng.random() < 0.7:
            code, scale, offset = mp.quantize_absmax(absmax)
            scales = (guarded(code), guarded(scale), offset)
        self.weight = ops.Packed(
            guarded(packed), scales[0], self.block_size, *scales[1:], codebook
        )  # fmt: skip
        self.bias = guarded(torch.randn(self.n).to(self.dtype)) if rng.random() < 0.6 else None
        self.x, self.grad = self.rows(rng, self.k), self.rows(rng, self.n)
        slices = rng.choice([1, 2, 4])
        rows = max(rows_of(self.m), rng.choice([8, 16, 32]))
        self.plan = Plan(rows, rng.choice([16, 32, 64]), slices, 4, 3, rng.choice([1, 1, 2, 5]))

    def rows(self, rng: random.Random, width: int) -> torch.Tensor:
        """Rows next to each other, with gaps, or stored as columns."""
        kind = rng.choice(["dense", "gaps", "columns"])
        if kind == "gaps":
            wide = torch.full((self.m, width + 3), float("nan"), dtype=self.dtype)
            wide[:, :width] = torch.randn(self.m, width).to(self.dtype)
            return wide[:, :width]
        if kind == "columns":
            return torch.randn(width, self.m).to(self.dtype).T
        return guarded(torch.randn(self.m, width).to(self.dtype))

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The decoded weight, in float64, after rounding to `dtype`."""
        with mp.use_kernels("plain"):
            shape = [self.n, self.k]
            return torch.ops.minipeft.dequantize_nf4(*self.weight, shape, dtype).double()


@pytest.fixture
def guards(allocations):
    """As `allocations`: there must be some, and all of each is written."""
    yield allocations
    assert allocations
    for around, count in allocations:
        assert not around[GUARD : GUARD + count].isnan().any()


def error(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """Relative to what sums of so many products are by chance: single ones may nearly cancel."""
    size = ((x.double() ** 2) @ w.double() ** 2).sum().sqrt()
    return float((got.double() - expected).norm() / max(size, expected.norm()))


@pytest.mark.parametrize("seed", range(CASES))
def test_product(seed, guards):
    case = Case(seed)
    bias = 0 if case.bias is None else case.bias.double()
    # exact: the weights of the plain version, bit for bit; what is left is the sum's rounding
    for exact, dtype, bound in ((False, torch.float32, FACTORS), (True, case.dtype, ROUNDED)):
        got = product.product(
            case.x, case.weight, case.bias, case.n, plan=case.plan, exact=exact
        )  # fmt: skip
        assert got.dtype == case.dtype and got.shape == (case.m, case.n)
        w = case.dense(dtype).T
        assert error(got, case.x.double() @ w + bias, case.x, w) < bound[case.dtype]


@pytest.mark.parametrize("seed", range(CASES))
def test_gradient(seed, guards):
    case = Case(seed)
    plan = case.plan._replace(rows=max(16, case.plan.rows))
    for exact, dtype, bound in ((False, torch.float32, FACTORS), (True, case.dtype, ROUNDED)):
        got = gradient.gradient(case.grad, case.weight, case.k, plan=plan, exact=exact)
        assert got.dtype == case.dtype and got.shape == (case.m, case.k)
        w = case.dense(dtype)
        assert error(got, case.grad.double() @ w, case.grad, w) < bound[case.dtype]


@pytest.mark.parametrize("seed", range(12))
def test_branch_of_lora(seed, guards):
    case, rank = Case(seed), (1, 8, 16, 20)[seed % 4]
    a, b = torch.randn(rank, case.k).to(case.dtype), torch.randn(case.n, rank).to(case.dtype)
    low = torch.nn.functional.linear(case.x, a)
    branch = product.Branch(low, b, 0.5)
    got = product.product(case.x, case.weight, case.bias, case.n, branch=branch, plan=case.plan)
    bias = 0 if case.bias is None else case.bias.double()
    w = case.dense().T
    expected = case.x.double() @ w + bias + 0.5 * low.double() @ b.double().T
    assert error(got, expected, case.x, w) < FACTORS[case.dtype]


@pytest.mark.parametrize("seed", range(60))
def test_quantize_gives_the_bits_of_the_pytorch_row(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n = rng.choice([1, 2, 63, 64, 65, 1000, 4097, 9000])
    w = torch.randn(n) * 2.0 ** rng.choice([0, -8, -60, -125, -130])
    w = w.to(rng.choice([torch.float32, torch.float16, torch.bfloat16]))
    block_size = rng.choice([32, 64, 128, 4096])
    with mp.use_kernels("plain"):
        expected = mp.quantize_nf4(w, block_size=block_size)
    for got, wanted in zip(quantize.quantize(w, block_size), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy computes inf * 0
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_quantize_refuses_what_is_not_finite(value):
    w = torch.randn(300)
    w[123] = value
    with pytest.raises(ValueError, match="at index \\(123,\\)"):
        quantize.quantize(w, 64)


def test_midpoints_go_to_the_lower_code():
    values = torch.tensor(mp.NF4_CODEBOOK)
    w = torch.cat([(values[1:] + values[:-1]) / 2, torch.ones(1)])
    packed, absmax = quantize.quantize(w, 32)
    codes = [nibble for byte in packed.tolist() for nibble in (byte >> 4, byte & 15)]
    assert codes == [*range(15), 15] and absmax.tolist() == [1.0]


ROWS = tuple(
    ops.Implementation(name, "triton", lambda *_: True, f"minipeft_kernels.triton.{module}", what)
    for name, module, what in (
        ("nf4_linear", "product", "linear"),
        ("nf4_linear_input_gradient", "gradient", "input_gradient"),
    )
)


@pytest.mark.parametrize("shape", [(192, 65), (100, 64)])  # 100: blocks over row ends
@pytest.mark.parametrize("rows", [(3,), (2, 5), (65,), (0,), ()])
def test_a_layer_through_the_table(shape, rows):
    columns, n = shape
    layer = mp.NF4Linear.from_linear(torch.nn.Linear(columns, n))
    x = torch.randn(*rows, columns, requires_grad=True)

    def run():
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), x)

    expected = run()
    with tried_first(ROWS[0]), tried_first(ROWS[1]):
        assert mp.backend()["nf4_linear"] == "triton"
        got = run()
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # sums in another order


def test_more_rows_than_the_kernels_take_go_to_the_next_row():
    weight = ops.Packed(torch.zeros(32, dtype=torch.uint8), torch.ones(1), 64)
    for dtype, most in (
        (torch.bfloat16, MOST_ROWS["staged"][2]),
        (torch.float32, MOST_ROWS["staged"][4]),
    ):
        assert product.takes(torch.ones(most, 64, dtype=dtype), 64, weight.block_size)
        assert not product.takes(torch.ones(most + 1, 64, dtype=dtype), 64, weight.block_size)
    assert not product.takes(torch.ones(1, 64, dtype=torch.float64), 64, 64)


def test_tensors_on_several_devices_are_refused():
    weight = mp.NF4Linear.from_linear(torch.nn.Linear(64, 32)).state()
    elsewhere = torch.empty(2, 64, device="meta")
    with pytest.raises(RuntimeError, match="expected all of them on one device"):
        product.product(elsewhere, weight, None, 32)
    with pytest.raises(RuntimeError, match="expected all of them on one device"):
        gradient.gradient(torch.empty(2, 32, device="meta"), weight, 64)


def test_a_card_without_such_matrix_instructions_decodes_first(monkeypatch):
    layer, x = mp.NF4Linear.from_linear(torch.nn.Linear(64, 32)), torch.randn(2, 64)
    monkeypatch.setattr(product, "card_of", lambda _: "old")
    assert not product.takes(x, 64, 64)
    monkeypatch.setattr(product, "product", None)  # not called
    with torch.no_grad():
        found = product.linear(x, layer.state(), layer.bias, 32)
    assert torch.equal(found, layer(x))
