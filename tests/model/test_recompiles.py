"""A compiled model stays compiled while adapters are switched, scaled, swapped and gated by row."""

import json

import pytest

SETUP = """
import json, warnings
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

graphs, aot = 0, lookup_backend("aot_eager")

def counting(graph, inputs):
    global graphs
    graphs += 1
    return aot(graph, inputs)

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 7))

x, counts, worst, same, last = torch.randn(6, 33), {}, 0.0, [], None

def note(what, before, y):
    global last
    counts[what] = graphs - before
    if last is not None and torch.equal(y, last):
        same.append(what)  # then the step showed nothing
    last = y.detach()
"""

OURS = (
    SETUP
    + """
import minipeft as mp

def with_adapters():
    model = plain()
    mp.inject_lora(model, ["0", "2"], rank=4)
    mp.inject_lora(model, ["0"], rank=3, alpha=6, name="fr")
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model

def step(what):
    global worst
    before, results = graphs, []
    for f in (compiled, model):
        if training:
            model.zero_grad()
            y = f(x)
            if y.requires_grad:
                y.square().sum().backward()
            gradients = [p.grad for p in mp.adapter_parameters(model)]
            # eager code gives an adapter that is off no gradient, compiled code one of zeros
            results.append([y] + [torch.zeros(()) if g is None else g for g in gradients])
        else:
            with torch.no_grad():
                results.append([f(x)])
    for ours, expected in zip(*results):
        scale = expected.abs().max().clamp(min=1.0)
        worst = max(worst, ((ours - expected).abs().max() / scale).item())
    note(f"{what}, training" if training else what, before, results[0][0])

small = plain()
mp.inject_lora(small, ["0"], rank=2, alpha=5)
for parameter in mp.adapter_parameters(small):
    nn.init.normal_(parameter, std=0.2)
"""
)

SWITCHING = """
for training in (False, True):
    torch.compiler.reset()
    last = None
    model = with_adapters().train(training)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    step("first")
    mp.use_adapters(model, "fr"); step("use fr")
    mp.use_adapters(model, "default"); step("use default")
    mp.use_adapters(model, ["default", "fr"]); step("use both")
    mp.scale_adapters(model, 0.3); step("scale")
    mp.scale_adapters(model, 0.7, name="fr"); step("scale one")
    mp.scale_adapters(model, -1.0); step("a negative scale")
    mp.scale_adapters(model, 1.0); step("scale back")
    with mp.disable_adapters(model): step("disabled")
    step("enabled")
    mp.replace_adapter(model, "default", small); step("swap for a smaller rank")
    mp.load_adapter_state_dict(model, mp.adapter_state_dict(with_adapters())); step("load")
"""

ROWS = """
training = False
model = with_adapters().eval()
compiled = torch.compile(model, backend=counting, fullgraph=True)
mp.use_adapters(model, rows=["fr", None, "default"]); step("first")
mp.use_adapters(model, rows=["default", "fr", ["fr", "default"]]); step("other rows")
with mp.disable_adapters(model): step("disabled")
mp.use_adapters(model, rows=[None, "fr", None]); step("hardly any")
mp.replace_adapter(model, "default", small)
mp.use_adapters(model, rows=["default", None, "fr"]); step("swap for a smaller rank")
mp.scale_adapters(model, 0.3, name="fr")
mp.use_adapters(model, rows=["default", None, "fr"]); step("scale one")
"""


def report(output, capsys, title):
    counts, worst, same = json.loads(output)
    with capsys.disabled():
        print(f"\n{title}: {counts}, compiled against eager {worst:.1e} relative")
    assert same == []
    # float32; the scale multiplies before or after the second product
    assert worst <= 1e-5
    return counts


@pytest.mark.slow
def test_switching_scaling_and_swapping_compile_nothing_again(plain_python, capsys):
    output = plain_python(f"{OURS}\n{SWITCHING}\nprint(json.dumps([counts, worst, same]))")
    counts = report(output, capsys, "graphs compiled")
    assert counts.pop("first") == counts.pop("first, training") == 1
    assert set(counts.values()) == {0}


@pytest.mark.slow
def test_other_rows_compile_nothing_again(plain_python, capsys):
    output = plain_python(f"{OURS}\n{ROWS}\nprint(json.dumps([counts, worst, same]))")
    counts = report(output, capsys, "graphs compiled, rows of a batch")
    assert counts.pop("first") == 1
    assert set(counts.values()) == {0}


@pytest.mark.slow  # a minute of PEFT's compilations; it claims nothing of this library
def test_peft_compiles_again(plain_python, capsys):
    """The same steps, where PEFT has them; without fullgraph, to be fair."""
    output = plain_python(
        SETUP
        + """
try:
    import peft
except ImportError:
    print("null")
    raise SystemExit

warnings.simplefilter("ignore")
model = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["0", "2"], r=4))
model.add_adapter("fr", peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=6))
for name, parameter in model.named_parameters():
    if "lora_" in name:
        nn.init.normal_(parameter, std=0.2)
model.eval()
compiled = torch.compile(model.base_model.model, backend=counting)

def step(what):
    global worst
    before = graphs
    with torch.no_grad():
        y, expected = compiled(x), model.base_model.model(x)
    worst = max(worst, ((y - expected).abs().max() / expected.abs().max()).item())
    note(what, before, y)

def scale(factor):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", factor)

step("first")
model.base_model.set_adapter("fr"); step("use fr")
model.base_model.set_adapter("default"); step("use default")
model.base_model.set_adapter(["default", "fr"]); step("use both")
scale(0.3); step("scale")
scale(0.7); step("scale again")
with model.disable_adapter(): step("disabled")
step("enabled")
print(json.dumps([counts, worst, same]))
"""
    )
    if output.strip() == "null":
        pytest.skip("PEFT is not installed")
    counts = report(output, capsys, "graphs that PEFT compiles")
    assert counts["use fr"] > 0
    assert counts["scale"] > 0
