"""Every behaviour with a prefix attached on every architecture: tests.prefix_behaviours."""

import json

import pytest

pytest.importorskip("transformers")
from tests.prefix_behaviours import BEHAVIOURS
from tests.prefix_families import FAMILIES

# logits around 1 in float32, summed in another order; equal tokens and bits where 0
LIMITS = dict.fromkeys(BEHAVIOURS, 1e-5) | {
    "generate": 0.0, "static cache": 0.0, "off": 0.0, "window": 0.0, "copy": 0.0,
    "bf16, fp16": 0.05,  # bf16 has 8 bits: 0.4 % in each of some twenty roundings on the way
}  # fmt: skip


@pytest.mark.parametrize("behaviour", [name for name in BEHAVIOURS if name != "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeps_working(family, behaviour):
    found = BEHAVIOURS[behaviour](family)
    if found is None:
        pytest.skip(f"{family} has no such behaviour")
    assert found <= LIMITS[behaviour], f"{family}, {behaviour}: {found:.1e}"


@pytest.mark.slow  # two minutes of tracing
def test_compiled_models_compute_the_same_in_one_graph(plain_python):
    printed = plain_python(
        """
import warnings
warnings.simplefilter("ignore")
import torch
from tests.prefix_behaviours import BEHAVIOURS, Case
from tests.prefix_families import FAMILIES
for family in FAMILIES:
    print(family, BEHAVIOURS["compiled"](family), sep="; ")
for family, gated in (("LLaMA", 0), ("BERT", 0), ("BLOOM", 0), ("T5", 0), ("BLOOM", 1)):
    case = Case(family)
    prefix = case.attach(tokens=not gated, gated=bool(gated))
    if gated:
        with torch.no_grad():
            for gate in prefix.encoder.gates:
                gate.normal_()
        case.model.config.use_cache = False
        logits = torch.compile(case.model, backend="aot_eager")(**case.inputs()).logits
        print("gated", float((logits - case.logits()).abs().max()), sep="; ")
    case.model.config.use_cache = False
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(lambda: case.model(**case.inputs()).logits)()
    print("graphs", found.graph_count, sep="; ")
"""
    )
    rows = [line.split("; ") for line in printed.splitlines() if "; " in line]
    assert len(rows) == len(FAMILIES) + 6
    for name, value in rows:
        assert float(value) <= (1.0 if name == "graphs" else 1e-5), (name, value)


@pytest.mark.slow
def test_the_matrix_prints_both_tables_and_writes_its_result(plain_python, tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("peft")
    printed = plain_python(
        """
import os, sys
from benchmarks import prefix_matrix
sys.argv = ["prefix_matrix", "--families", "BERT", "BLOOM", "--output", os.environ["OUT"]]
assert prefix_matrix.main() == 0
""",
        OUT=str(tmp_path),
    )
    assert "PEFT" in printed and "cells in float32, the largest" in printed
    (path,) = tmp_path.glob("prefix_matrix-*.json")
    found = json.loads(path.read_text())
    assert set(found["minipeft"]) == {"BERT", "BLOOM"} == set(found["peft"])
    assert all(not isinstance(v, str) for row in found["minipeft"].values() for v in row.values())
