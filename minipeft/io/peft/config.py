"""adapter_config.json: the fields, PEFT's rules for names, what is refused.

Source: PEFT 0.21, `LoraConfig` as its `save_pretrained` writes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import nn

from minipeft.extras import BIAS_MODES
from minipeft.io.peft.patterns import fitting
from minipeft.io.replace import current
from minipeft.io.tensors import parse_object
from minipeft.protocol import linear_shape

Number = TypeVar("Number", int, float)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LARGEST_CONFIG = 2**24  # bytes; real ones have a few thousand
_LARGEST_NUMBER = 2**31

# Fields that change what is computed or saved in ways that no layer here has.  They may be absent
# or hold a value that means "off" (None, False, empty).
_MUST_BE_OFF = {
    "use_qalora", "use_bdlora", "lora_bias", "layers_to_transform", "layers_pattern",
    "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "megatron_config", "monteclora_config", "velora_config",
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
    dora: bool = False
    bias: str = "none"
    modules_to_save: list[str] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)
    tokens: list[int] | dict[str, list[int]] | None = None
    tied: bool = False
    content: dict[str, object] = field(default_factory=dict, compare=False, repr=False)  # all of it

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

    def unused_patterns(self) -> list[str]:
        """Keys of rank_pattern and alpha_pattern that fit no module of the model."""
        keys = (*self.config.rank_pattern, *self.config.alpha_pattern)
        return [key for key in keys if not self.fitting[_of_pattern(key)]]

    def targets(self, name: str, module: nn.Module) -> bool:
        """Whether PEFT would wrap this module: target_modules less those excluded or saved."""
        if self.saves(name):
            return False
        if self.config.exclude_modules and self._fits(self.config.exclude_modules, name):
            return False
        if self.config.all_linear:
            return linear_shape(module) is not None
        return self._fits(self.config.target_modules, name)

    def saves(self, name: str) -> bool:
        """Whether this module is, or lies in, one of modules_to_save."""
        parts = name.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(self._fits(self.config.modules_to_save, path) for path in paths)

    def targets_parameter(self, name: str) -> bool:
        """Whether target_parameters names this 3-D weight."""
        return self._fits(self.config.target_parameters, name)

    def has_expert_weights(self, name: str) -> bool:
        """Whether target_parameters names weights of this module."""
        owners = [entry.rpartition(".")[0] for entry in self.config.target_parameters]
        return self._fits(owners, name)

    def token_ids(self, name: str) -> list[int] | None:
        """The trained tokens of the embedding of this name."""
        tokens = self.config.tokens
        if not isinstance(tokens, dict):
            return tokens
        return next((ids for entry, ids in tokens.items() if self._fits([entry], name)), None)

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


def _list(config: dict[str, object], key: str, where: str) -> list[str]:
    names = _names(config, key, where) or []
    if isinstance(names, str):
        raise ValueError(f"{where}: {key} is {names!r}, expected a list of names")
    return names


def _tokens(config: dict[str, object], where: str) -> list[int] | dict[str, list[int]] | None:
    key = "trainable_token_indices"
    value = config.get(key)
    lists = list(value.values()) if isinstance(value, dict) else [value]
    if not value:
        return None
    for ids in lists:
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids) or not ids:
            raise ValueError(f"{where}: {key} is {str(value)[:80]}, expected token numbers")
    return value  # type: ignore[return-value]


def read_config(path: Path) -> LoRAConfig:
    """Read and check adapter_config.json.

    Raises:
        ValueError: no such file, no JSON, another kind of adapter, a field with a value that no
            layer here has, or an unknown field that is switched on (each named).
    """
    place = current(path)
    if not place.is_file():
        hint = "; it holds a prefix_config.json: use io.ptuning.load_prefix"
        raise ValueError(
            f"{path}: no such file; expected a directory that PEFT or save_peft wrote"
            f"{hint if (path.parent / 'prefix_config.json').is_file() else ''}"
        )
    if (size := place.stat().st_size) > LARGEST_CONFIG:
        raise ValueError(f"{path}: {size} bytes are too many for a configuration")
    config, where = parse_object(place.read_bytes(), str(path)), path.name
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{where}: peft_type is {config.get('peft_type')!r}; expected 'LORA', or one of the "
            "prompt-learning kinds"
        )
    known = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
             "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias", "modules_to_save",
             "target_parameters", "trainable_token_indices", "ensure_weight_tying",
             *_IGNORABLE}  # fmt: skip
    for key, value in config.items():
        if (
            key not in known
            and value is not None
            and value is not False
            and value not in ([], {}, "")
        ):
            what = "is not supported" if key in _MUST_BE_OFF else "is no field known here"
            raise ValueError(f"{where}: {key} = {value!r} {what}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        raise ValueError(
            f"{where}: init_lora_weights = {init!r} changed the base weights; convert the adapter "
            "to a plain LoRA where it was made (PEFT: path_initial_model_for_weight_conversion)"
        )
    for key in ("use_rslora", "use_dora", "ensure_weight_tying"):
        if not isinstance(config.get(key), bool | None):
            raise ValueError(f"{where}: {key} is {config[key]!r}, expected true or false")
    bias = config.get("bias") or "none"
    if bias not in ("none", *BIAS_MODES):
        raise ValueError(f"{where}: bias is {bias!r}, expected 'none', 'all' or 'lora_only'")
    target = _names(config, "target_modules", where)
    parameters = _list(config, "target_parameters", where)
    saved, tokens = _list(config, "modules_to_save", where), _tokens(config, where)
    if not (target or parameters or saved or tokens or bias != "none"):
        raise ValueError(f"{where}: target_modules is {target!r}, expected names")
    ranks: dict[str, object] = {**_patterns(config, "rank_pattern", where)}
    return LoRAConfig(
        rank=_rank(config, "r", 8, where),
        alpha=_number(config, "lora_alpha", 8, where),
        target_modules=target or [],
        exclude_modules=_names(config, "exclude_modules", where),
        dropout=_number(config, "lora_dropout", 0.0, where),
        rank_stabilized=config.get("use_rslora") is True,
        rank_pattern={k: _rank(ranks, k, 8, f"{where}: rank_pattern") for k in ranks},
        alpha_pattern=_patterns(config, "alpha_pattern", where),
        dora=config.get("use_dora") is True,
        bias=bias,
        modules_to_save=saved,
        target_parameters=parameters,
        tokens=tokens,
        tied=config.get("ensure_weight_tying") is True,
        content=config,
    )
