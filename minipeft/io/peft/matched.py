"""A configuration matched with one model: rank, alpha and purpose of each module.

Names are compared by PEFT's rules.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from minipeft.adapters.protocol import linear_shape
from minipeft.io.peft.config import LoRAConfig
from minipeft.io.peft.located import Located
from minipeft.io.peft.patterns import fitting, layer_numbers

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class MatchedConfig:
    """A configuration with its expressions matched against a model's module names."""

    config: LoRAConfig
    spelled: Mapping[str, frozenset[str]]  # plain name: itself, and how the file spells it
    fitting: Mapping[str, set[str]]  # expression: the names that it matches, in any spelling
    layers: Mapping[str, int | None]  # name: its layer's number, where layers_to_transform asks
    ends: Mapping[str, frozenset[str]]  # name: all spellings, and what follows each dot of them

    def rank_of(self, name: str) -> int:
        """The rank for a module: the first pattern that fits, in PEFT's way, or the default."""
        return self._by_pattern(self.config.rank_pattern, name, self.config.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha for a module, in the same way."""
        return self._by_pattern(self.config.alpha_pattern, name, self.config.alpha)

    def unused_patterns(self) -> list[str]:
        """Keys of rank_pattern and alpha_pattern that fit no module of the model."""
        keys = (*self.config.rank_pattern, *self.config.alpha_pattern)
        return [key for key in keys if not self.fitting[_of_pattern(key)]]

    def fits(self, target: Iterable[str] | str, name: str) -> bool:
        """Whether an expression, or one of several names or dotted ends of names, is this module's.

        Fast for a set, however large.
        """
        if isinstance(target, str):
            return name in self.fitting[target]
        return not self.ends[name].isdisjoint(target)

    def targets(self, name: str, module: nn.Module) -> bool:
        """Whether PEFT would wrap this module: target_modules less those excluded or saved."""
        if self.saves(name):
            return False
        if self.config.exclude_modules and self.fits(self.config.exclude_modules, name):
            return False
        if self.config.all_linear:
            return linear_shape(module) is not None
        if not self.fits(self.config.target_modules, name):
            return False
        wanted = self.config.layers
        return wanted is None or self.layers[name] in wanted

    def saves(self, name: str) -> bool:
        """Whether this module is, or lies in, one of modules_to_save."""
        parts = name.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(self.fits(self.config.modules_to_save, path) for path in paths)

    def may_save(self, name: str) -> bool:
        """Whether PEFT would save this module: its name ends in an entry, after a dot or not."""
        return any(s.endswith(e) for e in self.config.modules_to_save for s in self.spelled[name])

    def has_expert_weights(self, name: str) -> bool:
        """Whether target_parameters names weights of this module."""
        entries = self.config.target_parameters
        owners = [entry.rpartition(".")[0] for entry in entries]
        return self.fits(owners, name) or any(
            "." not in entry and f"{name}.{entry}" in self.ends for entry in entries
        )

    def token_ids(self, name: str) -> list[int] | None:
        """The trained tokens of the embedding, or of the head, of this name."""
        tokens = self.config.tokens
        if not isinstance(tokens, dict):
            return tokens
        return next((ids for entry, ids in tokens.items() if self.fits([entry], name)), None)

    def _by_pattern(self, patterns: dict[str, Number], name: str, default: Number) -> Number:
        fits = (v for p, v in patterns.items() if name in self.fitting[_of_pattern(p)])
        return next(fits, default)


def _of_pattern(pattern: str) -> str:
    """The expression that PEFT makes of a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({pattern})"


def matched(config: LoRAConfig, found: Located, where: str) -> MatchedConfig:
    """The configuration for a model whose modules a file was compared with.

    Raises:
        ValueError: an invalid expression, or one that takes too long.
    """
    own = {name: frozenset((name, *found.spelled.get(name, ())))
           for name in (*found.modules, *found.experts)}  # fmt: skip
    expressions = [_of_pattern(p) for p in (*config.rank_pattern, *config.alpha_pattern)]
    for target in (config.target_modules, config.exclude_modules):
        if isinstance(target, str) and target.lower() != "all-linear":
            expressions.append(target)
    everything = sorted({spelling for names in own.values() for spelling in names})
    fits = {
        expression: {name for name, names in own.items() if names & fitted}
        for expression, fitted in fitting(expressions, everything, where).items()
    }
    layers: dict[str, int | None] = {}
    if config.layers is not None:
        numbers = layer_numbers(config.layers_pattern, everything, where)
        for name, names in own.items():
            several = [numbers[s] for s in sorted(names, key=lambda s: s == name)]
            layers[name] = next((number for number in several if number is not None), None)
    ends = {name: frozenset(end for s in names for end in _ends(s)) for name, names in own.items()}
    return MatchedConfig(config, own, fits, layers, ends)


def _ends(name: str) -> list[str]:
    """The name, and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
