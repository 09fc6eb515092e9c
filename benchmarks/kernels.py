"""Kernels beside the PyTorch implementation on a GPU: `python -m benchmarks.kernels`.

A gate comes first: every bit of the decoded weight must be equal.  Times are medians over rounds
in which both take turns, with their spread; bytes are the packed state read and the weight written.
"""

import argparse
import sys
from statistics import median
from typing import Any

import torch

import minipeft as mp
from benchmarks.output import add_output, keep
from minipeft.ops import Packed

SHAPES = ((4096, 4096), (11008, 4096), (4097, 4099))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def seconds(run: object, repeats: int = 20) -> float:
    """Seconds of one call, by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()  # type: ignore[operator]
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def main() -> int:
    """Check, time, print a line for each shape and dtype, write all; exit status 1: bits differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    add_output(parser)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    if not torch.cuda.is_available():
        print("no CUDA or ROCm device: nothing to time (tests/kernels/test_triton.py needs none)")
        return 0
    print(torch.cuda.get_device_name(), mp.backend("cuda")["dequantize_nf4"])
    cases: list[dict[str, Any]] = []
    for shape in SHAPES:
        w = torch.randn(shape, device="cuda")
        packed, absmax = mp.quantize_nf4(w)
        code, scale, offset = mp.quantize_absmax(absmax)
        weight = Packed(packed, code, 64, scale, offset)
        read = sum(t.nbytes for t in (packed, code, scale, offset))
        for dtype in DTYPES:

            def run(weight=weight, shape=shape, dtype=dtype):
                return torch.ops.minipeft.dequantize_nf4(*weight, list(shape), dtype)

            with mp.use_kernels(False):
                expected = run()
            same = torch.equal(run(), expected)
            times: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(rounds):
                for kernels in (True, False):
                    with mp.use_kernels(kernels):
                        times[kernels].append(seconds(run))
            ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
            rate = (read + expected.nbytes) / median(times[True]) / 1e9
            print(
                f"{shape} {dtype}: equal {same}, {median(times[True]) * 1e6:.0f} us, "
                f"{rate:.0f} GB/s, {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) of "
                "PyTorch's time"
            )
            cases.append({
                "shape": shape, "dtype": str(dtype).removeprefix("torch."), "equal": same,
                "bytes": read + expected.nbytes,
                "seconds": {"kernels": times[True], "PyTorch": times[False]},
            })  # fmt: skip
    keep(arguments, "kernels", rounds=rounds, cases=cases)
    return int(not all(case["equal"] for case in cases))


if __name__ == "__main__":
    sys.exit(main())
