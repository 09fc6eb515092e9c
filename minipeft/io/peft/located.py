"""For each key of a file, the module of a given model that it belongs to.

File and model may spell a name differently: what torch wraps around modules adds parts to it.  So
they are compared by plain names (adapters/plain_names.py).  A name that the model lacks is looked
up in transformers' table of names that changed since (integrations/transformers/file_names.py).
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from minipeft.adapters.plain_names import PlainNames, Spellings
from minipeft.adapters.protocol import innermost
from minipeft.adapters.targets import survey
from minipeft.integrations.transformers.file_names import ModuleNames
from minipeft.io.peft.keys import PREFIX, Key, beside, parse, without_prefix

LONGEST_KEY = 1000  # characters; real names have some hundred, and matching longer ones takes time


@dataclass
class Located:
    """A model's modules by their plain names, and for each key of a file its module."""

    modules: dict[str, nn.Module]
    experts: dict[str, nn.Parameter]  # 3-D weights of experts
    real: dict[str, str]  # plain name: the model's own
    heads: dict[str, str]  # output heads, with the reason why each is one
    vocabulary: set[int]  # ids of the modules with a row for each token, below all adapters
    in_attention: dict[str, str]  # layers that nn.MultiheadAttention never calls, with the reason
    keys: dict[str, Key]  # key in the file: what it says; role "unknown" if the model lacks it
    spelled: dict[str, list[str]]  # plain name: how the file spells it, where it does otherwise
    by_weight: dict[int, list[str]]  # id of a parameter `weight`: the modules that have it
    joined: dict[str, str]  # unknown key: the weight of experts that its module became a part of

    def tied(self, name: str) -> list[str]:
        """The modules that share this one's weight, itself among them; none if it has no weight."""
        return self.by_weight.get(id(_weight(self.modules[name])), [])


def _weight(module: nn.Module) -> nn.Parameter | None:
    return innermost(module)._parameters.get("weight")


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
    spellings, in_files = Spellings(["", *modules]), ModuleNames(model, modules)
    renamed, joined = False, {}
    plain_keys = without_prefix(keys, modules)
    if len(plain_keys) < len(keys):
        raise ValueError(f"{where}: the same key with and without {PREFIX!r}")
    parsed: dict[str, Key] = {}
    spelled: dict[str, list[str]] = {}
    for plain, in_file in plain_keys.items():
        key = parse(plain) if len(plain) <= LONGEST_KEY else Key(plain, "unknown")
        for candidate in (key, *beside(key)):
            if key.role == "unknown":
                continue
            place = spellings.find(candidate.module)
            if place is None:
                place = in_files.find(candidate.module)
                renamed = renamed or place is not None
            if place is not None and (place or candidate.role == "plain"):
                parsed[in_file] = candidate._replace(module=place)
                if place != candidate.module:
                    _note(spelled, candidate.module, spellings)
                break
        else:
            parsed[in_file] = key._replace(role="unknown")
            if (whole := in_files.joined(key.module)) in experts and whole is not None:
                joined[in_file] = whole
    for name in (*modules, *experts) if spelled else ():  # those without keys, after their parents
        parent, _, own = name.rpartition(".")
        if name not in spelled and parent in spelled:
            spelled[name] = [f"{spelled[parent][-1]}.{own}"]
    for name, older in in_files.in_files().items() if renamed else ():
        spelled[name] = [*spelled.get(name, []), older]  # by the names that the file is made with
    by_weight: dict[int, list[str]] = {}
    for name, module in modules.items():
        if (weight := _weight(module)) is not None:
            by_weight.setdefault(id(weight), []).append(name)
    return Located(
        modules, experts, real, names.by_plain(places.heads), _vocabulary(model),
        names.by_plain(places.in_attention), parsed, spelled, by_weight, joined,
    )  # fmt: skip


def _note(spelled: dict[str, list[str]], name: str, spellings: Spellings) -> None:
    """Note how a file spells a module and the modules around it.

    A wrapper and its content have one plain name: the shortest spelling of it is kept, which is
    the module's own, and the longest, which the names of the module's parts begin with.
    """
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        place, spelling = spellings.find(beginning := ".".join(parts[:end])), [beginning]
        if place is not None and place != beginning:
            spelled[place] = [*spelled.get(place, spelling)[:1], *spelling]


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
