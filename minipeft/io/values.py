"""Plain Python values with tensors among them, as JSON beside named tensors, and back.

    {"betas": (0.9, 0.999), "moment": tensor}        what an optimiser's state_dict holds
    {"dict": [["betas", {"tuple": [0.9, 0.999]}], ["moment", {"tensor": "here/moment"}]]}

Texts, whole numbers, finite numbers, true, false, null and lists are themselves in JSON; all else
is an object with one name, which says its kind.  What comes back is equal, to the last bit and to
the type; a numpy float comes back as Python's.
"""

import math
from collections import Counter
from typing import Any

from torch import Tensor

Json = Any


def pack(value: object, place: str, tensors: dict[str, Tensor]) -> Json:
    """A value as JSON; its tensors go into `tensors`, under names that begin with `place`.

    Raises:
        TypeError: a value of another kind, a function for example; the message says where.
        ValueError: two tensors whose places have one name: of keys 1 and "1", or "a/b" and a, b.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        if place in tensors:
            raise ValueError(
                f"{place} would be the name of two tensors; expected keys that differ as texts and "
                "from paths of keys with / between"
            )
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        parts = [pack(v, f"{place}/{i}", tensors) for i, v in enumerate(value)]
        return parts if isinstance(value, list) else {"tuple": parts}
    if isinstance(value, dict):
        pairs = [[pack(key, place, {}), pack(v, f"{place}/{key}", tensors)]
                 for key, v in value.items() if _is_key(key, place)]  # fmt: skip
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    raise TypeError(
        f"{place} is a {type(value).__name__}; expected numbers, texts, tensors, lists, tuples and "
        "dicts, which a file without pickle can hold"
    )


def _is_key(key: object, place: str) -> bool:
    if not isinstance(key, str) and type(key) is not int:
        raise TypeError(f"{place} has a {type(key).__name__} as a key; expected texts or numbers")
    return True


def unpack(found: Json, tensors: dict[str, Tensor]) -> Any:
    """The value that `pack` made this of; its tensors are taken out of `tensors`.

    Raises:
        ValueError: what `pack` does not make; a tensor that is not in `tensors`, or comes twice.
        RecursionError: it is nested too deeply.
    """
    if isinstance(found, list):
        return [unpack(part, tensors) for part in found]
    if not isinstance(found, dict):
        return found
    ((kind, inside),) = found.items() if len(found) == 1 else ((None, None),)
    if kind == "float" and inside in ("inf", "-inf", "nan"):
        return float(inside)
    if kind == "tensor" and isinstance(inside, str) and inside in tensors:
        return tensors.pop(inside)
    if kind == "tuple" and isinstance(inside, list):
        return tuple(unpack(part, tensors) for part in inside)
    if kind in ("dict", "counter") and isinstance(inside, list):
        pairs: dict[Any, Any] = {}
        for pair in inside:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int):
                raise ValueError(f"{str(pair)[:60]}: no pair of a key and a value")
            if pair[0] in pairs:
                raise ValueError(f"{pair[0]!r:.60} is a key twice")
            pairs[pair[0]] = unpack(pair[1], tensors)
        return Counter(pairs) if kind == "counter" else pairs
    raise ValueError(f"{str(found)[:80]} is no value that was written here")
