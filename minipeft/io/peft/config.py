"""adapter_config.json: what its fields say, each checked.

Source: PEFT 0.21, `LoraConfig` as its `save_pretrained` writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minipeft.io import fields
from minipeft.io.fields import Kind
from minipeft.model.train import BIAS_MODES

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OTHER_READER = "minipeft.io.lora.load_lora(model, path)"  # of other programs' files


@dataclass(frozen=True)
class LoRAConfig:
    """The part of the file that says what to compute."""

    rank: int = 8
    alpha: float = 8
    target_modules: frozenset[str] | str = frozenset()
    exclude_modules: frozenset[str] | str | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dora: bool = False
    bias: str = "none"
    modules_to_save: frozenset[str] = frozenset()
    target_parameters: frozenset[str] = frozenset()
    tokens: list[int] | dict[str, list[int]] | None = None
    tied: bool = False
    lora_bias: bool = False
    layers: list[int] | None = None  # layers_to_transform; None: all
    layers_pattern: list[str] = field(default_factory=list)
    ignored: dict[str, object] = field(default_factory=dict)  # fields that were read past

    @property
    def all_linear(self) -> bool:
        """Whether target_modules is "all-linear"."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"


_RANK = Kind(  # 8.0 is 8
    "a whole number of at least 1",
    lambda value: fields.NUMBER.fits(value) and value >= 1 and value == int(value),  # type: ignore[operator, call-overload]
)
_TOKENS = Kind(
    "token numbers", lambda value: fields.list_of(fields.whole(0)).fits(value) and value != []
)
_OBJECT = Kind("an object", lambda value: isinstance(value, dict))
_TARGETS = fields.either(fields.NAMES, Kind("an expression", fields.TEXT.fits))
_INTEGER = Kind("a whole number", lambda value: type(value) is int)
# What is computed with: the field, its name in LoRAConfig, and what it may hold.
_FIELDS = {
    "r": ("rank", _RANK),
    "lora_alpha": ("alpha", fields.NUMBER),
    "lora_dropout": ("dropout", fields.NUMBER),
    "target_modules": ("target_modules", _TARGETS),
    "exclude_modules": ("exclude_modules", _TARGETS),
    "modules_to_save": ("modules_to_save", fields.NAMES),
    "target_parameters": ("target_parameters", fields.NAMES),
    "trainable_token_indices": ("tokens", fields.either(_TOKENS, _OBJECT)),
    "layers_to_transform": ("layers", fields.either(_INTEGER, fields.list_of(_INTEGER))),
    "layers_pattern": ("layers_pattern", fields.either(fields.TEXT, fields.NAMES)),
    "rank_pattern": ("rank_pattern", _OBJECT),
    "alpha_pattern": ("alpha_pattern", _OBJECT),
    "use_rslora": ("rank_stabilized", fields.TRUTH),
    "use_dora": ("dora", fields.TRUTH),
    "lora_bias": ("lora_bias", fields.TRUTH),
    "ensure_weight_tying": ("tied", fields.TRUTH),
    "bias": ("bias", fields.one_of("none", *BIAS_MODES)),
}
_IN_OBJECTS = {
    "rank_pattern": _RANK, "alpha_pattern": fields.NUMBER, "trainable_token_indices": _TOKENS,
}  # fmt: skip
_NUMBERS = ("r", "lora_alpha", "lora_dropout")  # null is refused, not passed over as unused

# the values of peft_type that are read
PROMPT_KINDS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "CARTRIDGE")
READ_KINDS = ("LORA", *PROMPT_KINDS)

# Fields that ask for something that no layer here computes.  They may be absent, or off: None,
# False or empty.
_MUST_BE_OFF = {
    "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "megatron_config", "monteclora_config", "velora_config", "enable_lora",
}  # fmt: skip
_IGNORABLE = fields.ORIGIN | {"fan_in_fan_out", "peft_type"}
# Initialisations that rewrite the base: the adapter alone is meaningless on the original base.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")


def _ignored(config: dict[str, object], where: str, *, strict: bool) -> dict[str, object]:
    """The fields that are not used: other trainers', and with strict=False unknown ones.

    Raises:
        ValueError: another kind of adapter; a field that asks for what no layer here computes; an
            initialisation that changed the base; with `strict` a field that is not known here.
    """
    kind = config.get("peft_type")
    if kind is None and ("lora_parameters" in config or "fine_tune_type" in config):
        raise ValueError(f"{where}: is of MLX, not of PEFT; {OTHER_READER} reads it")
    if kind != "LORA":
        raise ValueError(
            f"{where}: peft_type is {kind!r:.80}; read are {', '.join(READ_KINDS)} (other kinds: "
            "load them with PEFT, which can turn some into LoRA)"
        )
    ignored: dict[str, object] = {}
    for key, value in config.items():
        if fields.is_off(value) or key in _FIELDS or key in _IGNORABLE:
            continue
        if key in _MUST_BE_OFF:
            raise ValueError(f"{where}: {key} = {value!r:.80} is not supported")
        if strict and key not in fields.ORIGIN_ELSEWHERE:
            raise ValueError(
                f"{where}: {key:.80} = {value!r:.80} is no field known here; strict=False reads "
                "past it"
            )
        ignored[key] = value
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        raise ValueError(
            f"{where}: init_lora_weights = {init!r:.80} changed the base weights; convert the "
            "adapter to a plain LoRA where it was made (PEFT: "
            "path_initial_model_for_weight_conversion)"
        )
    return ignored


def _check_layers(config: Mapping[str, object], where: str) -> None:
    """Raise ValueError if fields that choose layers do not go together."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if pattern and layers is None:
        raise ValueError(f"{where}: layers_pattern is {pattern!r:.80} without layers_to_transform")
    if isinstance(config.get("target_modules"), str) and (pattern or layers is not None):
        raise ValueError(
            f"{where}: layers_to_transform and layers_pattern go with a list of target_modules, "
            "not with an expression"
        )


def checked(content: dict[str, object], *, strict: bool = True) -> LoRAConfig:
    """What the content of adapter_config.json says, each field checked.

    Raises:
        ValueError: another kind of adapter, a field with a value that no layer here has, or with
            `strict` an unknown field that is switched on (each named).
    """
    where = CONFIG_NAME
    ignored = _ignored(content, where, strict=strict)
    config: dict[str, Any] = {
        key: value for key, value in content.items()
        if key in _NUMBERS or not fields.is_off(value)
    }  # fmt: skip
    fields.check(where, config, {key: kind for key, (_, kind) in _FIELDS.items()})
    for key, kind in _IN_OBJECTS.items():
        if isinstance(inner := config.get(key), dict):
            fields.check(f"{where}: {key}", inner, dict.fromkeys(inner, kind))
    chosen = ("target_modules", "target_parameters", "modules_to_save", "trainable_token_indices")
    if config.get("bias", "none") == "none" and not any(key in config for key in chosen):
        raise ValueError(
            f"{where}: target_modules is {content.get('target_modules')!r}, expected names"
        )
    _check_layers(content, where)
    for key in ("layers_to_transform", "layers_pattern"):
        if key in config and not isinstance(config[key], list):
            config[key] = [config[key]]
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key] = frozenset(config[key])
    own = {name: config[key] for key, (name, _) in _FIELDS.items() if key in config}
    ranks = {key: int(value) for key, value in config.get("rank_pattern", {}).items()}
    own |= {"rank": int(config.get("r", 8)), "rank_pattern": ranks}
    return LoRAConfig(**own, ignored=ignored)
