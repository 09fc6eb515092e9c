"""A model's adapters as directories that PEFT and minipeft load."""

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME
from minipeft.io.peft.keys import PREFIX
from minipeft.io.peft.prompts import describe_prompts, prompt_in, write_prompts
from minipeft.io.peft.tensors import written, written_experts
from minipeft.io.ptuning.save import gathered_by_id, is_prompt
from minipeft.io.tensors import check_writable, write_atomically, write_tensors
from minipeft.layers.lora_experts import LoRAExperts
from minipeft.layers.lora_tied import LoRATiedLinear
from minipeft.layers.trained import TrainedBias, TrainedLogits, TrainedModule, TrainedTokens
from minipeft.lora import LowRank
from minipeft.protocol import is_conv1d
from minipeft.registry import DEFAULT, adapters_called, named
from minipeft.targets import matches, visible_modules
from minipeft.wrapper import innermost


@dataclass
class _Collected:
    """One adapter's layers by kind, and its tensors by their keys."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    experts: dict[str, LoRAExperts] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    tied: bool = False
    own_bases: list[str] = field(default_factory=list)  # LoftQ gave them other codes


def _collect(model: nn.Module, name: str, *, beside_prefix: bool = False) -> _Collected:
    found = _Collected()
    by_module: dict[str, list[LoRAExperts]] = {}
    for place, stack in adapters_called("save_peft", model, name).items():
        if beside_prefix and is_prompt(place):
            continue
        if not place or (isinstance(stack[0], LoRAExperts) and "." not in place):
            raise ValueError(
                "save_peft: the model is the adapter layer itself, which has no name in PEFT's "
                "format; save the module that holds it"
            )
        for layer in stack:
            if isinstance(layer, LoRAExperts):
                found.experts[place] = layer
                by_module.setdefault(place.rpartition(".")[0], []).append(layer)
            elif isinstance(layer, TrainedBias):
                found.biases.append(place)
            elif isinstance(layer, TrainedModule):
                found.saved.append(place)
                copied = layer.copy.state_dict(keep_vars=True)
                found.tensors |= {f"{place}.{own}": value for own, value in copied.items()}
            elif isinstance(layer, TrainedTokens):
                found.tokens[place] = layer.token_ids.tolist()
                found.tensors[f"{place}.token_adapter.trainable_tokens_delta"] = layer.token_rows
            elif isinstance(layer, TrainedLogits):
                pass  # PEFT follows tied weights by itself
            elif isinstance(layer, LoRATiedLinear):
                found.tied = True
                found.tensors |= written(place, layer)
            else:
                if isinstance(layer, nn.Module) and "codes_before" in layer.__dict__:
                    found.own_bases.append(place)
                found.tensors |= written(place, layer)  # type: ignore[arg-type]
                if place in found.low_rank:
                    raise ValueError(f"save_peft: two layers of {name!r} over {place}")
                found.low_rank[place] = layer  # type: ignore[assignment]
    for owner, layers in by_module.items():
        found.tensors |= written_experts(owner, layers)
    for place in found.biases:
        layer = next(a for a in adapters_called("save_peft", model, name)[place]
                     if isinstance(a, TrainedBias))  # fmt: skip
        inner = ".base_layer" if place in found.low_rank else ""
        found.tensors[f"{place}{inner}.bias"] = layer.trained_bias()
    return found


def _target_modules(model: nn.Module, names: set[str]) -> list[str] | str:
    """What names exactly these modules by PEFT's rules: last components, full names, or a regex.

    PEFT compares with every module, wrappers excluded, so a short name must not fit another.
    """
    if not names:
        return []
    everything = visible_modules(model)
    wrapped = {id(everything[name]) for name in names}
    for candidate in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        fitting = [m for n, m in everything.items() if matches(candidate, n, m)]
        if {id(module) for module in fitting} == wrapped:
            return candidate
    return "|".join(re.escape(name) for name in sorted(names))


def _rank_and_alpha(layer: LowRank, stabilized: bool) -> tuple[int, float]:
    """Of the product as it is written: twice the rank where a start is subtracted."""
    twice = 2 if getattr(layer, "lora_a0", None) is not None else 1
    ranks = getattr(layer, "written_rank", None)  # a fused projection's ranks add up
    rank = ranks if isinstance(ranks, int) else twice * layer.rank
    return rank, layer.scaling * (rank**0.5 if stabilized else rank)


def _number(value: float) -> float | int:
    nearest = round(value)
    return nearest if abs(value - nearest) <= 1e-12 * max(1, abs(value)) else value


def _only(what: str, values: set[Any]) -> Any:
    if len(values) > 1:
        raise ValueError(
            f"save_peft: the layers have different {what} {sorted(values)}, and PEFT's format has "
            "one for an adapter"
        )
    return values.pop() if values else None


def _config(model: nn.Module, found: _Collected) -> dict[str, object]:
    layers: dict[str, LowRank] = {**found.low_rank, **found.experts}
    stabilized = bool(layers) and all(layer.rank_stabilized for layer in layers.values())
    # where only some layers are rank-stabilised, alpha carries the factor: alpha / rank = scaling
    numbers = {n: _rank_and_alpha(layer, stabilized) for n, layer in layers.items()}
    ranks = {n: rank for n, (rank, _) in numbers.items()}
    alphas = {n: _number(alpha) for n, (_, alpha) in numbers.items()}
    first = list(found.experts or layers)  # patterns cannot tell expert weights apart
    rank = Counter(ranks[n] for n in first).most_common(1)[0][0] if first else 8
    alpha = Counter(alphas[n] for n in first).most_common(1)[0][0] if first else 8
    if any((ranks[n], alphas[n]) != (rank, alpha) for n in found.experts):
        raise ValueError("save_peft: expert weights of different ranks, which PEFT's format lacks")
    dora = _only("kinds", {"magnitude" in layer._parameters for layer in layers.values()})
    name_or_path = getattr(getattr(model, "config", None), "name_or_path", None)
    bias = "none"
    if found.biases:
        bias = "lora_only" if set(found.biases) <= set(found.low_rank) else "all"
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": name_or_path or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _only("dropouts", {layer.dropout for layer in layers.values()}) or 0.0,
        "target_modules": _target_modules(model, set(found.low_rank)),
        "target_parameters": sorted(found.experts) or None,
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "use_rslora": stabilized,
        "fan_in_fan_out": any(is_conv1d(innermost(layer)) for layer in layers.values()),
        "bias": bias,
        "use_dora": bool(dora),
        "modules_to_save": sorted(found.saved) or None,
        "trainable_token_indices": found.tokens or None,
        "ensure_weight_tying": found.tied or _tied_copies(model, found.saved),
        "init_lora_weights": True,
    }


def _tied_copies(model: nn.Module, saved: list[str]) -> bool:
    """Whether two of the modules saved whole share a parameter in their copies."""
    seen: set[int] = set()
    for name in saved:
        own = {id(p) for p in model.get_submodule(name).adapter_parameters().values()}  # type: ignore[operator]
        if own & seen:
            return True
        seen |= own
    return False


def save_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    beside_prefix: bool = False,
) -> list[str]:
    """Save the model's adapters in PEFT's format; returns the names of their modules.

    The adapter "default" goes into directory `path`, others into subdirectories of their names;
    `name` saves one adapter, into `path` itself.  Writes adapter_model.safetensors (a sha256 for
    each tensor) and adapter_config.json, each under a temporary name first.  The same whether
    merged or not; the runtime factor of `scale_adapters` is not part of an adapter and is not
    saved.  An initialisation that subtracts its start is written as the plain LoRA of twice the
    rank that it is.  `state_dict` gives values gathered elsewhere (a sharded model's), under the
    model's own names.  `beside_prefix` leaves out prefixes and prompts: they are written by
    io.ptuning.save_prefix.

    Raises:
        ValueError: no adapter, one that PEFT's format cannot express (prompts.py says which
            prefixes; io.ptuning.save_prefix writes all), or parameters whose
            values are not here.  Nothing is written then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_peft: expected a module, got {type(model).__name__}")
    names = list(named(model)) if name is None else [name]
    if not names:
        raise ValueError("save_peft: the model has no adapter; inject one first")
    collected = {}
    gathered = gathered_by_id(model, state_dict or {})
    prompts = {n: describe_prompts(model, n, gathered) for n in names
               if not beside_prefix and prompt_in(model, n) is not None}  # fmt: skip
    for adapter in names:
        if adapter in prompts:
            continue
        found = _collect(model, adapter, beside_prefix=beside_prefix)
        tensors = {f"{PREFIX}{key}": gathered.get(id(value), value)
                   for key, value in found.tensors.items()}  # fmt: skip
        collected[adapter] = found, _config(model, found), tensors
        if found.own_bases:
            warnings.warn(
                f"save_peft: LoftQ gave {found.own_bases[0]} ({len(found.own_bases)} layers) other "
                "codes, which an adapter file does not hold; it fits this base only: keep it with "
                "io.bitsandbytes.save_quantized",
                stacklevel=2,
            )
    for everything in (prompts, collected):
        for found_tensors in everything.values():
            check_writable(found_tensors[-1])
    touched: list[str] = []
    for adapter, (config, tensors) in prompts.items():
        alone = name is not None or adapter == DEFAULT
        write_prompts(Path(path) if alone else Path(path) / adapter, config, tensors)
        touched += adapters_called("save_peft", model, adapter)
    for adapter, (found, config, tensors) in collected.items():
        alone = name is not None or adapter == DEFAULT
        directory = Path(path) if alone else Path(path) / adapter
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / WEIGHTS_NAME, tensors)
        write_atomically(
            directory / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True).encode()
        )
        touched += [*found.low_rank, *found.experts, *found.biases, *found.saved, *found.tokens]
    return list(dict.fromkeys(touched))
