"""The memory job: a small run from end to end, and its table."""

import json
import sys

import pytest

pytest.importorskip("transformers")

from benchmarks import memory, memory_worker
from benchmarks.memory_cases import MODELS, Case

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


@linux
@pytest.mark.slow
def test_a_small_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "table", lambda *_: [])
    monkeypatch.setattr(
        sys, "argv",
        ["memory", "--models", "tiny", "--methods", "lora", "qlora",
         "--allocator", "both", "--output", str(tmp_path)],
    )  # fmt: skip
    assert memory.main() == 0  # of a tiny model the peak of anonymous memory is not asked
    (file,) = tmp_path.glob("memory-*.json")
    data = json.loads(file.read_text())
    assert len(data["cases"]) == 2 * 2 * 2  # methods, checkpointing, allocators
    for row in data["cases"]:
        assert row["errors"]["held"] == 0  # what tensors hold is exact at any size
        assert row["measured"]["peak_tensors"] > row["measured"]["held"] > 0
    assert "glibc's default" in capsys.readouterr().out


@linux
def test_the_worker_counts_shared_tensors_once():
    case = Case("tiny", "full", False, 1, 8, "float32")
    import torch

    model = memory_worker.prepared(MODELS["tiny"].build(torch.float32), case)
    model.tie_weights()
    optimizer = memory_worker.optimizer_of(model)
    size = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert memory_worker.tensor_bytes(model, optimizer) == size


def test_a_case_that_fails_is_told_with_its_reason():
    with pytest.raises(ValueError, match=r"the process failed: (.|\n)*KeyError"):
        memory.measured(Case("no model", "lora", False, 1, 8, "float32"), {})
