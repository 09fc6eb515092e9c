"""Loops for CPUs against the plain functions: equal bits, for every shape, dtype and place."""

import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minipeft as mp
from minipeft import double_quant, nf4, qlora
from minipeft.adapters import products
from minipeft.fast import panels
from minipeft.ops import Packed
from tests.strategies import DTYPES, SHAPES, weights

pytest.importorskip("numba")
from numba import njit
from numba.core.dispatcher import Dispatcher

from minipeft_kernels.cpu import compiled, decode, encode, one_row, product, rounding, threads

LOOPS = (compiled, decode, encode, one_row, rounding, threads)
BLOCKS = st.sampled_from([32, 64, 256, 4096])
SEEDS = st.integers(0, 2**31 - 1)


def same(a, b):
    """Whether two tensors are equal in every bit; any NaN equals any other."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    if a.is_floating_point():
        both = a.isnan() & b.isnan()
        kind = torch.int32 if a.dtype == torch.float32 else torch.int16
        return bool((both | (a.view(kind) == b.view(kind))).all())
    return torch.equal(a, b)


def packed(n, block_size, seed, *, doubled, own_values, rare=False):
    """A 4-bit weight of random bytes, which need not come from an encoder."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, ((n + 1) // 2,), generator=random, dtype=torch.uint8)
    blocks = -(-n // block_size)
    absmax = torch.rand(blocks, generator=random) * 10 ** torch.empty(blocks).uniform_(
        -44, 38, generator=random
    )
    if rare and blocks:
        absmax[::3] = absmax.new_tensor([0.0, -0.0, torch.inf, torch.nan, 3.4e38])[seed % 5]
    values = torch.randn(16, generator=random) if own_values else None
    if not doubled:
        return Packed(codes, absmax, block_size, codebook=values)
    state = double_quant.encode(absmax.clamp(max=1e30).nan_to_num(), 256)
    return Packed(codes, state[0], block_size, state[1], state[2], values)


def test_every_compiled_function_has_a_name_of_its_own():
    """Cached machine code is linked by names: functions of one name are taken for each other."""
    found = {}
    for module in LOOPS:
        for value in vars(module).values():
            if isinstance(value, Dispatcher):
                function = value.py_func
                found[f"{function.__module__}.{function.__qualname__}"] = function
                others = [cell.cell_contents for cell in function.__closure__ or ()]
                own = [other for other in others if isinstance(other, Dispatcher)]
                assert all("<" not in other.py_func.__qualname__ for other in own)
    functions = {v.py_func for m in LOOPS for v in vars(m).values() if isinstance(v, Dispatcher)}
    assert len(found) == len(functions) >= 15
    assert not any("<" in name for name in found)


def test_code_in_the_cache_is_that_of_all_sources(tmp_path, plain_python):
    """A loop in an unchanged file is compiled again when a helper in another file has changed."""
    package = tmp_path / "minipeft_kernels"
    shutil.copytree(
        Path(decode.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__")
    )  # the script's folder is searched first
    script = """
import torch, minipeft as mp
from minipeft_kernels.cpu import one_row
print(one_row.__file__)
layer = mp.NF4Linear.from_linear(torch.nn.Linear(64, 64, bias=False))
print(float(one_row.linear(layer.weight[:1], layer.state(), 64).sum()))
"""
    first, before = plain_python(script).split()
    assert first.startswith(str(tmp_path))
    helper = package / "cpu" / "decode.py"
    text = helper.read_text()
    changed = text.replace("pairs[i] = pairs_of_byte[codes[i]]", "pairs[i] = pairs_of_byte[0]")
    assert changed != text
    helper.write_text(changed)
    assert plain_python(script).split()[1] != before


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 20_000), BLOCKS, SEEDS, st.booleans(), st.booleans())
def test_decodes_as_the_plain_function(dtype, n, block_size, seed, doubled, own_values):
    weight = packed(n, block_size, seed, doubled=doubled, own_values=own_values, rare=True)
    expected = double_quant.decode_weights(weight, [n], dtype)
    assert same(decode.dequantize(weight, [n], dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data(), st.sampled_from([32, 64]), SEEDS, st.booleans())
def test_decodes_rectangles_of_whole_blocks(dtype, data, block_size, seed, doubled):
    rows, blocks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 300))
    weight = packed(rows * blocks * block_size, block_size, seed, doubled=doubled, own_values=False)
    r0, r1 = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    b0, b1 = sorted(data.draw(st.tuples(st.integers(0, blocks), st.integers(0, blocks))))
    whole = double_quant.decode_weights(weight, [rows, blocks * block_size], dtype)
    expected = whole[r0:r1, b0 * block_size : b1 * block_size]
    guarded = torch.full((expected.numel() + 128,), 7.0, dtype=dtype)  # written beside it?
    out = guarded[64:-64].view(expected.shape)
    decode.decode_into(out, weight, (rows, r0, r1), (b0, b1))
    assert same(out, expected)
    assert bool((guarded[:64] == 7).all() and (guarded[-64:] == 7).all())
    if dtype != torch.float32:  # float32 numbers that are rounded to this dtype
        wide = torch.empty(expected.shape)
        decode.decode_into(wide, weight, (rows, r0, r1), (b0, b1), decode.ROUNDED[dtype])
        assert same(wide, expected.float())


def test_rounds_every_float16_and_bfloat16_as_torch_does():
    """All 65,536 bits of either, and the float32 numbers around them and half way between."""

    @njit
    def run(x, bf16, fp16):
        for i in range(x.size):
            bf16[i] = rounding.rounded_to_bfloat16(x[i])
            fp16[i] = rounding.rounded_to_float16(x[i])

    @njit
    def widen(half, x):
        for i in range(half.size):
            x[i] = rounding.from_float16(half[i])

    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2**16)
    widen(bits.view(torch.uint16).numpy(), wide.numpy())
    assert same(wide, bits.view(torch.float16).float())
    for dtype in (torch.float16, torch.bfloat16):
        exact = bits.view(dtype).float()
        half_way = (exact[1:].double() + exact[:-1].double()).div(2).float()
        near = torch.cat([exact, half_way])
        infinite = near.new_tensor(torch.inf)
        x = torch.cat([near, near.nextafter(infinite), near.nextafter(-infinite)])
        found = torch.empty(2, len(x), dtype=torch.int16)
        run(x.numpy(), *(row.view(torch.uint16).numpy() for row in found))
        for row, target in zip(found, (torch.bfloat16, torch.float16), strict=True):
            assert same(row.view(target), x.to(target))


@given(weights(), BLOCKS)
def test_encodes_as_the_plain_function(w, block_size):
    for given_ in (w, w.mT if w.dim() > 1 else w.flip(0)):
        expected = nf4.encode(given_, block_size)
        assert all(map(same, encode.quantize(given_, block_size), expected))


@given(SHAPES, SEEDS, st.sampled_from([-1, 3, 17]))
def test_refuses_what_is_not_finite_where_the_plain_function_does(shape, seed, place):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if not w.numel():
        return
    w.view(-1)[place % w.numel()] = [torch.nan, torch.inf, -torch.inf][seed % 3]
    said = []
    for quantize in (nf4.encode, encode.quantize):
        with pytest.raises(ValueError, match="weights must be finite") as error:
            quantize(w, 64)
        said.append(str(error.value))
    assert said[0] == said[1]


@given(
    st.one_of(st.integers(0, 3000), st.just(70_001)),
    SEEDS,
    st.sampled_from([1, 7, 256, 4096, 5000]),
)
def test_encodes_scales_as_the_plain_function(n, seed, block_size):
    random = torch.Generator().manual_seed(seed)
    absmax = torch.rand(n, generator=random) * 10.0 ** (seed % 78 - 40)
    if n and seed % 3 == 0:
        absmax[:: 1 + seed % 5] *= -1  # no weight has such scales, but the function takes them
    if n > 1 and seed % 4 == 0:
        absmax[:2] = torch.tensor([3.4e38, -3.4e38])  # less their mean: infinite
    expected = double_quant.encode(absmax, block_size)
    assert all(map(same, encode.quantize_absmax(absmax, block_size), expected))


def test_float16_is_read_and_written_also_where_subnormal_numbers_count_as_zero():
    w = (torch.randn(64, 64) * 2e-5).half()  # most are subnormal in float16, none in float32
    expected = nf4.encode(w, 64)
    assert torch.set_flush_denormal(True)
    try:
        assert all(map(same, encode.quantize(w, 64), expected))
    finally:
        torch.set_flush_denormal(False)


NOT_THERE = """
import torch, minipeft as mp
from minipeft.ops import Packed
x, codes = torch.ones(3, 64), torch.zeros(32, dtype=torch.uint8)
layer = mp.NF4Linear(64, 64, device="meta")
real = mp.NF4Linear.from_linear(torch.nn.Linear(64, 64)).state()
calls = (
    lambda: layer(x), lambda: layer(x[:1]), lambda: layer(x.clone().requires_grad_()),
    lambda: mp.dequantize_nf4(codes, torch.ones(1, device="meta"), (64,)),
    lambda: mp.qlora.decode(real._replace(scale=real.scale.to("meta")), [64, 64], torch.float32),
)
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print("RuntimeError", error)
"""


def test_tensors_on_another_device_are_an_error_and_no_crash(plain_python):
    """In a process of its own: what is read from there would end it."""
    said = plain_python(NOT_THERE).splitlines()
    assert len(said) == 5
    assert all("on the CPU, found one on meta" in line for line in said)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w._replace(absmax=w.absmax.long()), "of torch.uint8; got 32 of torch.int64"),
        (lambda w: w._replace(packed=w.packed[:-1]), "take 1024 numbers"),
        (lambda w: w._replace(absmax=w.absmax[:-1]), "take 32 numbers"),
        (lambda w: w._replace(scale=w.scale.double()), "got 1 of torch.float64"),
        (lambda w: w._replace(offset=w.offset.repeat(2)), "take 1 numbers of torch.float32; got 2"),
    ],
)
def test_a_weight_that_is_not_what_loops_read_is_refused(change, why):
    x, dy, weight, bias = operands(64, 32, 3, torch.float32)
    flat = weight._replace(packed=weight.packed.flatten(), absmax=weight.absmax.flatten())
    wrong = change(flat)
    for call in (
        lambda: product.linear(x, wrong, bias, 32), lambda: product.linear(x[:1], wrong, None, 32),
        lambda: product.input_gradient(dy, wrong, 64),
        lambda: decode.dequantize(wrong, [32, 64], torch.float32),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=why):
            call()


@pytest.mark.parametrize("kernels", [True, False])
def test_a_bias_is_that_of_the_plain_function(kernels, monkeypatch):
    monkeypatch.setattr(panels, "PANEL_BYTES", 2**12)
    x, _, weight, bias = operands(64, 96, 70, torch.float32)
    with mp.use_kernels(kernels):
        for rows in (1, 70):
            with pytest.raises(RuntimeError, match=r"expected a bias of torch\.float32"):
                qlora.multiply(x[:rows], weight, bias.double(), 96)
            wide = qlora.multiply(x[:rows], weight, bias[:1], 96)
            # the same sums, with one number added
            assert torch.equal(wide, qlora.multiply(x[:rows], weight, bias[:1].repeat(96), 96))


@pytest.mark.parametrize("kernels", [True, False])
def test_a_codebook_of_fifteen_values(kernels):
    values = mp.codebooks.int_codebook(4)
    assert len(values) == 15
    codes = torch.randint(15, (64, 64), dtype=torch.uint8)
    weight = Packed(codes[:, ::2] << 4 | codes[:, 1::2], torch.rand(64), 64,
                    codebook=torch.tensor(values))  # fmt: skip
    expected = double_quant.decode_weights(weight, [64, 64], torch.float32)
    with mp.use_kernels(kernels):
        assert same(qlora.decode(weight, [64, 64], torch.float32), expected)


def operands(in_features, out_features, rows, dtype, *, doubled=True):
    torch.manual_seed(rows)
    dense = torch.nn.Linear(in_features, out_features).to(dtype)
    weight = mp.NF4Linear.from_linear(dense, double_quant=doubled).state()
    shape = (rows,) if rows != 6 else (2, 3)  # a batch of texts
    return (
        torch.randn(*shape, in_features).to(dtype), torch.randn(*shape, out_features).to(dtype),
        weight, dense.bias.detach(),
    )  # fmt: skip


@pytest.mark.parametrize("threads_", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 6, 40, 70, 300])
@pytest.mark.parametrize("dtype", [*DTYPES, "slow"])
def test_products_in_panels_and_of_one_row(dtype, rows, threads_, monkeypatch):
    """Panels of a few rows or columns, against float64; each dtype has its own rounding."""
    monkeypatch.setattr(panels, "PANEL_BYTES", 2**14)
    slow = dtype == "slow"  # bfloat16 on a CPU that does not multiply it
    dtype = torch.bfloat16 if slow else dtype
    monkeypatch.setattr(products, "SLOW_ON_CPU", frozenset({dtype} if slow else ()))
    x, dy, weight, bias = operands(320, 77, rows, dtype)
    dense = double_quant.decode_weights(weight, [77, 320], dtype).double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads_)
    try:
        found = (
            product.linear(x, weight, bias, 77), product.linear(x, weight, None, 77),
            product.input_gradient(dy, weight, 320),
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    expected = (
        x.double() @ dense.T + bias.double(), x.double() @ dense.T, dy.double() @ dense,
    )  # fmt: skip
    # float32: sums of 320 products of about 0.03 in any order, measured 2e-7 of 1; 16 bits: one
    # rounding of the result, half a unit of its last place
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for y, z in zip(found, expected, strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), z, rtol=1.01 * unit, atol=2e-6)


def test_operands_with_gaps(monkeypatch):
    monkeypatch.setattr(panels, "PANEL_BYTES", 2**12)
    x, dy, weight, bias = operands(128, 96, 5, torch.float32)
    apart = weight._replace(packed=torch.stack([weight.packed] * 2, dim=-1)[..., 0])
    layouts = (lambda t: torch.stack([t, t], dim=-1)[..., 0], lambda t: t.T.contiguous().T)
    for layout, rows in itertools.product(layouts, (slice(None), slice(1))):
        expected = product.linear(x[rows], weight, bias, 96)
        assert same(product.linear(layout(x)[rows], apart, bias, 96), expected)
        expected = product.input_gradient(dy[rows], weight, 128)
        assert same(product.input_gradient(layout(dy)[rows], apart, 128), expected)


def layer_and_result():
    torch.manual_seed(0)
    layer = mp.NF4Linear.from_linear(torch.nn.Linear(512, 1024))
    return layer, layer.dequantize(torch.float32)


def test_eight_threads_of_python():
    """Each decodes, and multiplies in several panels: its buffer is its own."""
    layer, expected = layer_and_result()
    layers = [mp.NF4Linear.from_linear(torch.nn.Linear(512, 4096)) for _ in range(2)]
    x = torch.randn(70, 512, requires_grad=True)

    def run(layer):
        y = layer(x)
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    whole = [run(other) for other in layers]
    wrong, rounds = [], 10

    def work(number):
        for _ in range(rounds):
            found = (layer.dequantize(torch.float32), *run(layers[number % 2]))
            if not all(map(same, found, (expected, *whole[number % 2]))):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_threads_are_torchs_own_where_its_library_is_gnus():
    maps = Path("/proc/self/maps")
    if not maps.exists() or "libgomp" not in maps.read_text():
        pytest.skip("torch has another OpenMP library here")
    assert threads._parallel is not None


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("team", [True, False])
def test_any_number_of_threads_gives_the_same_bits(count, team, monkeypatch):
    """By torch's own threads, and by Python's, where torch has another library."""
    layer, expected = layer_and_result()
    w = torch.randn(600, 512)
    codes = nf4.encode(w, 64)
    if not team:
        monkeypatch.setattr(threads, "_parallel", None)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert same(layer.dequantize(torch.float32), expected)
        assert all(map(same, encode.quantize(w, 64), codes))
    finally:
        torch.set_num_threads(before)


FORK = """
import os, torch, minipeft as mp
torch.set_num_threads({threads})
from minipeft_kernels.cpu import threads
if not {team}:
    threads._parallel = None
layer = mp.NF4Linear.from_linear(torch.nn.Linear(512, 1024))
expected = layer.dequantize(torch.float32)
assert mp.backend()["dequantize_nf4"].startswith("numba")

class Layers(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return layer.dequantize(torch.float32)

for seen in torch.utils.data.DataLoader(Layers(), num_workers=2, batch_size=None):
    assert torch.equal(seen, expected)
if (child := os.fork()) == 0:
    torch.set_num_threads(1)  # torch's own threads do not survive a fork
    os._exit(0 if torch.equal(layer.dequantize(torch.float32), expected) else 3)
assert os.waitpid(child, 0)[1] == 0
print("right")
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("team", [True, False])
def test_workers_and_forks_after_the_first_use(team, plain_python):
    assert "right" in plain_python(FORK.format(threads=2, team=team))


SAYS = """
import warnings
import torch
import minipeft as mp

layer = torch.nn.Linear(64, 48)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("default")
    made = mp.NF4Linear.from_linear(layer)
    y = made(torch.ones(2, 64))
with mp.use_kernels("plain"):
    expected = made(torch.ones(2, 64))
assert torch.equal(y, expected)
print(mp.backend()["dequantize_nf4"])
for warning in seen:
    print("WARNED", warning.category.__name__, warning.message)
"""


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise ModuleNotFoundError(\"No module named 'numba'\", name='numba')", None),
        ("raise ImportError('Numba needs NumPy 2.1 or less. Got NumPy 2.4.')", "needs NumPy 2.1"),
        ("raise SystemError('initialization of _internal failed')", "initialization of _internal"),
        ("__version__ = '0.40'", "cannot import name"),
    ],
)
def test_without_a_numba_that_works_the_next_row_computes(source, why, plain_python, tmp_path):
    """One warning, however many rows are struck out, and none where numba is not installed."""
    (tmp_path / "numba.py").write_text(source)  # the script's folder is searched first
    said = plain_python(SAYS)
    assert said.startswith("pytorch (not triton: ")
    assert "numba: " in said.splitlines()[0]
    if why is None:
        assert "WARNED" not in said
    else:
        assert why in said.splitlines()[0]
        warned = [line for line in said.splitlines() if line.startswith("WARNED")]
        assert len(warned) == 1
        assert "minipeft goes without numba" in warned[0]
        assert why in warned[0]


UNWRITABLE = """
from numba.core import caching

def refuse(self):
    raise OSError("read-only")

caching._CacheLocator.ensure_cache_path = refuse
"""


@pytest.mark.slow
def test_where_no_folder_can_be_written_loops_are_compiled_again(plain_python):
    said = plain_python(UNWRITABLE + SAYS)
    assert said.startswith("numba")
    warned = [line for line in said.splitlines() if line.startswith("WARNED")]
    assert len(warned) == 1
    assert "Set NUMBA_CACHE_DIR to a folder that can be written" in warned[0]


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["generic", "haswell"])
def test_loops_for_older_processors_have_the_same_bits(cpu, tmp_path):
    """The tests above, compiled for less than this processor has.

    `generic` is what LLVM calls a processor that it does not know.
    """
    own = "test_decodes or test_encodes or test_rounds"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", __file__, "-k", own],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
        env={**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "",
             "NUMBA_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert os.listdir(tmp_path)
