"""The operators: torch's own checks, compiling, and the table of implementations."""

import os
import shutil
import subprocess
import sys
import types
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import minipeft as mp
from minipeft import ops
from minipeft.fast.backend import tried_first

CALLS = {
    "quantize_nf4": lambda w: (torch.randn(5, 64), 64),
    "dequantize_nf4": lambda w: (*w, [32, 64], torch.bfloat16),
    "quantize_absmax": lambda w: (torch.rand(300), 256),
    "dequantize_absmax": lambda w: (w.absmax, w.scale, w.offset, 256),
    "nf4_linear": lambda w: (
        torch.randn(3, 64, requires_grad=True), *w, torch.randn(32, requires_grad=True), 32,
    ),
    "nf4_linear_input_gradient": lambda w: (torch.randn(3, 32, requires_grad=True), *w, 64),
    "nf4_embedding": lambda w: (torch.tensor([[3, 0], [31, 3]]), *w, 32, 64, torch.bfloat16),
    "nf4_experts": lambda w: (
        torch.randn(5, 64, requires_grad=True), torch.tensor([3, 0, 3, 1, 1]), *w, [4, 8, 64],
        False,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # opcheck's own, about .grad of views
@pytest.mark.parametrize("name", [n for n, made in ops.OPERATORS.items() if made.arguments])
def test_opcheck(name):
    weight = mp.NF4Linear.from_linear(torch.nn.Linear(64, 32)).state()
    opcheck(getattr(torch.ops.minipeft, name).default, CALLS[name](weight))
    if "weight" in ops.OPERATORS[name].arguments:
        weight = weight._replace(codebook=torch.tensor(mp.codebooks.FP4))
        opcheck(getattr(torch.ops.minipeft, name).default, CALLS[name](weight))


COMPILE = """
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
import minipeft as mp

for dropout in {dropouts}:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = mp.LoRALinear(mp.NF4Linear.from_linear(nn.Linear(256, 128)), 8, dropout=dropout)
    nn.init.normal_(layer.lora_b, std=0.02)
    counter = CompileCounterWithBackend("{backend}")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(mp.adapter_parameters(layer), lr=1e-3)
    for step in range(10):
        x = torch.randn(5, 256, requires_grad=True)
        results = []
        for model in (compiled, layer):
            x.grad = None
            optimizer.zero_grad()
            y = model(x)
            y.square().mean().backward()
            grads = [x.grad, layer.lora_a.grad, layer.lora_b.grad]
            results.append([y.detach(), *(grad.clone() for grad in grads)])
        if not layer.dropout:
            for a, b in zip(*results):  # the same float32 products, fused differently
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        optimizer.step()
    print("frames:", counter.frame_count)
"""


def test_a_qlora_layer_compiles_whole_and_once(plain_python):
    printed = plain_python(COMPILE.format(backend="aot_eager", dropouts=(0.0, 0.1)))
    assert printed.split() == ["frames:", "1"] * 2


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang", "c++", "g++"))), reason="no C compiler"
)
def test_a_qlora_layer_compiles_with_inductor(plain_python):
    assert plain_python(COMPILE.format(backend="inductor", dropouts=(0.0,))).strip() == "frames: 1"


@pytest.mark.slow
def test_a_qlora_layer_compiles_whole_on_a_gpu_that_is_not_there(plain_python):
    # no gradients: a build of torch without CUDA ends in autograd on such tensors
    printed = plain_python("""
import torch
import minipeft as mp
from torch._subclasses.fake_tensor import FakeTensorMode

layer = mp.LoRALinear(mp.NF4Linear.from_linear(torch.nn.Linear(64, 32)), 4)
seen = []
def backend(graph, example):
    seen.extend(str(node.target) for node in graph.graph.nodes)
    return graph.forward
with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
    parameters = {name: torch.empty(p.shape, dtype=p.dtype, device="cuda")
                  for name, p in layer.named_parameters()}
    run = lambda x: torch.func.functional_call(layer, parameters, (x,))
    x = torch.empty(3, 64, dtype=torch.bfloat16, device="cuda")
    for function in (run, torch.compile(run, backend=backend, fullgraph=True)):
        y = function(x)
        print(y.device.type, tuple(y.shape), y.dtype)
print("minipeft.nf4_linear" in seen)
""")
    assert printed.splitlines() == ["cuda (3, 32) torch.bfloat16"] * 2 + ["True"]


@pytest.mark.parametrize("kernels", ["1", "0"])
def test_first_calls_import_nothing_heavy(kernels, plain_python):
    """No dynamo (a second) at a first call; the times are printed.

    They are bounded by ten times, but not where numba may have to compile loops first.
    """
    printed = plain_python(
        """
import sys, time
import torch, minipeft as mp
assert "numba" not in sys.modules

def first(name, call):
    start = time.perf_counter()
    result = call()
    times[name] = 1e3 * (time.perf_counter() - start)
    return result

times = {}
w = torch.randn(64, 64)
linear = torch.nn.Linear(64, 64)
x = torch.randn(3, 64, requires_grad=True)
packed, absmax = first("quantize_nf4", lambda: mp.quantize_nf4(w))
first("dequantize_nf4", lambda: mp.dequantize_nf4(packed, absmax, (64, 64)))
state = first("quantize_absmax", lambda: mp.quantize_absmax(absmax))
first("dequantize_absmax", lambda: mp.dequantize_absmax(*state))
layer = mp.NF4Linear.from_linear(linear)
y = first("nf4_linear", lambda: layer(x))
first("nf4_linear_input_gradient", lambda: y.sum().backward())
assert "torch._dynamo" not in sys.modules
print({name: round(value, 2) for name, value in times.items()})
assert mp.backend()["nf4_linear"].startswith("numba") or max(times.values()) < 500, times
""",
        MINIPEFT_KERNELS=kernels,
    )
    print("first calls, ms:", printed)


def row(name, module, when=lambda *_: True):
    return ops.Implementation("dequantize_nf4", name, when, module, "run")


@pytest.fixture
def added():
    with ExitStack() as rows:
        yield lambda row: rows.enter_context(tried_first(row))


def decode():
    packed, absmax = mp.quantize_nf4(torch.ones(64))
    return mp.dequantize_nf4(packed, absmax, (64,), dtype=torch.bfloat16)


def test_a_row_is_used_where_its_predicate_holds_and_loaded_at_its_first_use(added, monkeypatch):
    module = types.ModuleType("a_kernel")
    module.run = lambda weight, shape, dtype: torch.full(shape, 42, dtype=dtype)
    added(row("fast", "a_kernel", lambda device, dtype, shape: dtype is torch.bfloat16))
    monkeypatch.setitem(sys.modules, "a_kernel", module)
    assert (decode() == 42).all()
    assert mp.backend()["dequantize_nf4"] == "fast"
    assert "(not fast: not for torch.float32" in mp.backend(dtype=torch.float32)["dequantize_nf4"]
    with mp.use_kernels(False):
        assert (decode() == 1).all()
        assert mp.backend()["dequantize_nf4"].startswith("pytorch (not fast: kernels are off")
    assert (decode() == 42).all()


def test_a_row_that_cannot_be_loaded_is_skipped_and_says_why(added):
    added(row("missing", "no_such_module_anywhere"))
    assert (decode() == 1).all()
    assert "no_such_module_anywhere" in mp.backend()["dequantize_nf4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["test_nf4", "test_double_quant", "test_qlora", "test_prefix", "quantized/test_quantized"],
)
def test_all_holds_with_the_plain_rows_alone(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow",
         f"tests/{name}.py"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False,
        env={**os.environ, "MINIPEFT_KERNELS": "plain"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
