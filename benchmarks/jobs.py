"""The jobs that `python -m benchmarks` runs: what each one asks, and how long it takes.

`minutes` are of two cores with AVX-512.  `quick` are the arguments of a small run, in which FOLDER
stands for a temporary folder; None: the job does not run without what it `needs`.
"""

import json
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
GROUPS = ("exactness", "speed", "memory", "quality")


class Job(NamedTuple):
    """A job: the module with its `main`, and what to say of it."""

    module: str
    group: str
    question: str
    minutes: float
    quick: tuple[str, ...] | None = ()
    needs: str = ""


JOBS: dict[str, Job] = {
    "nf4_sweep": Job("nf4_sweep", "exactness", "is NF4 bitsandbytes' and numpy's, bit by bit?", 1,
                     ("--cases", "50")),
    "nf4_grid": Job("nf4_grid", "exactness", "the same over 40 shapes, dtypes and block sizes", 2,
                    ("--shapes", "12")),
    "lora_table": Job("lora_table", "exactness", "is every adapter layer float64's and PEFT's?", 1),
    "checkpoint_families": Job(
        "checkpoint_families", "exactness", "4-bit files of 88 families in four directions", 8,
        ("--families", "LLaMA", "GPT-2", "Mixtral"),
    ),
    "families": Job("families", "exactness", "systems of the survey x methods, steps, files", 1,
                    ("LLaMA",)),
    "prefix_matrix": Job("prefix_matrix", "exactness", "a prefix in 28 architectures x 16 uses", 3,
                         ("--families", "LLaMA")),
    "prefix_classes": Job("prefix_classes", "exactness", "which classes of transformers take one?",
                          15, ("LlamaForCausalLM", "BertModel", "T5ForConditionalGeneration")),
    "tuple_caches": Job("tuple_caches", "exactness", "prefixes on ChatGLM's and MOSS's own code", 1,
                        None, "a folder with their published files"),
    "saves": Job("saves", "exactness", "is anything lost where a save dies?", 3,
                 ("--kills", "3", "--calls", "20", "--seconds", "1", "--print-only")),
    "resume": Job("resume", "exactness", "does training go on in every bit, and after a kill?", 1,
                  ("--methods", "LoRA", "--kills", "2")),
    "sharded": Job("sharded", "exactness", "functions on shards and in DDP: right or refused?", 10,
                   ("--methods", "LoRA", "--processes", "2")),
    "methods": Job("compare", "speed", "every method beside PEFT: memory, time, loss", 11,
                   ("--model", "llama", "--steps", "2", "--rounds", "1", "--length", "16",
                    "--methods", "lora", "peft-lora", "qlora", "ptuning")),
    "cpu": Job("cpu", "speed", "4-bit layers on a CPU, beside bitsandbytes and dense ones", 15,
               ("--parts", "decode", "product", "--threads", "1", "--rounds", "2")),
    "gpu": Job("gpu", "speed", "the same on a GPU, with Triton; floors without one", 10,
               ("--parts", "gate")),
    "kernels": Job("kernels", "speed", "Triton beside PyTorch, on a GPU", 1, ("--rounds", "3")),
    "lora_speed": Job("lora_speed", "speed", "LoRA, DoRA and mixed batches, beside PEFT", 2,
                      ("--rounds", "2")),
    "rows_training": Job("rows_training", "speed", "eight adapters in one pass, and in eight", 10,
                         ("--rounds", "2", "--threads", "1", "--tokens", "16", "--shapes",
                          "4096x4096", "--no-memory")),
    "prefix_attention": Job("prefix_attention", "speed", "two attentions merged, or keys joined", 2,
                            ("--rounds", "7", "--longest", "128")),
    "import_time": Job("import_time", "speed", "what an import costs, beside import torch", 1,
                       ("--rounds", "3")),
    "trips": Job("trips", "speed", "files that one call enters, and how often it comes back", 0.2),
    "memory": Job("memory", "memory", "predicted memory beside measured; which LLaMA fits", 20,
                  ("--models", "tiny", "--methods", "qlora", "--no-table")),
    "own_model": Job("own_model", "memory", "a GPT of one's own: mp.benchmark beside `methods`", 3,
                     ("--methods", "lora")),
    "nf4_memory": Job("nf4_memory", "memory", "memory while weights are quantised; a LLaMA-7B", 3,
                      ("--layers", "1")),
    "larger_than_memory": Job(
        "larger_than_memory", "memory", "a step of models that memory does not hold", 30,
        ("--case", "tiny", "--folder", "FOLDER"),
    ),
    "attach_cost": Job("attach_cost", "memory", "seconds and memory of attaching a prefix", 2,
                       ("--shapes", "SmolLM2-135M")),
    "checkpoint": Job("checkpoint", "memory", "3 GB made 4-bit, killed, resumed", 5,
                      ("--gigabytes", "0.2")),
    "delta": Job("delta", "memory", "a 3 GB checkpoint as a delta, and back", 6,
                 ("--gigabytes", "0.2")),
    "data_types": Job("data_types", "quality", "NF4, FP4, integers: errors and perplexity", 10,
                      ("--no-perplexity",)),
    "inits": Job("inits", "quality", "where LoRA starts over a 4-bit base", 15,
                 ("--inits", "default", "PiSSA", "--steps", "2", "--validation-rows", "2")),
    "prompts": Job("prompts", "quality", "prefixes and prompts on SmolLM2", 15,
                   ("--methods", "prefix", "--steps", "2", "--validation-rows", "2")),
    "ner": Job("ner", "quality", "named entities: P-tuning v2, LoRA, full fine-tuning", 45,
               ("--quick", "--train-sentences", "50", "--held-out-sentences", "30",
                "--methods", "frozen", "LoRA", "--threads", "1")),
    "claims": Job("claims", "quality", "what the papers claim of each method: does it hold?", 90,
                  ("--quick",)),
    "vocabulary": Job("vocabulary", "quality", "200 Chinese pieces for SmolLM2", 4,
                      ("--pieces", "100", "--steps", "8", "--validate", "2")),
    "cartridge": Job("cartridge", "quality", "a page of 550 tokens in a prefix of 64 positions", 15,
                     ("--each", "1", "--length", "24", "--questions", "2", "--steps", "8")),
    "recipes": Job("recipes", "quality", "every recipe: seconds and losses", 5,
                   ("--names", "alpaca", "falcon")),
}  # fmt: skip


def last_result(name: str) -> str:
    """The newest result file of a job, and its date; "-" where there is none."""
    found = sorted(RESULTS.glob(f"{name}-2*.json"))
    if not found:
        return "-"
    when = json.loads(found[-1].read_text()).get("when", "")
    return f"{found[-1].name} ({when[:10]})" if when else found[-1].name


def markdown() -> str:
    """The jobs as the table of benchmarks/README.md."""
    rows = ["| group | job | what it asks | minutes |", "|---|---|---|---:|"]
    for group in GROUPS:
        jobs = ((name, job) for name, job in JOBS.items() if job.group == group)
        rows += [f"| {group} | `{name}` | {job.question} | {job.minutes:g} |" for name, job in jobs]
    return "\n".join(rows) + "\n"
