"""adapter_config.json: what its fields say, each checked.

Source: PEFT 0.21, `LoraConfig` as its `save_pretrained` writes it.
"""

from dataclasses import dataclass, field
from pathlib import Path

from minipeft.io.files import parse_object
from minipeft.io.peft.fields import check_fields
from minipeft.io.replace import current
from minipeft.model.train import BIAS_MODES

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LARGEST_CONFIG = 2**24  # bytes; real ones have a few thousand
_LARGEST_NUMBER = 2**31


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
    lora_bias: bool = False
    layers: list[int] | None = None  # layers_to_transform; None: all
    layers_pattern: list[str] = field(default_factory=list)
    ignored: dict[str, object] = field(default_factory=dict)  # fields that were read past
    content: dict[str, object] = field(default_factory=dict, compare=False, repr=False)  # all of it

    @property
    def all_linear(self) -> bool:
        """Whether target_modules is "all-linear"."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"


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


def _layers(config: dict[str, object], where: str) -> tuple[list[int] | None, list[str]]:
    """layers_to_transform and layers_pattern; no layers: all of them."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern") or []
    numbers = [layers] if type(layers) is int else layers
    if numbers is not None and not (
        isinstance(numbers, list) and all(type(number) is int for number in numbers)
    ):
        raise ValueError(f"{where}: layers_to_transform is {layers!r:.80}, expected whole numbers")
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{where}: layers_pattern is {pattern!r:.80}, expected names")
    if patterns and numbers is None:
        raise ValueError(f"{where}: layers_pattern is {pattern!r:.80} without layers_to_transform")
    if isinstance(config.get("target_modules"), str) and (patterns or numbers is not None):
        raise ValueError(
            f"{where}: layers_to_transform and layers_pattern go with a list of target_modules, "
            "not with an expression"
        )
    return numbers or None, patterns


def read_config(path: Path, *, strict: bool = True) -> LoRAConfig:
    """Read and check adapter_config.json.

    Raises:
        ValueError: no such file, no JSON, another kind of adapter, a field with a value that no
            layer here has, or with `strict` an unknown field that is switched on (each named).
    """
    place = current(path)
    if not place.is_file():
        hint = "; it holds a prefix_config.json: use io.prefixes.load_prefix"
        raise ValueError(
            f"{path}: no such file; expected a directory that PEFT or save_peft wrote"
            f"{hint if (path.parent / 'prefix_config.json').is_file() else ''}"
        )
    if (size := place.stat().st_size) > LARGEST_CONFIG:
        raise ValueError(f"{path}: {size} bytes are too many for a configuration")
    config, where = parse_object(place.read_bytes(), str(path)), path.name
    content = dict(config)
    ignored = check_fields(config, where, strict=strict)
    for key in ("use_rslora", "use_dora", "ensure_weight_tying", "lora_bias"):
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
    layers, layers_pattern = _layers(config, where)
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
        lora_bias=config.get("lora_bias") is True,
        layers=layers,
        layers_pattern=layers_pattern,
        ignored=ignored,
        content=content,
    )
