"""What is claimed, by whom, and the rule that says whether it holds here.

Three rules compare test scores of arms, means over three seeds; a fourth compares learning rates.
The spread of a comparison is the sum of the standard deviations of the arms in it (of seeds,
n - 1): differences below it may be luck.

    better     a is better than b by more than the spread
    no worse   a is worse than b by less than a margin, even after the spread is added
    gap grows  b is ahead of a by more in the second pair than in the first, by more than the spread
    rates      best learning rates of the arms: the first is between two multiples of the second's

A comparison that the spread leaves open is "too close to tell".  Rates are known to a factor of
about 3, for one seed, so that rule has no third answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from benchmarks.claims_arms import BY_NAME, HIGHER_IS_BETTER, SEEDS
from benchmarks.claims_queue import Run, chosen_rate

HOLDS, FAILS, OPEN, NOT_RUN = (
    "holds", "does not hold here", "too close to tell", "not run"
)  # fmt: skip
VERDICTS = (HOLDS, FAILS, OPEN, NOT_RUN)
# two points of F1, and 0.02 of a loss of about 4: smaller than what methods are chosen for
MARGINS = {"ner": 0.02, "chat": 0.02, "types": 0.02}

LORA_PAPER = "LoRA (Hu et al. 2021)"
QLORA_PAPER = "QLoRA (Dettmers et al. 2023)"
PTUNING = "P-tuning v2 (Liu et al. 2022)"
REGRET = "LoRA Without Regret (Schulman et al. 2025, thinkingmachines.ai)"


@dataclass(frozen=True)
class Claim:
    """One sentence, where it is from, the arms that try it, and the rule.

    `metric` is a field of a run: "test" is the task's score.  `arms` are two, for "gap grows" four:
    a and b, then a and b of the second pair.  `between` is for "rates".
    """

    text: str
    source: str
    rule: str
    arms: tuple[str, ...]
    metric: str = "test"
    between: tuple[float, float] = (0.0, 0.0)


def _both(text: str, source: str, rule: str, a: str, b: str) -> list[Claim]:
    """The same claim on both tasks."""
    return [Claim(text, source, rule, (f"{task}: {a}", f"{task}: {b}")) for task in ("ner", "chat")]


CLAIMS: list[Claim] = [
    Claim("NF4 loses less than FP4", f"{QLORA_PAPER}, section 4", "better",
          ("types: NF4", "types: FP4")),
    Claim("NF4 loses less than 4-bit integers", f"{QLORA_PAPER}, section 4", "better",
          ("types: NF4", "types: Int4")),
    Claim("Double quantisation costs nothing that is seen", f"{QLORA_PAPER}, section 4", "no worse",
          ("types: NF4 + double quantisation", "types: NF4")),
    Claim("NF4 has a smaller error on normal weights than 4-bit integers",
          f"{QLORA_PAPER}, section 3", "better", ("types: NF4", "types: Int4"), "error_gaussian"),
    Claim("Smaller blocks lose less", f"{QLORA_PAPER}, section 2", "better",
          ("types: NF4, blocks of 32", "types: NF4, blocks of 256")),
    *_both("LoRA is as good as full fine-tuning", f"{LORA_PAPER}, abstract and section 5",
           "no worse", "LoRA", "full"),
    Claim("LoRA is better than training the output layer alone", "a check of the experiment",
          "better", ("ner: LoRA", "ner: head only")),
    Claim("LoRA is better than a prefix", f"{LORA_PAPER}, section 5 (GPT-3)", "better",
          ("ner: LoRA", "ner: P-tuning v2, 32")),
    Claim("LoRA is better than a prefix", f"{LORA_PAPER}, section 5 (GPT-3)", "better",
          ("chat: LoRA", "chat: prefix")),
    Claim("A rank of 4 is as good as 64", f"{LORA_PAPER}, section 7.2", "no worse",
          ("ranks: LoRA, rank 4", "ranks: LoRA, rank 64")),
    Claim("Even a rank of 1 is as good as 64", f"{LORA_PAPER}, section 7.2", "no worse",
          ("ranks: LoRA, rank 1", "ranks: LoRA, rank 64")),
    *_both("LoRA over a 4-bit base is as good as over a dense one", f"{QLORA_PAPER}, abstract",
           "no worse", "QLoRA", "LoRA"),
    Claim("LoRA on all layers is better than on attention alone, with as many parameters",
          f"{QLORA_PAPER}, section 4; {REGRET}", "better",
          ("ner: LoRA", "layers: LoRA, attention, rank 36")),
    Claim("LoRA on the MLP is better than on attention, with as many parameters", REGRET,
          "better", ("layers: LoRA, MLP, rank 29", "layers: LoRA, attention, rank 36")),
    *_both("rsLoRA is better than LoRA", "rsLoRA (Kalajdzievski 2023)", "better", "rsLoRA",
           "LoRA"),
    Claim("rsLoRA is better than LoRA at a high rank", "rsLoRA (Kalajdzievski 2023)", "better",
          ("ranks: rsLoRA, rank 64", "ranks: LoRA, rank 64")),
    *_both("LoRA+ is better than LoRA", "LoRA+ (Hayou et al. 2024)", "better", "LoRA+", "LoRA"),
    *_both("DoRA is better than LoRA", "DoRA (Liu et al. 2024)", "better", "DoRA", "LoRA"),
    *_both("PiSSA is better than LoRA", "PiSSA (Meng et al. 2024)", "better", "PiSSA", "LoRA"),
    *_both("LoftQ is better than QLoRA", "LoftQ (Li et al. 2023)", "better", "LoftQ", "QLoRA"),
    Claim("P-tuning v2 is as good as full fine-tuning", f"{PTUNING}, abstract", "no worse",
          ("ner: P-tuning v2, 32", "ner: full")),
    Claim("A prefix in every layer is better than one in the first layer", f"{PTUNING}, section 3",
          "better", ("ner: P-tuning v2, 32", "ner: prefix in the first layer only")),
    Claim("Deep prefixes are better than prompts of embeddings", PTUNING, "better",
          ("chat: prefix", "chat: prompt")),
    Claim("Sequence labelling wants a longer prefix: 32 is better than 8", f"{PTUNING}, section 3",
          "better", ("ner: P-tuning v2, 32", "ner: P-tuning v2, 8")),
    Claim("A prefix that an MLP makes is better than a table (the paper: it depends on the task)",
          f"{PTUNING}, section 3", "better",
          ("ner: P-tuning v2, 32, MLP", "ner: P-tuning v2, 32")),
    Claim("A prefix that starts at 0.5 is better than one at 0.02", "this library's own advice",
          "better", ("ner: P-tuning v2, 32", "ner: P-tuning v2, 32, start 0.02")),
    Claim("Prompt tuning of a small model is worse than full fine-tuning",
          "prompt tuning (Lester et al. 2021), abstract", "better", ("chat: full", "chat: prompt")),
    Claim("LoRA loses more than full fine-tuning when the batch grows", REGRET, "gap grows",
          ("ner: LoRA", "ner: full", "batches: LoRA, batch 64", "batches: full, batch 64")),
    *(
        Claim("LoRA's best rate is about 10 times that of full fine-tuning", REGRET, "rates",
              (f"{task}: LoRA", f"{task}: full"), between=(3.0, 33.0))
        for task in ("ner", "chat")
    ),
    Claim("LoRA's best rate is the same for ranks 4 and 64", REGRET, "rates",
          ("ranks: LoRA, rank 4", "ranks: LoRA, rank 64"), between=(0.3, 3.3)),
    Claim("LoRA forgets less than full fine-tuning (loss on other text)",
          "LoRA Learns Less and Forgets Less (Biderman et al. 2024)", "better",
          ("chat: LoRA", "chat: full"), "text"),
]  # fmt: skip


@dataclass(frozen=True)
class Score:
    """An arm over its seeds at the rate that validation data chose."""

    rate: float
    mean: float
    spread: float
    values: tuple[float, ...] = field(default_factory=tuple)


def score(name: str, done: Mapping[Run, Any], metric: str = "test") -> Score | None:
    """The arm's test scores; None if a seed is not done or ended without a number."""
    rate = chosen_rate(BY_NAME[name], done)
    if rate is None:
        return None
    runs = [done.get(Run(name, rate, seed)) for seed in SEEDS]
    values = [run[metric] for run in runs if run is not None and run.get(metric) is not None]
    if len(values) < len(SEEDS):
        return None
    return Score(rate, fmean(values), stdev(values), tuple(values))


def verdict(claim: Claim, done: Mapping[Run, Any]) -> tuple[str, list[Score]]:
    """What the rule says, and the scores of the claim's arms; these are empty if one is missing.

    Raises:
        ValueError: an unknown rule.
    """
    scores = [score(name, done, claim.metric) for name in claim.arms]
    found = [s for s in scores if s is not None]
    if len(found) < len(scores):
        return NOT_RUN, []
    task = BY_NAME[claim.arms[0]].task
    up = 1 if HIGHER_IS_BETTER[task] and claim.metric == "test" else -1
    ahead = up * (found[0].mean - found[1].mean)
    spread = sum(s.spread for s in found)
    if claim.rule == "better":
        return _beyond(ahead, 0.0, spread), found
    if claim.rule == "no worse":
        return _beyond(ahead, -MARGINS[task], spread), found
    if claim.rule == "gap grows":
        return _beyond(ahead - up * (found[2].mean - found[3].mean), 0.0, spread), found
    if claim.rule == "rates":
        low, high = claim.between
        return (HOLDS if low <= found[0].rate / found[1].rate <= high else FAILS), found
    raise ValueError(f"verdict: rule={claim.rule!r}; expected better, no worse, gap grows or rates")


def _beyond(value: float, limit: float, spread: float) -> str:
    if value - spread > limit:
        return HOLDS
    return FAILS if value + spread < limit else OPEN
