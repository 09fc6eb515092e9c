"""In each of two processes: the memory of a step under fully_shard, beside predict_memory's.

Prints the bytes of parameters and moments, and by how much allocations grow at most in a step.
"""

import gc
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.gloo import leave

SIZES = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 4, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
BATCH, LENGTH = 1, 64


def local_bytes(tensors) -> int:
    """What this process has of them."""
    own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.untyped_storage().nbytes() for t in own)


def highest(trace: str) -> int:
    """By how much allocations grow at most in the profiler's trace, without gloo's own copies.

    Gloo copies what it sends and receives, within its calls and in threads of its own, and frees
    the copies when those come to it; on a GPU no such copies are made.
    """
    events = json.loads(Path(trace).read_text())["traceEvents"]
    spans = [e for e in events if e.get("ph") == "X"]
    (model_thread,) = {e["tid"] for e in spans if e["name"].startswith("FSDP::")}
    calls = [(e["ts"], e["ts"] + e["dur"]) for e in spans if e["name"].startswith("c10d::")]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    copies: set[int] = set()  # by address, while they are there
    now = most = made = 0
    for event in memory:
        size, place = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0 and (
            event["tid"] != model_thread or any(a <= event["ts"] <= b for a, b in calls)
        ):
            copies.add(place)
            made += 1
        elif size < 0 and place in copies:
            copies.remove(place)
        else:
            now += size
            most = max(most, now)
    assert made, "gloo made no copy: the events have other names"
    return most


def main() -> None:
    """One process."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meet = f"file://{os.environ['MEET']}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % SIZES["vocab_size"]

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    gc.collect()
    held = local_bytes([*model.parameters(), *model.buffers()])
    held += local_bytes([t for own in optimizer.state.values() for t in own.values()])
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    if rank == 0:
        trace = f"{os.environ['MEET']}.json"
        profile.export_chrome_trace(trace)
        print("measured", held, highest(trace), flush=True)
    leave()


if __name__ == "__main__":
    main()
