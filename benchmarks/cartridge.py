"""A page distilled into a prefix: `python -m benchmarks cartridge`, fifteen minutes of one core.

Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266) keep a text as a short trained prefix.
SmolLM2-135M has the page in its system message, about 500 tokens; the cartridge has 64 positions,
of which the first does not train.  examples/11_cartridge.py has the loss and the training loop.

    learnt      user turns that the model begins and answers itself with the page in view
    held out    questions that a person wrote, answered by the model with the page in view

The figure is KL(with the page || with the cartridge) of the next token, in nats, over the answers
to held-out questions.  Beside it: no page at all, a cartridge at random, and the keys and values
of the page's first tokens, untrained.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minipeft as mp
from benchmarks.models import load_model, load_tokenizer
from benchmarks.output import save_result

example: Any = importlib.import_module("examples.11_cartridge")

RESULTS = Path(__file__).parent / "results"
PAGE = """\
The Harrow Island ferry: a guide for visitors.

The ferry Marigold leaves the town of Penmarsh for Harrow Island four times a day: at 7:15, 10:40,
14:05 and 18:30. The crossing takes 50 minutes. In winter, from November to February, the 18:30
ferry does not sail. A return ticket costs 14 pounds for adults and 6 pounds for children; dogs
travel free, and a bicycle costs 3 pounds. Tickets are sold in the green hut beside the harbour, and
from the crew on board, who take cash only.

Harrow Island is three miles long and has 212 inhabitants, most of whom live in the village of
Saltby. There is one shop, kept by Mrs Oduya, which opens at eight and closes at noon on Wednesdays.
The shop sells bread from the island's bakery, stamps, maps and rubber boots. The only doctor, Dr
Lindqvist, sees patients above the old school on Mondays and Thursdays; on other days the nurse in
Penmarsh answers the telephone.

The lighthouse on the north cliff was built in 1871 by the engineer Thomas Vane after the wreck of
the grain ship Adelaide. It is 38 metres high, and 163 steps lead to the lamp. Visitors may climb it
on Saturdays between ten and four, for 2 pounds, which pay for the paint. The last keeper, Ruth
Calder, lived there with eleven cats until 1989, when the lamp became automatic. Her diaries are in
the small museum behind the church.

Puffins nest on the west side from April to July. Please keep to the marked path, since their
burrows lie just below the grass, and do not bring drones. Seals rest on Gull Sands at low tide;
stay fifty metres away from them. The beach at Saltby is safe for swimming, but the current at the
south point is strong and has no lifeguard.

Camping is allowed only in the field beside the chapel, at 5 pounds a night for each tent. Fires are
forbidden everywhere on the island since the heath burned in 2006. Water comes from the pump at the
gate. If fog stops the ferry, a bell is rung three times at the harbour, and visitors may sleep in
the village hall free of charge.
"""
# The words that a learnt user turn begins with; the model writes the rest, and the answer.
BEGINNINGS = (
    "What", "When", "Where", "Who", "How", "How many", "Can I", "Is there", "Please summarise",
    "Please list", "Tell me about", "Why", "Which", "I am planning", "Write a short", "Explain",
)  # fmt: skip
QUESTIONS = (
    "When does the last ferry leave in summer?",
    "How much is a return ticket for two adults and one child?",
    "Who was Ruth Calder?",
    "Why was the lighthouse built?",
    "May I light a fire on the beach?",
    "Where can I put up my tent, and what does it cost?",
    "What should I keep in mind when I watch the puffins?",
    "I feel ill on a Thursday. Where do I find a doctor?",
    "What happens to visitors when fog stops the ferry?",
    "Does the shop sell boots, and is it open on Wednesday afternoon?",
    "Is it safe to swim at the south point?",
    "Describe Harrow Island in two sentences.",
)
MESSAGE, END = "<|im_start|>{}\n", "<|im_end|>\n"


def ids_of(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a text as they are, (1, tokens)."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def learnt(model: Any, tokenizer: Any, *, each: int, length: int) -> Tensor:
    """For each of BEGINNINGS `each` user turns with answers, drawn by the model: (rows, positions).

    All have `length` positions, in an order drawn too.
    """
    by_length: dict[int, list[Tensor]] = {}
    for words in BEGINNINGS:
        start = ids_of(tokenizer, MESSAGE.format("user") + words)
        by_length.setdefault(start.shape[1], []).append(start.expand(each, -1))
    rows = torch.cat([example.answers(model, torch.cat(starts), length - n)
                      for n, starts in by_length.items()])  # fmt: skip
    return rows[torch.randperm(len(rows))]


def held_out(
    model: Any, tokenizer: Any, questions: Sequence[str], *, each: int, length: int
) -> list[tuple[Tensor, int]]:
    """Of each question `each` turns with an answer, drawn with the page in view: (1, positions).

    With each the position that predicts the answer's first token.  An answer ends where the model
    ends it, or after `length` tokens.
    """
    end = tokenizer.convert_tokens_to_ids(END.strip())
    found = []
    for question in questions:
        turns = MESSAGE.format("user") + question + END + MESSAGE.format("assistant")
        asked = ids_of(tokenizer, turns)
        first = asked.shape[1]
        for row in example.answers(model, asked.expand(each, -1), length):
            ends = (row[first:] == end).nonzero()
            last = first + int(ends[0]) if len(ends) else len(row) - 1
            found.append((row[None, :last], first - 1))  # the last token predicts nothing
    return found


def without_page(model: Any, row: Tensor, first: int) -> Tensor:
    """How far the model that sees neither page nor cartridge is from the page."""
    mp.use_adapters(model, "text")
    teacher = model(row, use_cache=False).logits[:, first:]
    with mp.disable_adapters(model):
        return example.kl(teacher, model(row, use_cache=False).logits[:, first:])


def mean_divergence(
    model: Any, asked: Sequence[tuple[Tensor, int]], measure: Callable[..., Tensor]
) -> float:
    """In nats a token of the answers: every token counts as much as another."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row, first in asked:
            count = row.shape[1] - first
            total += count * float(measure(model, row, first))
            tokens += count
    return total / tokens


def run(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """All figures.

    Raises:
        RuntimeError: the trained cartridge is no nearer to the page than the page's first tokens,
            or its first position has changed.
    """
    page = ids_of(tokenizer, MESSAGE.format("system") + PAGE + END)
    example.attach(model, page, options.positions)
    prefix, start = model.minipeft_prefix, time.perf_counter()
    said = learnt(model, tokenizer, each=options.each, length=options.length)
    asked = held_out(
        model, tokenizer, QUESTIONS[: options.questions], each=2, length=options.answer
    )
    found: dict[str, Any] = {
        "page_tokens": page.shape[1], "learnt": list(said.shape), "answers": len(asked),
        "answer_tokens": sum(row.shape[1] - first for row, first in asked),
        "seconds_drawing": time.perf_counter() - start,
    }  # fmt: skip
    nats: dict[str, float] = {}

    def measure(what: str, how: Callable[..., Tensor] = example.divergence) -> None:
        nats[what] = mean_divergence(model, asked, how)
        print(f"{what:14} {nats[what]:.3f} nats a token from the page", flush=True)

    measure("no page", without_page)
    measure("at random")
    prefix.load_tokens(page[:, : options.positions], name="cartridge")
    sinks = [sink.clone() for sink in prefix.encoders["cartridge"].sinks]
    measure("first tokens")
    start = time.perf_counter()
    found["losses"] = example.distill(
        model, said, steps=options.steps, rows=options.rows, rate=options.rate
    )
    found["seconds_training"] = time.perf_counter() - start
    measure("trained")
    if not nats["trained"] < nats["first tokens"]:
        raise RuntimeError("the trained cartridge is no nearer than the page's first tokens")
    if not all(map(torch.equal, sinks, prefix.encoders["cartridge"].sinks)):
        raise RuntimeError("the frozen position has changed")
    return {"nats": nats, **found}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures to the folder of results."""
    parser = argparse.ArgumentParser(prog="benchmarks.cartridge")
    parser.add_argument("--positions", type=int, default=64, help="of the cartridge")
    parser.add_argument("--each", type=int, default=6, help="learnt turns of each beginning")
    parser.add_argument("--length", type=int, default=64, help="tokens of a learnt turn")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="held out")
    parser.add_argument("--answer", type=int, default=40, help="tokens of an answer at most")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--rate", type=float, default=2e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    model = load_model(None, torch.float32, 0).eval()
    found = run(model, load_tokenizer(), options)
    seconds = time.perf_counter() - start
    print(f"{found['page_tokens']} tokens in {options.positions} positions; {seconds:.0f} s")
    settings = {k: v for k, v in vars(options).items() if k != "output"}
    save_result(options.output, "cartridge", settings=settings, seconds=seconds, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
