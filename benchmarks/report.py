"""A result file of the methods job as a report; nothing is measured here."""

import json
from pathlib import Path

from benchmarks.harness import about
from benchmarks.methods import METHODS
from minipeft.measure.benchmark import described
from minipeft.measure.report import Report


def load(path: Path) -> Report:
    """A result file, also one from before files named their methods' titles.

    Raises:
        ValueError: it is not one of the methods job.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("job") not in ("methods", "benchmark"):
        raise ValueError(f"{path.name} is no result of `python -m benchmarks methods`")
    if "methods" not in data:
        data["methods"] = described({name: METHODS[name] for name in data["options"]["methods"]})
        data["about"] = about(data["options"])
    return Report(data)
