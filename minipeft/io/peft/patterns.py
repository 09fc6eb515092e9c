"""Regular expressions from a file somebody else wrote, matched so that none can hang the process.

Python's matcher tries one way after the other, which can take exponential time.  Here a part of an
expression is a function from the positions where it may begin to all positions where it may end:
every position is looked at once, whatever is repeated.  Plain names are left to Python's matcher.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator

SECONDS = 10
LONGEST = 10_000  # characters of an expression; Unsloth's have some hundred
_NAME = r"(?:\w|[-.|^$]|\\[-.])*"
_PLAIN = re.compile(rf"{_NAME}|\(\.\*\\\.\)\?\({_NAME}\)", re.ASCII)  # or (.*\.)?(name)
_TOKEN = re.compile(
    r"(?P<open>\((?:\?(?:[:=!]|P<\w+>))?)|(?P<close>\))|(?P<or>\|)"
    r"|(?P<repeat>(?:[*+?]|\{(?P<low>\d*)(?P<comma>,?)(?P<high>\d*)(?<!\{)\})\??)"
    r"|(?P<one>\[\^?\]?(?:\\.|[^\]\\])*\]|\\[AbBZwWdDsS]|\\\W|[^\\()\[|*+?])"
)
Part = Callable[[str, set[int]], set[int]]  # of a name: where a part begins, where it ends


def fitting(patterns: Iterable[str], names: Iterable[str], where: str) -> dict[str, set[str]]:
    """For each expression the names that it matches in full.

    Raises:
        ValueError: no regular expression, or one that looks behind, refers to a group, has flags or
            more than 10,000 characters; or matching takes longer than ten seconds.
    """
    names, found = list(names), dict[str, set[str]]()
    deadline = time.monotonic() + SECONDS
    for pattern in patterns:
        part = None if _PLAIN.fullmatch(pattern) else _part(pattern, where)
        found[pattern] = set()
        for name in names:
            if part is None:
                fits = re.fullmatch(pattern, name) is not None
            else:
                fits = len(name) in part(name, {0})
            if fits:
                found[pattern].add(name)
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{where}: matching {pattern!r:.200} with the model's names takes more than "
                    f"{SECONDS} s; list the modules' names instead"
                )
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
    parts = [_part(pattern, where) for pattern in patterns]
    return {name: _layer_number(parts, name) for name in names}


def _layer_number(parts: list[Part], name: str) -> int | None:
    if not parts:
        return next((int(part) for part in name.split(".")[2:-1] if part.isdecimal()), None)
    starts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
    for part in parts:
        for start in starts:
            for end in sorted(part(name, {start}), reverse=True):
                if number := re.compile(r"\.(\d+)\.").match(name, end):
                    return int(number[1])
    return None


def _part(pattern: str, where: str) -> Part:
    """An expression as a function of positions."""
    try:
        re.compile(pattern)
        if len(pattern) > LONGEST:
            raise ValueError(f"it has {len(pattern)} characters, more than {LONGEST}")
        return _parsed(_tokens(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {pattern!r:.200} is no regular expression ({error})") from error
    except ValueError as error:
        raise ValueError(
            f"{where}: {pattern!r:.200} is not matched here: {error}; list the modules' names "
            "instead"
        ) from error


def _tokens(pattern: str) -> Iterator[re.Match[str]]:
    place = 0
    while place < len(pattern):
        token = _TOKEN.match(pattern, place)
        if token is None or (token["open"] == "(" and pattern[place + 1 : place + 2] == "?"):
            raise ValueError(f"{pattern[place : place + 4]!r} is not supported")
        yield token
        place = token.end()


def _parsed(tokens: Iterator[re.Match[str]], *, ahead: bool = False) -> Part:
    """The alternatives up to the end, or to the bracket that closes them; `ahead`: of a look."""
    branches: list[list[Part]] = [[]]
    repeated = False
    for token in tokens:
        parts, kind = branches[-1], token.lastgroup
        if token["close"]:
            break
        if token["or"]:
            branches.append([])
        elif token["open"] and token["open"][-1] in "=!":
            if ahead:
                raise ValueError("it looks ahead inside of a look ahead")
            parts.append(_look(_parsed(tokens, ahead=True), token["open"][-1] == "="))
        elif token["open"]:
            parts.append(_parsed(tokens, ahead=ahead))
        elif token["repeat"]:
            if repeated:
                raise ValueError(f"{token['repeat']!r} after a repetition is not supported")
            parts[-1] = _repeat(parts[-1], *_counts(token))
        else:
            parts.append(_one(re.compile(token["one"])))
        repeated = kind == "repeat"
    return _either(branches)


def _counts(token: re.Match[str]) -> tuple[int, float]:
    """How often at least and at most."""
    sign = token["repeat"][0]
    if sign != "{":
        return int(sign == "+"), 1 if sign == "?" else float("inf")
    low, high = int(token["low"] or 0), token["high"] if token["comma"] else token["low"]
    return low, int(high) if high else float("inf")


def _one(expression: re.Pattern[str]) -> Part:
    """One character of a kind, or a place between two."""
    return lambda name, at: {m.end() for i in at if (m := expression.match(name, i))}


def _either(branches: list[list[Part]]) -> Part:
    def run(name: str, at: set[int]) -> set[int]:
        found = set[int]()
        for parts in branches:
            ends = at
            for part in parts:
                ends = part(name, ends) if ends else ends
            found |= ends
        return found

    return run


def _look(part: Part, wanted: bool) -> Part:
    return lambda name, at: {i for i in at if bool(part(name, {i})) == wanted}


def _repeat(part: Part, low: int, high: float) -> Part:
    def run(name: str, at: set[int]) -> set[int]:
        found, number = set(at) if low == 0 else set[int](), 0
        while at and number < high:
            number += 1
            after = part(name, at)
            if number < low and after == at:  # so it stays, however often
                return after
            at = after if number < low else after - found
            found |= at if number >= low else set()
        return found

    return run
