"""What is shown while methods run: a bar on a terminal, else a line for each run."""

import sys
from collections.abc import Mapping
from typing import Any

from minipeft.adapters.progress import Progress

Result = dict[str, Any]


class Display:
    """A bar on a terminal; elsewhere a line for each run, so that a log stays short.

    A warning of the processes is shown once, whichever methods give it.
    """

    def __init__(
        self, methods: Mapping[str, Result], runs: int, *, shown: bool | None = None
    ) -> None:
        self.titles = {name: entry["title"] for name, entry in methods.items()}
        self.bar = Progress(total=runs, unit="run", shown=shown)
        self.lines = shown is None and self.bar.disable
        self.warned: set[tuple[str, str]] = set()

    def __call__(self, event: str, values: Result) -> None:
        if event == "step":
            self.bar.set_postfix_str(f"step {values['step']}, loss {values['loss']:.3f}", False)
            self.bar.update(0)
            return
        title = self.titles.get(values["method"], values["method"])
        if event == "start":
            self.bar.set_description_str(f"round {values['round'] + 1}: {title}", False)
        elif event == "warning":
            warning = (values["category"], values["text"])
            if warning not in self.warned:
                self.warned.add(warning)
                self._say(f"{title}: {': '.join(warning)}")
        else:
            self.bar.update()
            result = values["result"]
            reason = result.get("failed") or result.get("unsupported")
            if reason or self.lines:
                times = result.get("step_seconds") or []
                said = reason or f"{len(times)} steps in {sum(times):.1f} s"
                self._say(f"round {values['round'] + 1}: {title}: {said}")

    def _say(self, line: str) -> None:
        self.bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
