"""Systems of a survey x the three methods, their special steps and their files, measured.

    python -m benchmarks.families             prints the table, writes examples/families/README.md
    python -m benchmarks.families LLaMA MOSS  prints the rows of these

Each model is a small random one of the true architecture: transformers' classes, and the GLM module
of examples/recipes for ChatGLM-6B and VisualGLM.  A cell holds the largest difference that it
measured; 0 is equal in every bit.

    LoRA          two steps; the file in PEFT, and in a model of ours
    QLoRA         NF4 with double quantisation, two steps; the file over another 4-bit model
    P-tuning v2   two steps; the file in another model, and generating with and without a cache
    special step, files: see benchmarks/family_steps.py
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minipeft as mp
from benchmarks import family_steps as steps
from examples.recipes.common import tiny_llama
from examples.recipes.glm import GLM, GLMConfig

PATH = Path(__file__).parent.parent / "examples" / "families" / "README.md"
VOCABULARY, LENGTH = 96, 4
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["query_key_value", "dense"]


def falcon(**settings: Any) -> nn.Module:
    """Falcon of one of its three forms."""
    import transformers

    torch.manual_seed(0)
    return transformers.FalconForCausalLM(transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, initializer_range=0.1, **settings,
    )).eval()  # fmt: skip


def bloom() -> nn.Module:
    """TigerBot's first."""
    import transformers

    torch.manual_seed(0)
    return transformers.BloomForCausalLM(transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, bos_token_id=1,
        eos_token_id=2, initializer_range=0.1,
    )).eval()  # fmt: skip


def codegen() -> nn.Module:
    """MOSS."""
    import transformers

    torch.manual_seed(0)
    return transformers.CodeGenForCausalLM(transformers.CodeGenConfig(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64,
        n_ctx=64, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )).eval()  # fmt: skip


def llama(**sizes: Any) -> nn.Module:
    """LLaMA."""
    return tiny_llama(VOCABULARY, **sizes)


def glm() -> nn.Module:
    """ChatGLM-6B, and what VisualGLM's images go into."""
    torch.manual_seed(0)
    return GLM(GLMConfig(VOCABULARY, initializer_range=0.1)).eval()


def text() -> dict[str, Tensor]:
    """Two texts of nine tokens."""
    return {"input_ids": torch.arange(3, 21).view(2, 9)}


def glm_text() -> dict[str, Tensor]:
    """The same with [GMASK] and <bos>, whose ids are 1 and 2."""
    ids = text()["input_ids"]
    ids[:, 4], ids[:, 5] = 1, 2
    return {"input_ids": ids}


def states() -> dict[str, Tensor]:
    """Vectors in the place of tokens, as of an image."""
    return {"inputs_embeds": torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True)
class System:
    """One row: how its model is built, what its LoRA is on, and what is its own."""

    build: Callable[[], Any]
    targets: list[str]
    rank: int
    alpha: float
    special: tuple[str, steps.Step]
    files: tuple[str, steps.Step]
    inputs: Callable[[], dict[str, Tensor]] = text
    needs_example: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def example(self) -> dict[str, Any]:
        """What attaching a prefix needs to be told."""
        return (
            {"example": {k: v[:1] for k, v in self.inputs().items()}} if self.needs_example else {}
        )


def systems() -> dict[str, System]:
    """The rows, in the survey's order."""
    qv, bin_ = ["q_proj", "v_proj"], ("adapter_model.bin", steps.peft_bin)
    of_falcon = {"targets": FUSED, "rank": 64, "alpha": 16, "files": bin_}
    return {
        "LLaMA, alpaca-lora": System(
            llama, qv, 8, 16, ("Meta's checkpoint, 2 files", steps.meta_checkpoint), bin_),
        "Stanford Alpaca": System(
            llama, qv, 8, 16, ("difference, [PAD] from the mean", steps.delta_with_pad),
            ("difference in pytorch_model.bin", steps.foreign_delta)),
        "Guanaco": System(
            llama, "all-linear", 64, 16, ("4-bit codes stay in training", steps.codes_stay), bin_),
        "Vicuna": System(
            llama, qv, 8, 16, ("float16 difference", steps.delta_float16),
            ("difference in pytorch_model.bin", steps.foreign_delta_float16)),
        "Chinese-LLaMA-Alpaca": System(
            llama, [*QKVO, "gate_proj", "down_proj", "up_proj"], 8, 32,
            ("longer tables, two adapters in order", steps.in_order), bin_),
        "Chinese-Vicuna": System(
            llama, qv, 8, 16, ("ChatGLM's q, k, v apart", steps.slices("glm")),
            ("loralib's MergedLinear", steps.merged_linear)),
        "Luotuo": System(llama, qv, 8, 16, ("trains on from its file", steps.trains_on), bin_),
        "Falcon-7B": System(lambda: falcon(multi_query=True), **of_falcon,
                            special=("q, k, v apart", steps.slices("falcon-7b"))),
        "Falcon-40B": System(
            lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), **of_falcon,
            special=("q, k, v apart", steps.slices("falcon-40b"))),
        "Falcon-RW": System(
            lambda: falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
            **of_falcon, special=("q, k, v apart", steps.slices("falcon-rw"))),
        "OpenBuddy-Falcon": System(
            lambda: falcon(multi_query=True), **of_falcon,
            special=("longer tied table", steps.longer_tied)),
        "ChatGLM-6B": System(
            glm, FUSED, 8, 32, ("float32 prefix over NF4", steps.prefix_over_nf4),
            ("its prefix in pytorch_model.bin", steps.chatglm_prefix), glm_text,
            needs_example=True),
        "VisualGLM": System(
            glm, FUSED, 10, 1, ("q, k, v apart", steps.slices("glm")),
            ("SwissArmyTransformer's .pt", steps.sat),
            lambda: {**glm_text(), **states()}, needs_example=True),
        "MOSS": System(codegen, ["qkv_proj", "out_proj"], 8, 16,
                       ("q, v, k of 4 blocks apart", steps.slices("moss")), bin_),
        "Aquila": System(llama, qv, 16, 32, ("attention by Meta's arithmetic", steps.rotary_rows),
                         ("FlagAI's adapter", steps.flagai)),
        "PandaGPT": System(llama, QKVO, 32, 32, ("llama_proj trains whole", steps.projection),
                           ("its pytorch_model.pt", steps.pandagpt), states),
        "TigerBot, BLOOM": System(bloom, FUSED, 64, 16, ("q, k, v apart", steps.slices("bloom")),
                                  bin_),
        "TigerBot, LLaMA-2": System(lambda: llama(num_key_value_heads=2), "all-linear", 64, 16,
                                    ("4-bit codes stay in training", steps.codes_stay), bin_),
    }  # fmt: skip


def lora(system: System) -> float:
    """Two steps of LoRA, the file in PEFT and in another model of ours."""
    from peft import PeftModel

    model = system.build()
    mp.inject_lora(model, system.targets, system.rank, system.alpha)
    logits = steps.after_a_step(model, system.inputs())
    with tempfile.TemporaryDirectory() as folder:
        mp.save_peft(model, folder)
        other = system.build()
        mp.load_peft(other, folder)
        theirs = PeftModel.from_pretrained(system.build(), folder).eval()
    return steps.worst(steps.off(other, logits, system.inputs()),
                       steps.off(theirs, logits, system.inputs()))  # fmt: skip


def qlora(system: System) -> float:
    """Two steps of LoRA over 4-bit weights, and the file over the same weights of another model."""
    model, other = system.build(), system.build()
    mp.inject_qlora(model, system.targets, system.rank, system.alpha)
    logits = steps.after_a_step(model, system.inputs())
    with tempfile.TemporaryDirectory() as folder:
        mp.save_peft(model, folder)
        mp.quantize_model(other)
        mp.load_peft(other, folder)
    return steps.off(other, logits, system.inputs())


def prefix(system: System) -> float:
    """Two steps of P-tuning v2, its file, and what is generated with and without a cache."""
    model, other = system.build(), system.build()
    mp.attach_prefix(model, LENGTH, **system.example())
    logits = steps.after_a_step(model, system.inputs(), lr=0.5)
    with tempfile.TemporaryDirectory() as folder:
        mp.save_prefix(model, folder)
        mp.load_prefix(other, folder, **system.example())
    return steps.worst(steps.off(other, logits, system.inputs()),
                       steps.cache_off(model, system.inputs()))  # fmt: skip


CELLS = {
    "LoRA": lora, "QLoRA": qlora, "P-tuning v2": prefix,
    "special step": lambda system: system.special[1](system),
    "files": lambda system: system.files[1](system),
}  # fmt: skip


def measured(name: str, cell: str) -> float:
    """One cell, without the warnings that these sizes bring: ranks above them, weak trials."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return CELLS[cell](systems()[name])


def shown(value: float) -> str:
    """0, or the number with two digits."""
    return f"{value:.1e}" if value else "0"


def row(name: str) -> str:
    """A line of the table; what the last two cells are stands before their figures."""
    system, values = systems()[name], [shown(measured(name, cell)) for cell in CELLS]
    values[3], values[4] = f"{system.special[0]}: {values[3]}", f"{system.files[0]}: {values[4]}"
    return f"| {name} | {' | '.join(values)} |"


HEAD = f"| system | {' | '.join(CELLS)} |\n|---|---:|---:|---:|---|---|"
PAGE = """# Systems of the survey

How far results are from what they must equal: the largest difference of logits (special steps and
files: of logits or weights) that `python -m benchmarks.families` measured on small random models of
the true architectures, in float32, with transformers {transformers} and PEFT {peft}. 0 is equal in
every bit; other numbers are sums in another order.

{table}

LoRA: two steps, then the file in PEFT and in another model of ours. QLoRA: NF4 with double
quantisation, two steps, the file over another 4-bit model. P-tuning v2: two steps, the file in
another model, and the logits of
generated tokens with and without a cache. ChatGLM-6B and VisualGLM are the module of
[glm.py](../recipes/glm.py), MOSS is transformers' CodeGen; transformers 5 runs neither's own code.
[Recipes](../recipes) train each system as its authors do, in less than a minute; the test of this
table is [test_families.py](../../tests/benchmarks/test_families.py).
"""


def main() -> int:
    """Print the rows; write the page where all were measured."""
    import peft
    import transformers

    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of systems' names; default: all")
    parser.add_argument("--output", type=Path, default=PATH)
    arguments = parser.parse_args()
    chosen = [name for name in systems()
              if not arguments.names or name.startswith(tuple(arguments.names))]  # fmt: skip
    print(HEAD)
    rows = []
    for name in chosen:
        rows.append(row(name))
        print(rows[-1], flush=True)
    if not arguments.names:
        versions = {"transformers": transformers.__version__, "peft": peft.__version__}
        arguments.output.write_text(PAGE.format(table="\n".join([HEAD, *rows]), **versions))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
