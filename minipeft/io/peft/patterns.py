"""Regular expressions from a file somebody else wrote, matched so that none can hang the process.

Python's matcher can take exponential time, and no way of looking at an expression tells for sure.
Plain ones (a name with its dots) are matched here; for others a fresh interpreter, which holds
nothing but the names, is given ten seconds.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable

SECONDS = 10
_NAME = r"\^?(?:\w|-|\.|\\\.|\\-)*\$?"
_PLAIN = re.compile(rf"{_NAME}|\(\.\*\\\.\)\?\({_NAME}\)", re.ASCII)  # or (.*\.)?(name)
_LAYER = r"(?:{}\.(?P<layer_number>\d+)\.).*"
_SCRIPT = """
import json, re, sys
patterns, names = json.load(sys.stdin)
found = [[re.fullmatch(p, n) for n in names] for p in patterns]
group = lambda match: match and (match.groupdict().get("layer_number") or "")
print(json.dumps([[group(match) for match in row] for row in found]))
"""


def fitting(patterns: Iterable[str], names: Iterable[str], where: str) -> dict[str, set[str]]:
    """For each expression the names that it matches in full.

    Raises:
        ValueError: an invalid expression, or one that takes longer than ten seconds.
    """
    patterns, names = list(dict.fromkeys(patterns)), list(names)
    plain = [p for p in patterns if _PLAIN.fullmatch(p)]
    other = [p for p in patterns if not _PLAIN.fullmatch(p)]
    found = {p: {n for n in names if re.fullmatch(p, n)} for p in plain}
    if other:
        for pattern, row in zip(other, _matched_elsewhere(other, names, where), strict=True):
            found[pattern] = {n for n, text in zip(names, row, strict=True) if text is not None}
    return found


def layer_numbers(
    patterns: Iterable[str], names: Iterable[str], where: str
) -> dict[str, int | None]:
    """For each name the number of its layer: the first one after a part that a pattern matches.

    The first pattern that fits counts.  Without patterns it is the first number that has two parts
    before it (`model.layers.3.up`), in PEFT's way.

    Raises:
        ValueError: as `fitting`.
    """
    expressions = [_LAYER.format(rf"(?:^|.*?\.){pattern}") for pattern in patterns]
    expressions = expressions or [_LAYER.format(r".*?\.[^.]*")]
    names = list(names)
    numbers: dict[str, int | None] = dict.fromkeys(names)
    for row in reversed(_matched_elsewhere(expressions, names, where)):
        fits = {n: text for n, text in zip(names, row, strict=True) if text is not None}
        numbers |= {n: int(text) if text else None for n, text in fits.items()}
    return numbers


def _matched_elsewhere(patterns: list[str], names: list[str], where: str) -> list[list[str | None]]:
    """For each expression and name: None, or what its group "layer_number" holds, or ""."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _SCRIPT],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{where}: matching {_shortened(patterns)} with the model's names takes more than "
            f"{SECONDS} s; list the modules' names instead"
        ) from None
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ValueError(
            f"{where}: {_shortened(patterns)} holds what is no regular expression ({reason[0]})"
        )
    rows: list[list[str | None]] = json.loads(done.stdout)
    return rows


def _shortened(patterns: list[str]) -> str:
    text = ", ".join(repr(pattern) for pattern in patterns)
    return text if len(text) <= 200 else f"{text[:200]}..."
