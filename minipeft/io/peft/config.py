"""adapter_config.json of a plain LoRA: the fields, PEFT's rules for names, what is refused.

Source: PEFT 0.21, `LoraConfig` as its `save_pretrained` writes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import nn

from minipeft.io.peft.patterns import fitting
from minipeft.io.tensors import parse_object
from minipeft.protocol import is_conv1d

Number = TypeVar("Number", int, float)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_LARGEST_CONFIG = 2**24  # bytes; real ones have a few thousand
_LARGEST_NUMBER = 2**31

# Fields that change what is computed or saved in ways that a plain LoRA does not have.  They may
# be absent or hold a value that means "off" (None, False, empty, or the one named here).
_MUST_BE_OFF: dict[str, tuple[object, ...]] = {
    "bias": ("none",), "use_dora": (), "use_qalora": (), "use_bdlora": (), "lora_bias": (),
    "modules_to_save": (), "layers_to_transform": (), "layers_pattern": (),
    "layer_replication": (), "trainable_token_indices": (), "target_parameters": (),
    "alora_invocation_tokens": (), "arrow_config": (), "kasa_config": (), "megatron_config": (),
    "monteclora_config": (), "velora_config": (), "ensure_weight_tying": (),
}  # fmt: skip
# Fields that say where the adapter comes from, or how it was initialised.
_IGNORABLE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Initialisations that rewrite the base: the adapter alone is meaningless on the original base.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")


@dataclass(frozen=True)
class LoRAConfig:
    """The part of the file that says what to compute."""

    rank: int
    alpha: float
    target_modules: list[str] | str
    exclude_modules: list[str] | str | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    @property
    def all_linear(self) -> bool:
        """Whether target_modules is "all-linear"."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def of_model(self, names: Iterable[str], where: str) -> "MatchedConfig":
        """The same with its expressions matched against a model's module names.

        Raises:
            ValueError: an expression that is none, or takes too long.
        """
        expressions = [_of_pattern(p) for p in (*self.rank_pattern, *self.alpha_pattern)]
        for target in (self.target_modules, self.exclude_modules):
            if isinstance(target, str) and target.lower() != "all-linear":
                expressions.append(target)
        return MatchedConfig(self, fitting(expressions, names, where))


@dataclass(frozen=True)
class MatchedConfig:
    """What a configuration says for each module of one model."""

    config: LoRAConfig
    fitting: dict[str, set[str]]  # expression: the names it matches

    def rank_of(self, name: str) -> int:
        """The rank for a module: the first pattern that fits, in PEFT's way, or the default."""
        return self._by_pattern(self.config.rank_pattern, name, self.config.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha for a module, in the same way."""
        return self._by_pattern(self.config.alpha_pattern, name, self.config.alpha)

    def targets(self, name: str, module: nn.Module) -> bool:
        """Whether PEFT would wrap this module: target_modules less exclude_modules."""
        if self.config.exclude_modules and self._fits(self.config.exclude_modules, name):
            return False
        if self.config.all_linear:
            return isinstance(module, nn.Linear) or is_conv1d(module)
        return self._fits(self.config.target_modules, name)

    def _by_pattern(self, patterns: dict[str, Number], name: str, default: Number) -> Number:
        fits = (v for p, v in patterns.items() if name in self.fitting[_of_pattern(p)])
        return next(fits, default)

    def _fits(self, target: list[str] | str, name: str) -> bool:
        if isinstance(target, str):
            return name in self.fitting[target]
        return any(name == entry or name.endswith(f".{entry}") for entry in target)


def _of_pattern(pattern: str) -> str:
    """The expression that PEFT makes of a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({pattern})"


def _number(config: dict[str, object], key: str, default: float, where: str) -> float:
    value = config.get(key, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (not -_LARGEST_NUMBER < value < _LARGEST_NUMBER)
    ):
        raise ValueError(f"{where}: {key} is {value!r}, expected a number")
    return value


def _rank(config: dict[str, object], key: str, default: int, where: str) -> int:
    value = _number(config, key, default, where)
    if value != int(value) or value < 1:
        raise ValueError(f"{where}: {key} is {value!r}, expected a whole number of at least 1")
    return int(value)


def _patterns(config: dict[str, object], key: str, where: str) -> dict[str, float]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} is {value!r}, expected an object")
    for pattern in value:
        _number(value, pattern, 0, f"{where}: {key}")
    return value


def _names(config: dict[str, object], key: str, where: str) -> list[str] | str | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return value
    raise ValueError(f"{where}: {key} is {value!r}, expected a list of names or an expression")


def read_config(path: Path) -> LoRAConfig:
    """Read and check adapter_config.json.

    Raises:
        ValueError: no such file, no JSON, another kind of adapter, a field with a value that a
            plain LoRA does not have, or an unknown field that is switched on (each named).
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a directory that PEFT or minipeft wrote")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for a configuration")
    config, where = parse_object(path.read_bytes(), str(path)), path.name
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    known = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
             "use_rslora", "rank_pattern", "alpha_pattern", *_IGNORABLE}  # fmt: skip
    for key, value in config.items():
        off = value is None or value is False or value in ([], {}, "", *_MUST_BE_OFF.get(key, ()))
        if key not in known and not off:
            raise ValueError(f"{where}: {key} = {value!r} is not supported for a plain LoRA")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        raise ValueError(
            f"{where}: init_lora_weights = {init!r} changed the base weights; convert the adapter "
            "to a plain LoRA where it was made (PEFT: path_initial_model_for_weight_conversion)"
        )
    if not isinstance(config.get("use_rslora", False), bool):
        raise ValueError(f"{where}: use_rslora is {config['use_rslora']!r}, expected true or false")
    target = _names(config, "target_modules", where)
    if not target:
        raise ValueError(f"{where}: target_modules is {target!r}, expected names")
    ranks: dict[str, object] = {**_patterns(config, "rank_pattern", where)}
    return LoRAConfig(
        rank=_rank(config, "r", 8, where),
        alpha=_number(config, "lora_alpha", 8, where),
        target_modules=target,
        exclude_modules=_names(config, "exclude_modules", where),
        dropout=_number(config, "lora_dropout", 0.0, where),
        rank_stabilized=config.get("use_rslora") is True,
        rank_pattern={k: _rank(ranks, k, 8, f"{where}: rank_pattern") for k in ranks},
        alpha_pattern=_patterns(config, "alpha_pattern", where),
    )
