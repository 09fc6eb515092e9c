"""Models with adapters compile in few graphs, and leave Python: exported, as a library, as ONNX."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import minipeft as mp

SETUP = """
import json, warnings
import torch
from torch import nn
import minipeft as mp

warnings.filterwarnings("ignore")
torch.manual_seed(0)

class Block(nn.Module):  # embeds, attends, and classifies, as small as it gets
    def __init__(self, prefix=False):
        super().__init__()
        self.table, self.up = nn.Embedding(50, 64), nn.Linear(64, 128)
        self.down, self.qkv = nn.Linear(128, 64), nn.Linear(64, 3 * 64)
        self.prefix = mp.PrefixEncoder([(4, 16, 16)], 5) if prefix else None

    def forward(self, ids):
        x = self.table(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        if self.prefix is None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = mp.prefix_attention(q, k, v, *self.prefix()[0])
        x = x + y.transpose(1, 2).flatten(2)
        return x + self.down(torch.relu(self.up(x)))

def lora(**options):
    model = Block()
    mp.inject_lora(model, ["up", "down", "qkv"], 4, **options)
    return model

def qlora():
    model = Block()
    mp.quantize_model(model, head=())
    mp.inject_lora(model, ["up", "down", "qkv"], 4)
    return model

def prefix():
    model = Block(prefix=True)
    mp.freeze(model)
    return model

MAKE = {"LoRA": lora, "DoRA": lambda: lora(dora=True), "QLoRA": qlora, "prefix": prefix}

def drawn(model):
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model
"""

TRAINING = """
from torch._dynamo.backends.registry import lookup_backend
graphs, aot = 0, lookup_backend("aot_eager")

def counting(graph, inputs):
    global graphs
    graphs += 1
    return aot(graph, inputs)

found = {}
for name, make in MAKE.items():
    torch.compiler.reset()
    graphs, worst = 0, 0.0
    model = drawn(make()).train()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for batch, length in [(2, 8), (3, 11), (5, 7), (4, 16), (2, 21)]:
        ids, results = torch.randint(50, (batch, length)), []
        for f in (compiled, model):
            model.zero_grad()
            f(ids).square().mean().backward()
            results.append([p.grad.clone() for p in mp.adapter_parameters(model)])
        for ours, expected in zip(*results):
            worst = max(worst, ((ours - expected).norm() / expected.norm()).item())
    found[name] = [graphs, worst]
print(json.dumps(found))
"""

EXPORT = """
def same(program, model, kind):
    worst = 0.0
    for batch, length in [(2, 8), (5, 13)]:
        ids = torch.randint(50, (batch, length))
        with torch.no_grad():
            expected, got = model(ids), program(ids)
        worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
    return worst

sizes = [torch.export.Dim(name, min=2, max=64) for name in ("batch", "length")]
dims = (dict(enumerate(sizes)),)
found = {}
for name in ("LoRA", "QLoRA"):
    for merged in (False, True):
        model = drawn(MAKE[name]()).eval().requires_grad_(False)
        ids = torch.randint(50, (3, 9))
        with mp.disable_adapters(model), torch.no_grad():
            plain = model(ids)
        with torch.no_grad():
            assert not torch.allclose(model(ids), plain, atol=1e-3)
        if merged:
            mp.merge(model)
        program = torch.export.export(model, (ids,), dynamic_shapes=dims)
        label = f"{name}, merged" if merged else name
        found[label] = same(program.module(), model, label)
        if AOT:
            path = torch._inductor.aoti_compile_and_package(program)
            library = torch._inductor.aoti_load_package(path)
            found[f"{label}, library"] = same(library, model, label)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_training_over_five_shapes_compiles_at_most_three_graphs(plain_python, capsys):
    found = json.loads(plain_python(SETUP + TRAINING))
    with capsys.disabled():
        print("\ngraphs over 5 shapes, compiled against eager:",
              {n: f"{g}, {w:.1e}" for n, (g, w) in found.items()})  # fmt: skip
    assert found.keys() == {"LoRA", "DoRA", "QLoRA", "prefix"}
    for graphs, worst in found.values():
        assert 1 <= graphs <= 3
        assert worst <= 1e-5  # float32: products are summed in another order


@pytest.mark.slow
def test_exported_models_compute_what_eager_ones_do(plain_python, capsys):
    found = json.loads(plain_python(f"{SETUP}AOT = False\n{EXPORT}"))
    with capsys.disabled():
        print("\nexported against eager:", found)
    assert len(found) == 4
    assert (
        max(found.values()) <= 1e-6
    )  # float32: compiled code adds LoRA as a tensor times strength


@pytest.mark.slow
def test_ahead_of_time_libraries_compute_what_eager_models_do(plain_python, capsys):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler here: AOTInductor was not tried")
    found = json.loads(plain_python(f"{SETUP}AOT = True\n{EXPORT}"))
    libraries = {name: worst for name, worst in found.items() if name.endswith("library")}
    with capsys.disabled():
        print("\nAOTInductor against eager:", libraries)
    assert len(libraries) == 4
    assert max(libraries.values()) <= 1e-5  # float32: products are summed in another order


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_merged_models_become_onnx(plain_python, method):
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: torch.onnx.export was not tried")
    printed = plain_python(
        SETUP
        + f"""
model = drawn(MAKE[{method!r}]()).eval().requires_grad_(False)
ids = torch.randint(50, (3, 9))
with torch.no_grad():
    expected = model(ids)
mp.remove(model, merge=True)
program = torch.onnx.export(model, (ids,), dynamo=True, verbose=False)
nodes = {{node.domain for node in program.model.graph}}
assert not any("minipeft" in domain for domain in nodes), nodes
try:
    import onnxruntime
except ImportError:
    from onnx.reference import ReferenceEvaluator
    run = ReferenceEvaluator(program.model_proto).run
else:
    run = onnxruntime.InferenceSession(program.model_proto.SerializeToString()).run
name = program.model.graph.inputs[0].name
got = torch.from_numpy(run(None, {{name: ids.numpy()}})[0])
print(((got - expected).abs().max() / expected.abs().max()).item())
"""
    )
    assert float(printed.split()[-1]) <= 1e-5  # float32: products are summed in another order


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_of_dora_computes_the_lengths_again():
    model = nn.Sequential(nn.Linear(64, 8))
    mp.inject_lora(model, ["0"], rank=2, dora=True)
    nn.init.normal_(model[0].lora_b)
    traced = torch.jit.trace(model.eval(), (torch.randn(3, 64),))
    nn.init.normal_(model[0].lora_a)  # the trace shares the parameters
    other = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(traced(other), model(other), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_of_a_dense_lora_is_right_and_one_of_4_bit_layers_is_refused():
    model = nn.Sequential(nn.Linear(64, 8))
    mp.inject_lora(model, ["0"], rank=2)
    nn.init.normal_(model[0].lora_b)
    x = torch.randn(3, 64)
    traced = torch.jit.trace(model.eval(), (x,))
    other = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(traced(other), model(other), rtol=0, atol=0)
    mp.remove(model)
    mp.quantize_model(model, head=())
    mp.inject_lora(model, ["0"], rank=2)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot hold 4-bit layers; use"):
        torch.jit.trace(model.eval(), (x,))
