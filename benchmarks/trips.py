"""How often whole-model calls change files: `python -m benchmarks.trips`.

A stay is a run of calls within one file of minipeft/; a return is a stay in a file that was visited
before.  Few of both means that a reader who follows the call turns few pages.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import minipeft
from benchmarks.output import add_output, keep

ROOT = f"{Path(minipeft.__file__).parent}/"


class Block(nn.Module):
    """The linear layers of a LLaMA block."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            self.add_module(name, nn.Linear(width, width, bias=False))


class Tiny(nn.Module):
    """Two of them between a table and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(96, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(64, 96, bias=False)


def stays(call: Callable[[], object], *, once: bool = False) -> list[str]:
    """The files of minipeft/ in the order in which `call` calls functions in them.

    `once`: a call of one function by another counts the first time only, as a reader follows it.
    """
    found: list[str] = []
    followed: set[tuple[CodeType | None, CodeType]] = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(ROOT):
            return
        edge = (frame.f_back and frame.f_back.f_code, frame.f_code)
        if once and edge in followed:
            return
        followed.add(edge)
        if found[-1:] != [file[len(ROOT) :]]:
            found.append(file[len(ROOT) :])

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def report(name: str, make: Callable[[], Callable[[], object]]) -> dict[str, Any]:
    """Print stays and returns of one call, and its files in the order of their first visits."""
    make()()  # imports and tables are made once, and count in neither
    counted: dict[str, Any] = {}
    for once in (False, True):
        found = stays(make(), once=once)
        files = dict.fromkeys(found)
        how = "each call followed once" if once else "all calls"
        counted[how] = {"stays": len(found), "returns": len(found) - len(files)}
        print(f"{name}, {how}: {len(found)} stays, {len(found) - len(files)} returns")
    print(f"  {len(files)} files: {' '.join(files)}")
    return {**counted, "files": list(files)}


def qlora() -> Callable[[], object]:
    """One `inject_qlora` on two blocks."""
    model = Tiny()
    return lambda: minipeft.inject_qlora(model, ["q_proj", "v_proj"], 4, head="lm_head")


def prefix() -> Callable[[], object]:
    """One `attach_prefix` on a LLaMA of transformers with random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return lambda: minipeft.attach_prefix(model, 3)


def main() -> None:
    """Both calls, each on a model of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_output(parser)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    makers = {"inject_qlora": qlora, "attach_prefix": prefix}
    keep(arguments, "trips", calls={name: report(name, make) for name, make in makers.items()})


if __name__ == "__main__":
    main()
