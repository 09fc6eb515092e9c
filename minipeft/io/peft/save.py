"""A model's LoRA adapters as a directory that PEFT and minipeft load."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from minipeft.adapters import require_adapters
from minipeft.io.peft.config import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from minipeft.io.tensors import write_atomically, write_tensors
from minipeft.lora import LoRALinear
from minipeft.protocol import is_conv1d, linear_shape
from minipeft.targets import matches, visible_modules


def _target_modules(model: nn.Module, names: set[str]) -> list[str] | str:
    """What names exactly these modules by PEFT's rules: last components, full names, or a regex.

    PEFT compares with every module, wrappers excluded, so a short name must not fit another.
    """
    everything = visible_modules(model)
    wrapped = {id(everything[name]) for name in names}
    for candidate in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        fitting = [m for n, m in everything.items() if matches(candidate, n, m)]
        if {id(module) for module in fitting} == wrapped:
            return candidate
    return "|".join(re.escape(name) for name in sorted(names))


def _config(model: nn.Module, layers: Mapping[str, LoRALinear]) -> dict[str, object]:
    stabilized = all(layer.rank_stabilized for layer in layers.values())
    # where only some layers are rank-stabilised, alpha carries the factor: alpha / rank = scaling
    alphas = {
        name: layer.alpha if stabilized else layer.scaling * layer.rank
        for name, layer in layers.items()
    }
    ranks = {name: layer.rank for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    dropouts = {layer.dropout for layer in layers.values()}
    if len(dropouts) > 1:
        raise ValueError(
            f"save_peft: the layers have different dropouts {sorted(dropouts)}, and PEFT's format "
            "has one; set layer.dropout alike"
        )
    name_or_path = getattr(getattr(model, "config", None), "name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": name_or_path or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropouts.pop(),
        "target_modules": _target_modules(model, set(layers)),
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "use_rslora": stabilized,
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def save_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Save the model's LoRA adapters in PEFT's format into directory `path`; returns their names.

    Writes adapter_model.safetensors (factors as they are, a sha256 for each) and
    adapter_config.json, each under a temporary name first.  The same whether merged or not; the
    runtime factor of `scale_adapters` is not part of an adapter and is not saved.  `state_dict`
    gives values gathered elsewhere (a sharded model's), under the model's own names.

    Raises:
        ValueError: no adapter, one that PEFT's LoRA format cannot express, or parameters whose
            values are not here.
    """
    adapters = require_adapters("save_peft", model)
    layers: dict[str, LoRALinear] = {}
    for name, adapter in adapters.items():
        if not isinstance(adapter, LoRALinear) or linear_shape(adapter) is None:
            raise ValueError(
                f"save_peft: {name} is a {type(adapter).__name__}, which PEFT's LoRA format cannot "
                "express; use adapter_state_dict with safetensors"
            )
        if not name:
            raise ValueError(
                "save_peft: the model is the adapter layer itself, which has no name in PEFT's "
                "format; save the module that holds it"
            )
        layers[name] = adapter
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for own, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            value = (state_dict or {}).get(f"{name}.{own}", getattr(layer, own))
            tensors[f"{PREFIX}{name}.{theirs}.weight"] = value
    config = json.dumps(_config(model, layers), indent=2, sort_keys=True)
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS_NAME, tensors)
    write_atomically(directory / CONFIG_NAME, config.encode())
    return list(layers)
