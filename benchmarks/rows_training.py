"""Adapters trained in one pass, beside passes of their own: `python -m benchmarks.rows_training`.

A projection of LLaMA-7B in 4 bits with LoRA of rank 16 for each of eight adapters, forward and
backward, to the input too:

    one pass       use_adapters(rows=[...]): the batch has the rows of all adapters
    eight passes   a layer of its own for each adapter, over the same 4-bit weight
    base           the same without LoRA: what sharing the frozen product alone gives

All take turns, so that a noisy machine slows all alike.  Gradients are compared before anything is
timed.  Peak memory is that of a process of its own, above what it holds before the first step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minipeft as mp
from benchmarks.output import save_result
from minipeft.adapters.state import named_tensors
from minipeft.measure.machine import hardware
from minipeft.measure.memory import PeakMemory

RANK = 16
ALLOWED = 1e-6  # of the largest number of a gradient; float32, other heights of matrices
SHAPES = {"4096x4096": (4096, 4096), "11008x4096": (11008, 4096)}  # (out, in)
Run = Callable[[], Any]


class Case:
    """One layer with several adapters, their inputs, and both ways to train them."""

    def __init__(self, shape: tuple[int, int], adapters: int, tokens: int) -> None:
        torch.manual_seed(0)
        outs, ins = shape
        self.base = mp.NF4Linear.from_linear(nn.Linear(ins, outs, bias=False))
        self.names = [f"a{i}" for i in range(adapters)]
        self.model, self.singles = nn.Sequential(self.base), []
        for name in self.names:
            mp.inject_lora(self.model, ["0"], RANK, name=name)
            single = mp.LoRALinear(self.base, RANK)
            with torch.no_grad():
                single.lora_b.normal_(std=0.02)
                for key, mine in named_tensors("", self.model, name)[0].items():
                    mine.copy_(getattr(single, key.rpartition(".")[2]))
            self.singles.append(single)
        mp.use_adapters(self.model.train(), rows=self.names)
        self.x = torch.randn(adapters, tokens, ins, requires_grad=True)
        self.parts = [part.detach().requires_grad_() for part in self.x.split(1)]
        self.grad = torch.randn(adapters, tokens, outs) / outs

    def one_pass(self) -> None:
        """All adapters at once."""
        self.model(self.x).backward(self.grad)

    def passes(self) -> None:
        """One adapter after the other."""
        for single, part, grad in zip(self.singles, self.parts, self.grad, strict=True):
            single(part).backward(grad[None])

    def base_once(self) -> None:
        """The frozen layer over all rows."""
        self.base(self.x).backward(self.grad)

    def base_each(self) -> None:
        """The frozen layer over each adapter's rows."""
        for part, grad in zip(self.parts, self.grad, strict=True):
            self.base(part).backward(grad[None])

    def forget(self) -> None:
        """Drop all gradients."""
        leaves = [*self.parts, self.x, *mp.adapter_parameters(self.model)]
        for leaf in leaves + [p for own in self.singles for p in own.parameters()]:
            leaf.grad = None

    def difference(self) -> float:
        """The largest between gradients of both ways, relative to each gradient's largest."""
        self.forget()
        self.one_pass()
        self.passes()
        pairs: list[tuple[Any, Any]] = [
            (self.x.grad[i : i + 1], part.grad)  # type: ignore[index]
            for i, part in enumerate(self.parts)
        ]
        for name, single in zip(self.names, self.singles, strict=True):
            for key, mine in named_tensors("", self.model, name)[0].items():
                pairs.append((mine.grad, getattr(single, key.rpartition(".")[2]).grad))
        self.forget()
        return max(relative(a, b) for a, b in pairs)


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def in_turn(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round; gradients are dropped between steps, untimed."""
    runs: dict[str, Run] = {
        "one pass": case.one_pass, "passes": case.passes,
        "base, one pass": case.base_once, "base, passes": case.base_each,
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            case.forget()
            start = time.perf_counter()
            run()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return times


def peak_of(arguments: argparse.Namespace, shape: str, tokens: int, way: str) -> int:
    """Bytes at the highest of a step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.rows_training", "--peak", way,
               "--shapes", shape, "--tokens", str(tokens),
               "--adapters", str(arguments.adapters)]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> int:
    """Print a line for each case; returns 1 where gradients differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64], help="of each adapter")
    parser.add_argument("--shapes", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, default=None, help="a folder for the figures")
    parser.add_argument("--peak", choices=["one pass", "passes"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        torch.set_num_threads(1)
        case = Case(SHAPES[arguments.shapes[0]], arguments.adapters, arguments.tokens[0])
        run = case.one_pass if arguments.peak == "one pass" else case.passes
        peak = PeakMemory(torch.device("cpu"))
        for _ in range(2):
            run()
            case.forget()
        print(json.dumps(peak.figures()["peak_bytes"]))
        return 0
    machine = hardware()
    print(f"{machine['processor']} ({machine['cpu_capability']}), {arguments.adapters} adapters of "
          f"rank {RANK} over NF4; backend {mp.backend()['nf4_linear']}")  # fmt: skip
    cells, failed = [], False
    for shape in arguments.shapes:
        for tokens in arguments.tokens:
            case = Case(SHAPES[shape], arguments.adapters, tokens)
            cell: dict[str, Any] = {"shape": shape, "tokens": tokens}
            cell["difference"] = case.difference()
            failed |= not cell["difference"] <= ALLOWED
            cell["times"] = {}
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                times = cell["times"][threads] = in_turn(case, arguments.rounds)
                ratio, base = ([a / b for a, b in zip(times[one], times[each], strict=True)]
                               for one, each in (("one pass", "passes"),
                                                 ("base, one pass", "base, passes")))  # fmt: skip
                milliseconds = statistics.median(times["one pass"]) * 1e3
                print(f"{shape}, {tokens} tokens each, {threads} threads: {milliseconds:.0f} ms, "
                      f"{spread(ratio)} of {arguments.adapters} passes; base alone "
                      f"{spread(base)}", flush=True)  # fmt: skip
            del case
            text = f"gradients differ by {cell['difference']:.1e} (at most {ALLOWED:.0e})"
            if arguments.memory:
                cell["peak_bytes"] = {
                    way: peak_of(arguments, shape, tokens, way) for way in ("one pass", "passes")
                }
                one, each = (value / 2**20 for value in cell["peak_bytes"].values())
                text += f"; peak {one:.0f} MiB in one pass, {each:.0f} in passes"
            print(f"    {text}", flush=True)
            cells.append(cell)
    if arguments.output is not None:
        options = {"rounds": arguments.rounds, "adapters": arguments.adapters, "rank": RANK}
        save_result(arguments.output, "rows_training", options=options, cases=cells)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
