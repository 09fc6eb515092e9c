"""The memory of one training step, measured: `python -m benchmarks.memory_worker CASE.json`.

A small model of the same kind takes two steps first, so that imports, compiled kernels and
libraries are loaded.  Then the model is built and takes one step, which makes the moments; the
second step is measured, by what the operating system says.  A third runs under
torch's profiler, which sees every allocation of PyTorch's CPU allocator.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import minipeft as mp
from benchmarks.memory_cases import MODELS, Case
from benchmarks.models import enable_checkpointing
from minipeft.measure.memory import resident_bytes


def anonymous_peak_starts() -> None:
    """The high-water mark of resident memory starts again from now (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def anonymous_peak() -> int:
    """The highest anonymous memory since then.

    The mark counts pages of files too; those are code, and after the warm-up they do not change.
    """
    return resident_bytes("VmHWM") - resident_bytes("RssFile") - resident_bytes("RssShmem")


def prepared(model: Any, case: Case) -> Any:
    """The model, in the state that the method trains."""
    if case.checkpointing:
        enable_checkpointing(model)
    if case.method == "full":
        model.requires_grad_(True)
    elif case.method == "prefix":
        mp.attach_prefix(model, 16, position="none")
    else:
        inject = mp.inject_qlora if case.method.startswith("q") else mp.inject_lora
        inject(model, "all-linear", 16, dora=case.method.endswith("dora"))
    return model.train()


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    """Forward, backward, update."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def tensor_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the storages that the model and the optimiser hold, each once."""
    moments = [t for own in optimizer.state.values() for t in own.values()]
    tensors = [*model.parameters(), *model.buffers(), *moments]
    storages = {s.data_ptr(): s for t in tensors if (s := t.untyped_storage()).nbytes()}
    return sum(storage.nbytes() for storage in storages.values())


def allocated_peak(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> int:
    """By how much PyTorch's allocations grow at most in one step, from the profiler's record."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(model, optimizer, ids)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest


def measure(case: Case) -> dict[str, int]:
    """Bytes of one case."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    small = prepared(MODELS["tiny"].build(dtype), case)
    optimizer = optimizer_of(small)
    for _ in range(2):
        step(small, optimizer, torch.zeros(case.batch, case.length, dtype=torch.long))
    del small, optimizer
    gc.collect()
    imports = resident_bytes("RssAnon")
    model = prepared(MODELS[case.model].build(dtype), case)
    optimizer = optimizer_of(model)
    ids = torch.randint(0, 256, (case.batch, case.length))
    step(model, optimizer, ids)
    anonymous_peak_starts()
    between = resident_bytes("RssAnon") - imports
    step(model, optimizer, ids)
    peak = anonymous_peak() - imports
    held = tensor_bytes(model, optimizer)
    return {
        "imports": imports, "held": held, "held_anonymous": between,
        "peak_tensors": held + allocated_peak(model, optimizer, ids), "peak_anonymous": peak,
    }  # fmt: skip


if __name__ == "__main__":
    print("result", json.dumps(measure(Case(**json.loads(Path(sys.argv[1]).read_text())))))
