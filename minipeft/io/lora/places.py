"""Which module of a model a foreign name means: spellings are tried on the model at hand.

    llama_model.base_model.model.model.layers.0.q     parts in front are taken off: PandaGPT
    unet.down_blocks.0.attn.processor.to_out          diffusers: .processor goes, to_out is to_out.0
    lora_unet_down_blocks_0_attn_to_q                 kohya: dots became underscores
    layers.0.attention.wq, layers.0.attn.q_proj       Meta's and torchtune's names of LLaMA

What is taken off in front is the file's part: a file may hold adapters of several models.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from minipeft.adapters.plain_names import PlainNames, Spellings
from minipeft.adapters.protocol import innermost
from minipeft.adapters.targets import visible_modules
from minipeft.io.llama_names import META, TORCHTUNE, renamed
from minipeft.io.peft.keys import PREFIX

_KOHYA = re.compile(r"(?P<part>lora_[a-z]+\d*)_(?P<name>.+)")
_OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_MOST_PARTS = 3  # that may stand in front of the model's own name


class Place(NamedTuple):
    """A module of the model, and how the file says so."""

    name: str  # plain
    part: str  # what stands before it in the file
    naming: str = ""  # "Meta", "torchtune": rotary rows may have another order


class Places:
    """The modules of a model by the spellings of other programs."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = PlainNames(model).by_plain(visible_modules(model))
        self._spellings = Spellings(self.modules)
        self._flat: dict[str, list[str]] = {}
        for name in self.modules:
            self._flat.setdefault(name.replace(".", "_"), []).append(name)

    def find(self, name: str, program: str) -> Place | None:
        """The module that this name means; None if the model has none.

        Raises:
            ValueError: names that are one without their dots.
        """
        if program == "kohya":
            return self._kohya(name)
        for part, own in _beginnings(name):
            for spelling, naming in _spellings(own, program):
                found = self._spellings.find(spelling)
                if found is not None and innermost(self.modules[found])._parameters:
                    return Place(found, part, naming)
        return None

    def _kohya(self, name: str) -> Place | None:
        found = _KOHYA.fullmatch(name)
        names = self._flat.get(found["name"], []) if found else []
        if found is None or not names:
            return None
        if len(names) > 1:
            raise ValueError(f"{name:.80} may be any of {names[:4]} of the model")
        return Place(names[0], found["part"])

    def part_of(self, name: str, program: str) -> str:
        """What stands in front of a name that the model lacks."""
        found = _KOHYA.fullmatch(name) if program == "kohya" else None
        return found["part"] if found else name.partition(".")[0]


def _beginnings(name: str) -> Iterator[tuple[str, str]]:
    """The name without what may stand in front of it: (taken off, the rest)."""
    part, rest = "", name
    yield "", name.replace(f".{PREFIX}", ".")  # a PeftModel inside another model
    for _ in range(_MOST_PARTS):
        yield part, rest.removeprefix(PREFIX)
        first, dot, rest = rest.removeprefix(PREFIX).partition(".")
        if not dot:
            return
        part = f"{part}.{first}".lstrip(".")


def _spellings(name: str, program: str) -> Iterator[tuple[str, str]]:
    yield name, ""
    if program == "diffusers":
        name = name.replace(".processor", "")
        yield name, ""
        yield f"{name}.0", ""
        before, _, last = name.rpartition(".")
        if last in _OLD_ATTENTION:
            yield f"{before}.{_OLD_ATTENTION[last]}", ""
    for table, naming in ((META, "Meta"), (TORCHTUNE, "torchtune")):
        if (own := renamed(name, table)) is not None:
            yield own, naming
