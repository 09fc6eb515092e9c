"""The table, the plot and the JSON of a comparison; nothing is measured here."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

Result = dict[str, Any]
WIDTH = 150  # characters that the table needs
OURS, PEERS = "#0072B2", "#E69F00"  # distinguishable for every kind of colour vision
# a column, and the figure without which no run has it
_OPTIONAL = {
    "step MB": "step_peak_bytes", "predicted MB": "predicted_bytes", "GFLOPs": "flops",
    "val. loss": "validation_loss",
}  # fmt: skip
LONGEST = 160  # characters of a reason why there is no prediction


def step_times(run: Result) -> list[float]:
    """The steps that count: all but the first, which warms up."""
    return list(run["step_seconds"][1:]) or list(run["step_seconds"])


def digits(value: float | None) -> str:
    """A figure with at least three significant digits; "-" where there is none."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def megabytes(size: int | None) -> str:
    """Bytes as MB (1e6 bytes)."""
    return digits(None if size is None else size / 1e6)


class Report:
    """The figures of a comparison: `print` shows the table; `save`, `plot` and `show` say more.

    `data` is the whole result as plain dictionaries and lists.
    """

    def __init__(self, data: Result) -> None:
        self.data = data
        self.methods: Mapping[str, Result] = data["methods"]  # title, peer, is_peer

    def runs(self, method: str) -> list[Result]:
        """The runs of one method, round by round."""
        return [run for run in self.data["runs"] if run["method"] == method]

    def done(self, method: str) -> list[Result]:
        """The runs of one method that gave figures."""
        return [run for run in self.runs(method) if "step_seconds" in run]

    def timed(self, method: str) -> list[Result]:
        """The runs whose times count: those without an allocator's setting, if there are any."""
        done = self.done(method)
        return [run for run in done if not run.get("allocator")] or done

    def peak(self, method: str, name: str = "peak_bytes") -> int | None:
        """The highest memory of a method, bytes; of the runs with an allocator's setting, if any.

        `name` "step_peak_bytes": of the steps alone.
        """
        done = self.done(method)
        measured = [run for run in done if run.get("allocator")] or done
        return max((run[name] for run in measured if run.get(name) is not None), default=None)

    def by_round(self, method: str) -> dict[int, float]:
        """The median step time of a method in each round whose times count, seconds."""
        return {run["round"]: median(step_times(run)) for run in self.timed(method)}

    def ratio(self, method: str, other: str) -> str:
        """method / other, taken within each round: median over the rounds, and the spread."""
        mine, theirs = self.by_round(method), self.by_round(other)
        ratios = [mine[r] / theirs[r] for r in mine if r in theirs]
        if not ratios:
            return "-"
        spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else ""
        return f"{median(ratios):.2f}{spread}"

    def why_not(self, method: str) -> str | None:
        """Why a method has no figures; None if it has them."""
        for run in self.runs(method):
            if "unsupported" in run:
                return f"unsupported: {run['unsupported']}"
            if "failed" in run:
                return str(run["failed"])
        return None

    def columns(self) -> list[str]:
        """The table's columns: those that some run has figures for."""
        first = next(iter(self.methods))
        every: list[Result] = [*self.data["runs"], self.data.get("base") or {}]
        peers = any(entry.get("peer") in self.methods for entry in self.methods.values())
        wanted = ["method", "trainable", "weights MB", "bits/weight", "peak MB", "step MB"]
        wanted += ["predicted MB", "GFLOPs", "step s (min-max)", f"/ {first}"]
        wanted += ["ours / peer"] if peers else []
        wanted += ["loss", "val. loss"]
        has = {
            name: any(run.get(key) is not None for run in every) for name, key in _OPTIONAL.items()
        }
        if has["val. loss"]:
            wanted.remove("loss")
        return [name for name in wanted if has.get(name, True)]

    def rows(self) -> list[list[str]]:
        """The table's rows as text; a case without figures says why in its last column."""
        columns, table = self.columns(), []
        if base := self.data.get("base"):
            loss = base.get("validation_loss")
            said = f"{loss:.3f}" if loss is not None else "failed"
            table.append({"method": "untouched model", columns[-1]: said})
        for name, entry in self.methods.items():
            why = self.why_not(name)
            row = {columns[-1]: why} if why else self._figures(name, next(iter(self.methods)))
            table.append({"method": entry["title"], **row})
        return [[row.get(column, "-") for column in columns] for row in table]

    def _figures(self, name: str, first: str) -> dict[str, str]:
        runs = self.runs(name)
        run, times = runs[0], [t for run in self.timed(name) for t in step_times(run)]
        bits, losses = run["bits_per_quantized_weight"], run.get("train_losses") or [float("nan")]
        found = {
            "trainable": f"{run['trainable_parameters']:,}",
            "weights MB": megabytes(run["weight_bytes"]),
            "bits/weight": "-" if bits is None else f"{bits:.3f}",
            "peak MB": megabytes(self.peak(name)),
            "step MB": megabytes(self.peak(name, "step_peak_bytes")),
            "step s (min-max)": f"{digits(median(times))} ({digits(min(times))}-"
            f"{digits(max(times))})",
            f"/ {first}": self.ratio(name, first),
            "ours / peer": self.ratio(name, self.methods[name].get("peer") or ""),
            "loss": f"{losses[0]:.3f} to {losses[-1]:.3f}",
        }
        if "flops" in run:
            found["GFLOPs"] = digits(run["flops"] / 1e9)
        found["predicted MB"] = megabytes(run.get("predicted_bytes"))
        if "validation_loss" in run:
            found["val. loss"] = f"{run['validation_loss']:.3f}"
        return found

    def caption(self) -> str:
        """Machine, model and settings in one line; below it how memory and time were measured.

        And for which methods there is no prediction, with the reasons.
        """
        options, machine = self.data["options"], self.data["hardware"]
        processor = machine["processor"]
        if capability := machine.get("cpu_capability"):
            limits = machine.get("cpu_limits") or {}
            amx = ", AMX" if machine.get("cpu_amx") and not limits else ""
            limited = "".join(f", {name}={value}" for name, value in limits.items())
            processor += f" ({capability}{amx}{limited})"
        where = machine.get("gpu") if options["device"].startswith("cuda") else processor
        counted = [run["threads"] for run in self.data["runs"] if "threads" in run]
        threads = counted[0] if counted else options["threads"] or machine["cores"]
        first = "imports and a small step" if counted else "imports"
        said = (
            f"{self.data['about']}, {options['rounds']} rounds; {where}, "
            f"{threads} threads; peak: above the process after its {first}"
        )
        return "\n".join([said, *self._allocator(), *self._without_prediction()])

    def _allocator(self) -> list[str]:
        """The setting under which memory was measured, and which rounds' times count."""
        done = [run for name in self.methods for run in self.done(name)]
        setting = next((run["allocator"] for run in done if run.get("allocator")), None)
        if setting is None:
            return []
        said = ", ".join(f"{name}={value}" for name, value in setting.items())
        if all(run.get("allocator") for run in done):
            return [f"memory and times: with {said}, which makes steps slower; more rounds time "
                    "steps without it"]  # fmt: skip
        return [f"memory: the first round, with {said}; times: the later rounds, without it"]

    def _without_prediction(self) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for name, entry in self.methods.items():
            for run in self.runs(name):
                if (reason := run.get("no_prediction")) and not entry.get("is_peer"):
                    short = " ".join(reason.split())
                    short = short if len(short) <= LONGEST else short[: LONGEST - 3] + "..."
                    reasons.setdefault(short, []).append(entry["title"])
        return [f"no prediction: {reason} ({', '.join(titles)})"
                for reason, titles in reasons.items()]  # fmt: skip

    def markdown(self) -> str:
        """The table for a README."""
        columns = self.columns()
        lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join(lines) + f"\n\n{self.caption()}\n"

    def __str__(self) -> str:
        table = [self.columns(), *self.rows()]
        # the last column is not padded: a reason why there are no figures may be long
        widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1]
        lines = []
        for row in table:
            cells = [f"{row[0]:<{widths[0]}}"]
            cells += [f"{c:>{w}}" for c, w in zip(row[1:-1], widths[1:], strict=True)]
            lines.append("  ".join([*cells, row[-1]]))
        return "\n".join([*lines, "", self.caption()])

    def show(self) -> None:
        """The table in the terminal, drawn by rich."""
        from rich.console import Console
        from rich.table import Table

        table = Table(caption=self.caption())
        for column in self.columns():
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in self.rows():
            table.add_row(*row)
        wide = Console()
        (wide if wide.width >= WIDTH else Console(width=WIDTH)).print(table)

    def plot(self, path: str | Path) -> None:
        """Peak memory and step time per method, drawn by matplotlib; a whisker from the least."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        done = [name for name in self.methods if self.done(name)]
        figure, axes = plt.subplots(1, 2, figsize=(10, 0.6 + 0.55 * max(2, len(done))))
        colours = [PEERS if self.methods[name].get("is_peer") else OURS for name in done]
        for left, axis in zip((True, False), axes, strict=True):
            for y, name in enumerate(done):
                times, bounds = [t for run in self.timed(name) for t in step_times(run)], None
                middle = (self.peak(name) or 0) / 1e6
                if not left:
                    middle = median(times)
                    bounds = [[middle - min(times)], [max(times) - middle]]
                axis.barh(y, middle, color=colours[y], xerr=bounds, ecolor="#444444", capsize=3)
                axis.annotate(f" {digits(middle)}", (0, y), va="center",
                              color="white", fontweight="bold")  # fmt: skip
            axis.set_xlabel("peak memory above imports (MB)" if left else "step (s)")
            titles = [self.methods[name]["title"] for name in done] if left else []
            axis.set_yticks(range(len(done)) if left else [], titles)
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
        if PEERS in colours:
            figure.suptitle("blue: minipeft and full fine-tuning; orange: peers", fontsize=10)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)

    def save(self, path: str | Path) -> None:
        """The whole result as JSON: raw times, versions, machine, settings."""
        Path(path).write_text(json.dumps(self.data, indent=1) + "\n")
