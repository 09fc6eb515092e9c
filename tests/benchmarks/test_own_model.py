"""One model through mp.benchmark and through the methods job: the same work, the same figures."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from benchmarks import own_model


def rows(**changes):
    first = {"method": "lora", "door": "mp.benchmark", "flops": 10, "peak_bytes / mp.benchmark": 1}
    return [first, {**first, "door": "methods", **changes}]


def test_other_flops_and_another_peak_are_differences():
    assert own_model.differences(rows()) == []
    assert own_model.differences(rows(**{"peak_bytes / mp.benchmark": 0.96})) == []
    (flops,) = own_model.differences(rows(flops=11))
    assert "lora, methods: 11 FLOPs, mp.benchmark counts 10" in flops
    (peak,) = own_model.differences(rows(**{"peak_bytes / mp.benchmark": 0.94}))
    assert "0.940 of mp.benchmark's peak" in peak


@pytest.mark.slow
def test_a_gpt_of_ones_own_has_the_figures_of_the_methods_job(tmp_path, monkeypatch):
    words = ["own_model", "--methods", "lora", "--output", str(tmp_path)]
    monkeypatch.setattr(own_model.sys, "argv", words)
    assert own_model.main() == 0
    (path,) = tmp_path.glob("own_model-*.json")
    result = json.loads(path.read_text())
    assert [row["door"] for row in result["rows"]] == list(own_model.DOORS)
    assert result["differences"] == []
