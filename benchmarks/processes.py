"""One function in several processes that talk by torch.distributed's gloo, within a time limit."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Outcome(NamedTuple):
    """What one process returned, or the class and the words of its error, and whose code raised."""

    value: Any = None
    error: str = ""
    text: str = ""
    raised_in: str = ""  # the file


def together(
    world: int, work: Callable[..., Any], *arguments: Any, seconds: float = 300
) -> list[Outcome]:
    """work(rank, world, *arguments) in each of `world` processes; what became of each, by rank.

    `work` must be importable by its name.  A process that ends without a word (os._exit, a signal)
    has the error "gone".

    Raises:
        TimeoutError: a process runs longer than `seconds`; all are ended then.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(rank, world, folder, seconds, work, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds
        try:
            for rank, process in enumerate(processes):
                process.join(max(0.0, deadline - time.monotonic()))
                if process.is_alive():
                    raise TimeoutError(f"process {rank} of {world} ran longer than {seconds:.0f} s")
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        found = []
        for rank in range(world):
            path = Path(folder) / f"{rank}.pt"
            there = path.exists()
            found.append(torch.load(path, weights_only=False) if there else Outcome(error="gone"))
        return found


def _child(
    rank: int, world: int, folder: str, seconds: float, work: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    try:
        outcome = Outcome(work(rank, world, *arguments))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        outcome = Outcome(None, type(error).__name__, str(error), where)
    temporary = Path(folder) / f"{rank}.tmp"
    torch.save(outcome, temporary)
    temporary.rename(Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
