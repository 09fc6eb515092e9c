"""The module of a given model that each key of a file belongs to, however either spells the names.

Both are compared by plain names (adapters/plain_names.py), without what torch wraps around
modules.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from minipeft.adapters.plain_names import PlainNames, Spellings
from minipeft.adapters.protocol import innermost
from minipeft.adapters.targets import survey
from minipeft.io.peft.keys import PREFIX, Key, beside, parse, without_prefix

LONGEST_KEY = 1000  # characters; real names have some hundred, and matching longer ones takes time


@dataclass
class Located:
    """A model's modules under their plain names, and a file's keys by the modules they are of."""

    modules: dict[str, nn.Module]
    experts: dict[str, nn.Parameter]  # 3-D weights of experts
    real: dict[str, str]  # plain name: the model's own
    heads: dict[str, str]  # output heads, with the reason why each is one
    vocabulary: set[int]  # ids of the modules with a row for each token, below all adapters
    in_attention: dict[str, str]  # layers that nn.MultiheadAttention never calls, with the reason
    keys: dict[str, Key]  # key in the file: what it says; role "unknown" if the model lacks it
    spelled: dict[str, set[str]]  # plain name of a module or 3-D weight: how the file may spell it


def locate(model: nn.Module, keys: Iterable[str], where: str) -> Located:
    """Find the module of each key.

    Raises:
        ValueError: the same key with and without PEFT's prefix.
    """
    keys = list(keys)
    names, places = PlainNames(model), survey(model)
    modules, experts = names.by_plain(places.modules), names.by_plain(places.experts)
    real = {names.plain(name): name for name in places.experts}
    for name, module in reversed(places.modules.items()):  # the first name stays
        if modules[names.plain(name)] is module:
            real[names.plain(name)] = name
    spellings = Spellings(["", *modules])
    plain_keys = without_prefix(keys, modules)
    if len(plain_keys) < len(keys):
        raise ValueError(f"{where}: the same key with and without {PREFIX!r}")
    parsed: dict[str, Key] = {}
    differences = _Differences()
    for plain, in_file in plain_keys.items():
        key = parse(plain) if len(plain) <= LONGEST_KEY else Key(plain, "unknown")
        for candidate in (key, *beside(key)):
            if key.role == "unknown":
                continue
            place = spellings.find(candidate.module)
            if place is not None and (place or candidate.role == "plain"):
                parsed[in_file] = candidate._replace(module=place)
                differences.note(candidate.module, place)
                break
        else:
            parsed[in_file] = key._replace(role="unknown")
    spelled = {name: {differences.spelled(name)} for name in (*modules, *experts)}
    return Located(
        modules, experts, real, names.by_plain(places.heads), _vocabulary(model),
        names.by_plain(places.in_attention), parsed, spelled,
    )  # fmt: skip


def _vocabulary(model: nn.Module) -> set[int]:
    """Input embeddings and output heads; every embedding of a model that names none."""
    found: set[int] = set()
    names_some = False
    for part in model.modules():
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            if callable(getattr(type(part), getter, None)):
                names_some = True
                with suppress(NotImplementedError, AttributeError):
                    table = getattr(part, getter)()
                    found |= {id(innermost(table))} if isinstance(table, nn.Module) else set()
    if not names_some:
        found = {id(part) for part in model.modules() if isinstance(part, nn.Embedding)}
    return found


class _Differences:
    """Where a file's names of modules have more parts than a model's, or fewer."""

    def __init__(self) -> None:
        self.more: dict[str, list[str]] = {}  # plain name of a part: what the file has after it
        self.fewer: set[str] = set()  # plain names of parts that the file leaves out

    def note(self, spelled: str, plain: str) -> None:
        """Take over the differences of one name."""
        if spelled == plain:
            return
        rest, place, more = plain.split(".") if plain else [], "", dict[str, list[str]]()
        for part in spelled.split("."):
            if part not in rest:
                more.setdefault(place, []).append(part)
                continue
            while rest:
                own = rest.pop(0)
                place = f"{place}.{own}" if place else own
                if own == part:
                    break
                self.fewer.add(place)
        self.more |= more

    def spelled(self, name: str) -> str:
        """The name as the file would have it."""
        if not self.more and not self.fewer:
            return name
        place, parts = "", list(self.more.get("", []))
        for part in name.split("."):
            place = f"{place}.{part}" if place else part
            if place not in self.fewer:
                parts.append(part)
            if place != name:
                parts += self.more.get(place, [])
        return ".".join(parts)
