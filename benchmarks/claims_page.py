"""The page of the claims job: docs/claims.md and its figure, made of a result file alone."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.claims_advice import ADVICE
from benchmarks.claims_arms import ARMS, BY_NAME, HIGHER_IS_BETTER, PARTS, SEEDS, Arm
from benchmarks.claims_queue import Run
from benchmarks.claims_rules import CLAIMS, VERDICTS, Claim, Score, score, verdict

DOCS = Path(__file__).parent.parent / "docs"
FIGURE = "assets/claims.png"
UNITS = {"types": "rise of the loss", "ner": "span F1", "chat": "loss"}
DIGITS = 3


def runs_of(result: Mapping[str, Any]) -> dict[Run, Any]:
    """The runs of a result file by arm, rate and seed."""
    return {Run(run["arm"], run["rate"], run["seed"]): run for run in result["runs"]}


def shown(found: Score) -> str:
    """Mean and standard deviation."""
    return f"{found.mean:.{DIGITS}f} ± {found.spread:.{DIGITS}f}"


def plain(name: str) -> str:
    """An arm's name without its part."""
    return name.partition(": ")[2]


def rate_text(rate: float) -> str:
    """A rate with one digit, as its neighbours are a factor of 3.16 apart."""
    return f"{rate:.0e}".replace("e-0", "e-")


def measured(claim: Claim, scores: list[Score]) -> str:
    """The figures that a claim's verdict rests on."""
    names = [plain(name) for name in claim.arms]
    if not scores:
        return "-"
    if claim.rule == "rates":
        told = (f"{n}: {rate_text(s.rate)}" for n, s in zip(names, scores, strict=True))
        return "best rates: " + "; ".join(told)
    unit = UNITS[BY_NAME[claim.arms[0]].task]
    if claim.metric != "test":
        unit = {"text": "loss on other text", "error_gaussian": "relative error"}[claim.metric]
    told = (f"{n} {shown(s)}" for n, s in zip(names, scores, strict=True))
    return f"{unit}: " + "; ".join(told)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def claim_rows(done: Mapping[Run, Any]) -> list[tuple[str, str, str, str, str]]:
    """Claim, source, task, figures and verdict of every claim."""
    rows = []
    for claim in CLAIMS:
        said, scores = verdict(claim, done)
        task = {"types": "data types", "ner": "entities", "chat": "chat"}[
            BY_NAME[claim.arms[0]].task
        ]
        rows.append((claim.text, claim.source, task, measured(claim, scores), said))
    return rows


def arm_rows(part_of: str, done: Mapping[Run, Any]) -> list[tuple[str, ...]]:
    """Every arm of a task that was run, the best first."""
    found: list[tuple[Arm, Score]] = []
    for arm in ARMS:
        if arm.task == part_of and (own := score(arm.name, done)) is not None:
            found.append((arm, own))
    found.sort(key=lambda pair: pair[1].mean, reverse=HIGHER_IS_BETTER[part_of])
    rows = []
    for arm, own in found:
        run = done[Run(arm.name, own.rate, SEEDS[0])]
        rows.append((plain(arm.name), shown(own), rate_text(own.rate), f"{run['trainable']:,}"))
    return rows


def type_rows(done: Mapping[Run, Any]) -> list[tuple[str, ...]]:
    """Errors of weights and the rise of the loss for each data type."""
    rows = []
    for arm in ARMS:
        if arm.task != "types" or (own := score(arm.name, done)) is None:
            continue
        run = done[Run(arm.name, own.rate, SEEDS[0])]
        errors = [f"{run[f'error_{source}']:.4f}" for source in ("gaussian", "minilm", "smollm2")]
        rows.append((plain(arm.name), *errors, shown(own)))
    return rows


def same_text(done: Mapping[Run, Any]) -> list[str]:
    """What double quantisation adds on each text: the deviations above are between texts."""
    plain_nf4, nested = (score(f"types: NF4{n}", done) for n in ("", " + double quantisation"))
    if plain_nf4 is None or nested is None:
        return []
    added = [b - a for a, b in zip(plain_nf4.values, nested.values, strict=True)]
    return [
        "The deviations here are between texts, which are the same for every data type. On the",
        "three texts, double quantisation changed the rise of the loss by "
        + ", ".join(f"{value:+.4f}" for value in added) + ".",
    ]  # fmt: skip


def with_scores(text: str, done: Mapping[Run, Any]) -> str:
    """A sentence with the scores of the arms that stand in it as <task: arm>.

    Raises:
        ValueError: an arm that was not run: the sentence would have a hole.
    """

    def own(match: re.Match[str]) -> str:
        found = score(match[1], done)
        if found is None:
            raise ValueError(f"with_scores: {match[1]!r} was not run; leave its sentence out")
        return shown(found)

    return re.sub(r"<([^>]+)>", own, text)


def missing(done: Mapping[Run, Any]) -> list[str]:
    """Arms without all three seeds."""
    return [arm.name for arm in ARMS if score(arm.name, done) is None]


def advice(done: Mapping[Run, Any]) -> list[str]:
    """A point for each piece of advice, of the sentences whose arms were all run."""
    points = []
    for sentences in ADVICE:
        said = []
        for text in sentences:
            try:
                said.append(with_scores(text, done))
            except ValueError:
                continue
        if said and said[0].startswith("**"):  # the advice itself, not its second half alone
            points.append("- " + " ".join(said))
    return points


def tally(said: list[str]) -> str:
    """How many claims got each verdict."""
    counts = Counter(said)
    told = "; ".join(f"{word}: {counts[word]}" for word in VERDICTS if word in counts)
    return f"Of {len(said)} claims: {told}"


def processors(done: Mapping[Run, Any]) -> str:
    """How many runs each kind of processor did: a state file may go on elsewhere."""
    counts = Counter(run["processor"] for run in done.values())
    return "; ".join(f"{name}: {count} runs" for name, count in counts.most_common())


def page(result: Mapping[str, Any], name: str) -> str:
    """The whole page; `name` is the result's file."""
    done, sizes = runs_of(result), result["sizes"]
    ner, chat = sizes["ner"], sizes["chat"]
    rows = claim_rows(done)
    left_out = missing(done)
    lines = [
        "# Claims", "",
        "What papers say of these methods, tried on small models with little data. Each method has",
        "as many examples as the others and its own learning rate, chosen on validation data with",
        "one seed. The figures are of test data: the mean and the standard deviation of three",
        "seeds. Rules that are the same for every method give the verdicts.", "",
        f"![Scores of every method]({FIGURE})", "",
        "## What was done", "",
        f"- **Entities**: MiniLM (22.6 M parameters) on CoNLL-2003, {ner['train']} sentences seen",
        f"  {ner['epochs']} times, in batches of 16; {ner['valid']} validation and",
        f"  {ner['test']} test sentences. The score is exact span F1: more is better.",
        f"- **Chat**: SmolLM2-135M on chit-chat, {chat['steps']} steps of 2 conversations of",
        f"  {chat['length']} tokens; {chat['valid']} validation and {chat['test']} test",
        "  conversations. The score is the loss of the replies: less is better.",
        "- **Data types**: SmolLM2's linear weights rounded, and the rise of the loss on",
        f"  {sizes['types']['tokens']:,} tokens of text; the three seeds are three parts of it.",
        "- LoRA has rank 16 and alpha 16 over all linear layers unless the name says otherwise.",
        "  Rates are a factor of 3.16 apart; where the best was at an end of the three that are",
        "  tried, one more beyond it was tried.",
        f"- {processors(done)}; {sum(run['seconds'] for run in done.values()) / 3600:.1f} hours of",
        "  one thread added up, on machines that were busy otherwise too.", "",
        "These are small models, short runs and three seeds. A claim that does not hold here may",
        "hold for large models and long runs, for which most of the papers make it.", "",
        "## The claims", "",
        "A claim *better* holds when the difference of the means is above the sum of the standard",
        "deviations. *As good as* holds when the mean is at most 0.02 behind, also after that sum",
        f"is added. {tally([row[-1] for row in rows])}.", "",
        *table(("claim", "source", "task", "measured", "verdict"),
               ((*row[:4], f"**{row[4]}**") for row in rows)),
        "", "## Every method", "",
    ]  # fmt: skip
    for task, title in (("ner", "Named entities"), ("chat", "Conversations")):
        if found := arm_rows(task, done):
            head = ("method", UNITS[task], "rate", "trained parameters")
            lines += [f"### {title}", "", *table(head, found), ""]
    if found := type_rows(done):
        head = ("data type", "error, Gaussian", "MiniLM", "SmolLM2", UNITS["types"])
        lines += ["### Data types", "", *table(head, found), "", *same_text(done), ""]
    if advised := advice(done):
        lines += ["## Which method to choose when, and on what evidence", "", *advised, ""]
    if left_out:
        lines += ["## Not run", "",
                  "These arms were not finished when the time was over: "
                  + "; ".join(left_out) + ".", ""]  # fmt: skip
    lines += [
        "## How to run it", "",
        "```bash",
        "python -m benchmarks claims --state runs.jsonl   # goes on where a stopped run ended",
        "python -m benchmarks claims --parts ner ranks    # some of: " + ", ".join(PARTS),
        "python -m benchmarks claims --page               # this page, from the newest result",
        "```", "",
        f"Every run is in `benchmarks/results/{name}`. The arms are in",
        "`benchmarks/claims_arms.py`, the claims and rules in `benchmarks/claims_rules.py`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Each method of both tasks: a bar at the mean, a point for each seed."""
    from matplotlib.figure import Figure

    done = runs_of(result)
    tasks = [task for task in ("ner", "chat") if arm_rows(task, done)]
    rows = {task: [a for a in ARMS if a.task == task and score(a.name, done)] for task in tasks}
    height = 1.0 + 0.26 * max((len(arms) for arms in rows.values()), default=1)
    figure = Figure((11, height), layout="constrained")
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), place + 1)
        pairs = [(arm, own) for arm in rows[task] if (own := score(arm.name, done))]
        pairs.sort(key=lambda pair: pair[1].mean, reverse=not HIGHER_IS_BETTER[task])
        for y, (_, own) in enumerate(pairs):
            axes.plot([own.mean - own.spread, own.mean + own.spread], [y, y], color="#0072b2")
            axes.plot([own.mean], [y], "|", color="#0072b2", markersize=12, markeredgewidth=2)
            axes.plot(own.values, [y] * len(own.values), "o", color="#d55e00", markersize=4)
        axes.set_yticks(range(len(pairs)), [plain(arm.name) for arm, _ in pairs])
        better = "right" if HIGHER_IS_BETTER[task] else "left"
        axes.set_xlabel(f"{UNITS[task]} on test data (better: to the {better})")
        axes.set_title({"ner": "Named entities, MiniLM", "chat": "Chat, SmolLM2-135M"}[task])
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write(result: Mapping[str, Any], name: str, docs: Path = DOCS) -> None:
    """The page and its figure below `docs`."""
    draw(result, docs / FIGURE)
    (docs / "claims.md").write_text(page(result, name))


def verdicts(done: Mapping[Run, Any]) -> list[dict[str, Any]]:
    """Every claim with its figures and verdict, for the result file."""
    keys = ("claim", "source", "task", "measured", "verdict")
    return [dict(zip(keys, row, strict=True)) for row in claim_rows(done)]
