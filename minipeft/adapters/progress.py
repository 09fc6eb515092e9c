"""A progress bar that stays small in a log.

A terminal whose output is captured (script, tmux, a build server) keeps every state of a bar.  So
this one is shown at most twice a second, and each state lasts a fiftieth of the time so far: after
25 seconds the states grow with the logarithm of the time, some 400 in a day.
"""

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

LEAST_SECONDS = 0.5  # between two states
STATES = 50  # while the time so far grows by itself


class Progress(tqdm):  # type: ignore[misc]  # tqdm has no types
    """tqdm's bar, shown seldom: `for x in Progress(items, desc="loading")`, or with `update`.

    `shown` None: where the output is a terminal; True and False: always and never.  In plain
    characters, of which each takes one byte.
    """

    monitor_interval = 0  # no thread that shows it in between

    def __init__(self, *items: Any, shown: bool | None = None, **settings: Any) -> None:
        hidden = None if shown is None else not shown
        super().__init__(
            *items, disable=hidden, ascii=True, mininterval=LEAST_SECONDS, miniters=0, **settings
        )

    def update(self, n: float | None = 1) -> bool | None:
        """Count on; returns whether the bar was shown anew."""
        again: bool | None = super().update(n)
        if again:
            self.mininterval = max(LEAST_SECONDS, self.format_dict["elapsed"] / STATES)
        return again

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()
