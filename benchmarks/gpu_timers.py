"""Times of calls on a GPU: in a CUDA graph and from Python, over weights that no cache holds."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
COLD_BYTES = 160 * 2**20  # of weights taken in turn: three times the L2 cache of an H100


def copies_for(nbytes: int) -> int:
    """How many weights of this size take turns."""
    return max(2, -(-COLD_BYTES // max(1, nbytes)))


def seconds(run: Call, repeats: int = 1) -> float:
    """Seconds of one call, by CUDA events around `repeats` of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def eager_seconds(calls: Sequence[Call], rounds: int = 5) -> float:
    """Seconds of a call from Python, the median over rounds in which each is made once."""

    def once() -> None:
        for call in calls:
            call()

    once()
    return median(seconds(once) for _ in range(rounds)) / len(calls)


def graph_seconds(calls: Sequence[Call], rounds: int = 7, least: int = 16) -> float:
    """Seconds of a call within a CUDA graph of all of them, repeated to at least `least` calls."""
    turns = -(-least // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in calls:
                call()
    graph.replay()
    best = median(seconds(graph.replay) for _ in range(rounds))
    del graph
    return best / (turns * len(calls))


def measured_bandwidth() -> float:
    """Bytes a second of a large copy on the device, reading and writing counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / median(seconds(lambda: target.copy_(source)) for _ in range(9))


def measured_rate(size: int = 8192) -> float:
    """Operations a second of a large bfloat16 product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / median(seconds(lambda: a @ b) for _ in range(9))
