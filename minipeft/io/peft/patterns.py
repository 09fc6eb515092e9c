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
_SCRIPT = """
import json, re, sys
patterns, names = json.load(sys.stdin)
print(json.dumps([[re.fullmatch(p, n) is not None for n in names] for p in patterns]))
"""


def fitting(patterns: Iterable[str], names: Iterable[str], where: str) -> dict[str, set[str]]:
    """For each expression the names that it matches in full.

    Raises:
        ValueError: an expression that is none, or that takes longer than ten seconds.
    """
    patterns, names = list(dict.fromkeys(patterns)), list(names)
    plain = [p for p in patterns if _PLAIN.fullmatch(p)]
    other = [p for p in patterns if not _PLAIN.fullmatch(p)]
    found = {p: {n for n in names if re.fullmatch(p, n)} for p in plain}
    if other:
        found |= zip(other, _matched_elsewhere(other, names, where), strict=True)
    return found


def _matched_elsewhere(patterns: list[str], names: list[str], where: str) -> list[set[str]]:
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
    rows = json.loads(done.stdout)
    return [{n for n, fits in zip(names, row, strict=True) if fits} for row in rows]


def _shortened(patterns: list[str]) -> str:
    text = ", ".join(repr(pattern) for pattern in patterns)
    return text if len(text) <= 200 else f"{text[:200]}..."
