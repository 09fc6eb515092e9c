"""What attaching costs: `python -m benchmarks.attach_cost`.

Seconds, forwards, tokens and peak memory of attach_prefix and attach_prompt on models of real
shapes with random weights: SmolLM2-135M, one of 1.2 B, and one with Mistral's window of 4,096.  To
compare two checkouts, run it in each.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import add_output, keep
from minipeft.measure.machine import allocator_environment

SIZES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "1.2 B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "window 4096": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000,
        "sliding_window": 4096, "max_position_embeddings": 32768,
    },
}  # fmt: skip


def measure(shape: str, function: str) -> dict[str, Any]:
    """The figures of one model in this process; `peak` in MB above the model's own."""
    import transformers

    import minipeft as mp

    kind = "Mistral" if "sliding_window" in SIZES[shape] else "Llama"
    config = getattr(transformers, f"{kind}Config")(**SIZES[shape])
    dtype = torch.bfloat16 if shape == "1.2 B" else torch.float32
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.device("meta"):
        model: Any = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for name, buffer in model.named_buffers():
            if "inv_freq" in name:  # as rotary embedding has it, without its values on meta
                buffer.copy_(10000 ** -torch.linspace(0, 1, len(buffer)))
    tokens: list[int] = []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: tokens.append(
            (kwargs["input_ids"] if kwargs.get("input_ids") is not None
             else kwargs["inputs_embeds"]).shape[:2].numel()
        ), with_kwargs=True,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    getattr(mp, function)(model, 16)
    seconds = time.perf_counter() - begun
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "forwards": len(tokens), "tokens": sum(tokens), "peak": peak}


def main() -> int:
    """Each model and function in a process of its own: a line each, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "FUNCTION"), help=argparse.SUPPRESS)
    parser.add_argument("--shapes", nargs="+", choices=list(SIZES), default=list(SIZES))
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return 0
    cases = []
    for shape in arguments.shapes:
        for function in ("attach_prefix", "attach_prompt"):
            command = [sys.executable, "-m", "benchmarks.attach_cost", "--one", shape, function]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                                  cwd=Path(__file__).parent.parent,
                                  env={**os.environ, **allocator_environment()})  # fmt: skip
            found = json.loads(done.stdout.strip().splitlines()[-1])
            cases.append({"shape": shape, "function": function, **found})
            print(f"{shape:14} {function:14} {found['seconds']:6.2f} s, {found['forwards']} "
                  f"forwards over {found['tokens']} tokens, {found['peak']:.0f} MB above the "
                  "model's peak", flush=True)  # fmt: skip
    keep(arguments, "attach_cost", allocator=allocator_environment(), cases=cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
