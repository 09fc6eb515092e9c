"""The table and the plot of a result file; nothing is measured here."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.methods import METHODS

Result = dict[str, Any]
COLUMNS = (
    "method", "trainable", "weights MB", "bits/weight", "peak MB", "step s (min-max)", "/ full",
    "ours / peer", "val. loss",
)  # fmt: skip
WIDTH = 140  # characters that the table needs
OURS, PEERS = "#0072B2", "#E69F00"  # distinguishable for every kind of colour vision


def step_times(run: Result) -> list[float]:
    """The steps that count: all but the first, which warms up."""
    return list(run["step_seconds"][1:]) or list(run["step_seconds"])


def by_round(data: Result, method: str) -> dict[int, float]:
    """The median step time of a method in each round."""
    return {
        run["round"]: median(step_times(run))
        for run in data["runs"]
        if run["method"] == method and "step_seconds" in run
    }


def ratio(data: Result, method: str, other: str) -> str:
    """method / other, taken within each round: median over the rounds, and the spread."""
    mine, theirs = by_round(data, method), by_round(data, other)
    ratios = [mine[r] / theirs[r] for r in mine if r in theirs]
    if not ratios:
        return "-"
    spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{median(ratios):.2f}{spread}"


def rows(data: Result) -> list[tuple[str, ...]]:
    """The table's rows as text; a case without figures says why."""
    base = data["base"].get("validation_loss")
    table = [("untouched model", *["-"] * 7, f"{base:.3f}" if base is not None else "failed")]
    for name in data["options"]["methods"]:
        method = METHODS[name]
        runs = [run for run in data["runs"] if run["method"] == name]
        why = [run.get("failed") or run.get("unsupported") for run in runs]
        if any(why):
            reason = next(text for text in why if text)
            table.append((method.title, *["-"] * 7, reason))
            continue
        first = runs[0]
        times = [t for run in runs for t in step_times(run)]
        bits = first["bits_per_quantized_weight"]
        peak = max(run["peak_bytes"] for run in runs)
        table.append((
            method.title,
            f"{first['trainable_parameters']:,}",
            f"{first['weight_bytes'] / 1e6:.0f}",
            "-" if bits is None else f"{bits:.3f}",
            f"{peak / 1e6:.0f}",
            f"{median(times):.2f} ({min(times):.2f}-{max(times):.2f})",
            ratio(data, name, "full"),
            ratio(data, name, method.peer) if method.peer else "-",
            f"{first['validation_loss']:.3f}",
        ))  # fmt: skip
    return table


def caption(data: Result) -> str:
    """Machine, model and settings in one line."""
    options, machine = data["options"], data["hardware"]
    model = "SmolLM2-135M" if options["sizes"] is None else f"LLaMA {options['sizes']}"
    rank = f"rank {options['rank']}"
    if {"ptuning", "peft-prefix"} & set(options["methods"]):
        rank += f", prefix {options['prefix_length']}"
    processor = machine["processor"]
    if capability := machine.get("cpu_capability"):
        limits = machine.get("cpu_limits") or {}
        amx = ", AMX" if machine.get("cpu_amx") and not limits else ""
        limited = "".join(f", {name}={value}" for name, value in limits.items())
        processor += f" ({capability}{amx}{limited})"
    where = machine.get("gpu") if options["device"] == "cuda" else processor
    return (
        f"{model}, {options['dtype']}, {options['steps']} steps of {options['batch']} x "
        f"{options['length']} tokens, {rank}, "
        f"{options['rounds']} rounds; "
        f"{where}, {options['threads'] or machine['cores']} threads; peak: above the process "
        "after its imports"
    )


def markdown(data: Result) -> str:
    """The table for a README."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(data)]
    return "\n".join(lines) + f"\n\n{caption(data)}\n"


def print_table(data: Result) -> None:
    """The table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=caption(data))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows(data):
        table.add_row(*row)
    wide = Console()
    (wide if wide.width >= WIDTH else Console(width=WIDTH)).print(table)


def plot(data: Result, path: Path) -> None:
    """Peak memory and step time per method as a PNG; a whisker from the least to the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [n for n in data["options"]["methods"] if by_round(data, n)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.6 + 0.55 * max(2, len(done))))
    position = range(len(done))
    colours = [PEERS if METHODS[name].is_peer else OURS for name in done]
    for axis, label, scale in (
        (left, "peak memory above imports (MB)", 1e6),
        (right, "step (s)", 1),
    ):
        for y, name in enumerate(done):
            runs = [r for r in data["runs"] if r["method"] == name and "step_seconds" in r]
            times = [t for r in runs for t in step_times(r)]
            if axis is left:
                middle, bounds = max(r["peak_bytes"] for r in runs) / scale, None
            else:
                middle = median(times)
                bounds = [[middle - min(times)], [max(times) - middle]]
            axis.barh(y, middle, color=colours[y], xerr=bounds, ecolor="#444444", capsize=3)
            axis.annotate(f" {middle:.3g}" if scale == 1 else f" {middle:.0f}", (0, y),
                          va="center", color="white", fontweight="bold")  # fmt: skip
        axis.set_xlabel(label)
        axis.set_yticks(list(position), [METHODS[n].title for n in done] if axis is left else [])
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("blue: minipeft and full fine-tuning; orange: peers", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def load(path: Path) -> Result:
    """A result file.

    Raises:
        ValueError: it is not one of the methods job.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("job") != "methods":
        raise ValueError(f"{path.name} is no result of `python -m benchmarks methods`")
    return data
