"""Memory that NF4 needs: `python -m benchmarks.nf4_memory`.

Quantising weights of 16 MiB and 1 GiB: the highest memory beside the weight, each in a process of
its own.  A LLaMA-7B-shaped model, built on the meta device and filled with random codes: bits per
parameter counted from the tensors, resident memory, one forward pass.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import minipeft as mp
from benchmarks.output import add_output, keep
from minipeft.measure.machine import allocator_environment
from minipeft.measure.memory import PeakMemory, resident_bytes

MIB = 2**20
SHAPES = {"16 MiB": (2048, 4096), "1 GiB": (32768, 16384)}


def quantising(shape: tuple[int, int], double_quant: bool) -> dict[str, float]:
    """MiB beside a bfloat16 weight of this shape: the peak, and the result."""
    mp.quantize_nf4(torch.randn(64, 64))  # what the first call makes, once for a process
    w = torch.empty(shape, dtype=torch.bfloat16)
    for rows in w.split(64):
        rows.normal_()
    peak = PeakMemory(torch.device("cpu"))
    packed, absmax = mp.quantize_nf4(w)
    result = [packed, absmax, *(mp.quantize_absmax(absmax) if double_quant else ())]
    highest = peak.figures()["peak_bytes"]
    return {
        "weight": w.nbytes / MIB, "result": sum(t.nbytes for t in result) / MIB,
        "peak": highest / MIB,
    }  # fmt: skip


def fill_with_random_codes(layer: mp.NF4Linear) -> None:
    """Codes of no weight at all, and scales that keep products finite."""
    for name, stored in layer.packed_parameters().items():
        if name in ("absmax_scale", "absmax_offset"):
            value = 0.01 if name == "absmax_scale" else 0.02
            stored.data.view(torch.float32).fill_(value)
        else:
            torch.randint(0, 256, stored.shape, dtype=torch.uint8, out=stored.data)


def llama_7b(layers: int) -> dict[str, float]:
    """LLaMA-7B's shape from the meta device to a first forward pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from minipeft.io.bitsandbytes.buffers import restore_buffers

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, vocab_size=32000, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    before = resident_bytes("VmRSS")

    def empty(linear: nn.Module) -> nn.Module:
        layer = mp.NF4Linear(
            linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16
        )
        fill_with_random_codes(layer)
        return layer

    mp.inject(model, "all-linear", empty)
    buffers = restore_buffers(model, torch.device("cpu"))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            holder, _, own = name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02)
            setattr(model.get_submodule(holder), own, nn.Parameter(value, requires_grad=False))
    for name, value in buffers.items():
        holder, _, own = name.rpartition(".")
        setattr(model.get_submodule(holder), own, value)
    resident = resident_bytes("VmRSS") - before
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    if not bool(logits.isfinite().all()):
        raise RuntimeError("the forward pass of random codes is not finite")
    print(mp.memory_report(model))
    counted = mp.count_parameters(model)
    return {
        "bits per quantised weight": mp.memory_report(model).packed.bits,
        "weights of the tensors, MiB": counted.bytes / MIB,
        "resident, MiB": resident / MIB,
        "resident after a forward pass of 8 tokens, MiB":
            (resident_bytes("VmRSS") - before) / MIB,
        "parameters": counted.total,
    }  # fmt: skip


def main() -> int:
    """Run every case in a process of its own and write it; exit status 1 if a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", help="one case, in this process")
    parser.add_argument("--layers", type=int, default=32, help="of the LLaMA (6.7 GB at 32)")
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.case:
        name, _, how = arguments.case.partition(",")
        if name == "llama":
            print(json.dumps(llama_7b(arguments.layers)))
        else:
            print(json.dumps(quantising(SHAPES[name], how == "8-bit scales")))
        return 0
    broken, cases = False, {}
    for case in [*(f"{n},{how}" for n in SHAPES for how in ("float32 scales", "8-bit scales")),
                 "llama"]:  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.nf4_memory", "--case", case,
                   "--layers", str(arguments.layers)]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
            env={**os.environ, **allocator_environment()},
        )  # fmt: skip
        *lines, last = done.stdout.strip().splitlines()
        found = cases[case] = json.loads(last)
        if case == "llama":
            print("LLaMA-7B on random codes", *lines, sep="\n  ")
            print("", *(f"{k}: {v:,.3f}" for k, v in found.items()), sep="\n  ")
            broken |= abs(found["bits per quantised weight"] - 4.127) > 0.001
            continue
        extra = found["peak"] - found["result"]
        print(
            f"quantise {case}: weight {found['weight']:.0f} MiB, result {found['result']:.1f}, "
            f"peak beside the weight {found['peak']:.1f}, so {extra:.1f} beside the result"
        )
        broken |= extra > 64
    keep(arguments, "nf4_memory", layers=arguments.layers, allocator=allocator_environment(),
         cases=cases)  # fmt: skip
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
