"""What a product costs before its kernel starts, in calls of nn.Linear; launches are left out."""

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch

import minipeft as mp
from minipeft import ops
from minipeft.fast.backend import tried_first


def _seconds(run: Callable[[], Any], calls: int = 400, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def host_work() -> dict[str, float]:
    """Seconds of nn.Linear(8, 8), and of one row through NF4Linear, its operator and its function.

    On the CPU: everything between the call and the launch of the Triton kernel.
    """
    from minipeft_kernels.triton import product

    row = ops.Implementation(
        "nf4_linear", "triton", lambda *_: True, "minipeft_kernels.triton.product", "linear"
    )
    dense, layer = (torch.nn.Linear(size, size, bias=False) for size in (8, 256))
    layer = mp.NF4Linear.from_linear(layer.bfloat16())
    small, x, weight = torch.randn(1, 8), torch.randn(1, 256).bfloat16(), layer.state()
    operator = torch.ops.minipeft.nf4_linear
    stubs = {
        "launch": lambda *_: None,
        "on": lambda *_: nullcontext(),
        "card_of": lambda _: "staged",
    }
    with ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(product, name, stub))
        stack.enter_context(tried_first(row))
        stack.enter_context(torch.no_grad())
        found = {
            "nn.Linear": _seconds(lambda: dense(small)),
            "NF4Linear": _seconds(lambda: layer(x)),
            "operator": _seconds(lambda: operator(x, *weight, None, 256)),
            "function": _seconds(lambda: product.product(x, weight, None, 256)),
        }
    unit = found["nn.Linear"]
    print("host work before a launch, in calls of nn.Linear: " + ", ".join(
        f"{name} {value / unit:.1f}" for name, value in found.items() if name != "nn.Linear"
    ), flush=True)  # fmt: skip
    return found
