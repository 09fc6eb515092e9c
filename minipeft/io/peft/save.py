"""A model's adapters as directories that PEFT and minipeft load."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.buffers import changed_buffers, complaint
from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME
from minipeft.io.peft.keys import PREFIX
from minipeft.io.peft.prompts import describe_prompts, prompt_in
from minipeft.io.peft.tensors import written, written_experts
from minipeft.io.peft.training import described, half
from minipeft.io.ptuning.save import gathered_by_id, is_prompt
from minipeft.io.replace import Replacement
from minipeft.io.seal import stage
from minipeft.io.tensors import check_writable
from minipeft.layers.lora_experts import LoRAExperts
from minipeft.layers.lora_fused import LoRAFusedLinear
from minipeft.layers.lora_tied import LoRATiedLinear
from minipeft.layers.trained import TrainedBias, TrainedLogits, TrainedModule, TrainedTokens
from minipeft.lora import LowRank, lora_scaling
from minipeft.prefix import PrefixEncoder
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
    alone: dict[str, str] = field(default_factory=dict)  # adapters over no module: class names
    scales: dict[str, tuple[float, bool]] = field(default_factory=dict)  # as a reader finds them


@dataclass
class Described:
    """One adapter as its files hold it, and the modules that it is over."""

    config: dict[str, object]
    tensors: dict[str, Tensor]
    training: dict[str, object]
    modules: list[str]


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
            if getattr(layer, "base", None) is None:
                found.alone[place] = type(layer).__name__
            elif isinstance(layer, LoRAExperts):
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
    twice, scaling = 2 if layer.lora_a0 is not None else 1, layer.scaling
    if isinstance(layer, LoRAFusedLinear) and len(set(layer.scalings.values())) == 1:
        scaling = next(iter(layer.scalings.values()))  # see tensors.py
    rank = twice * layer.rank
    if not stabilized and scaling == layer.alpha / layer.rank:
        return rank, twice * layer.alpha
    if stabilized and scaling == lora_scaling(layer.alpha, rank, rank_stabilized=True):
        return rank, layer.alpha
    return rank, scaling * (rank**0.5 if stabilized else rank)


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
    for n, layer in layers.items():
        alpha = alphas[n] if layer.lora_a0 is None else half(alphas[n], stabilized=stabilized)
        found.scales[n] = (alpha, stabilized)
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
    each tensor) and adapter_config.json.  The same whether merged or not; the runtime factor of
    `scale_adapters` is not part of an adapter and is not saved.  An initialisation that subtracts
    its start is written as the plain LoRA of twice the rank that it is.  `state_dict` gives values
    gathered elsewhere (a sharded model's), under the model's own names.  `beside_prefix` leaves out
    prefixes and prompts: they are written by io.ptuning.save_prefix.

    All files are of one save: whenever it dies, every adapter is the old one, or the new one, or,
    in a new folder, one that load_peft refuses; io/replace.py says what others see.  What training
    needs and PEFT's format lacks (slices of fused projections, a subtracted start, dropout of a
    prefix, parameters of the adapter that do not train) is in the weights' metadata for load_peft.
    An encoder that stands alone in the model, for attention of your own, is no part of PEFT's
    format: a warning names it.

    Raises:
        ValueError: no adapter, one that PEFT's format cannot express (prompts.py says which
            prefixes; io.ptuning.save_prefix writes all), or parameters whose
            values are not here.  Nothing is written then.
        OSError: the disk is full, and the like; the old files are as they were.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_peft: expected a module, got {type(model).__name__}")
    names = list(named(model)) if name is None else [name]
    found = describe(model, names, gathered_by_id(model, state_dict or {}),
                     beside_prefix=beside_prefix)  # fmt: skip
    with Replacement(Path(path)) as unit:
        for adapter, own in found.items():
            stage_adapter(unit, "" if name is not None or adapter == DEFAULT else adapter, own)
    return list(dict.fromkeys(place for own in found.values() for place in own.modules))


def stage_adapter(unit: Replacement, folder: str, adapter: Described) -> None:
    """Write an adapter's files among those that are replaced as one; folder "": the unit's own."""
    inside = f"{folder}/" if folder else ""
    names = f"{inside}{CONFIG_NAME}", f"{inside}{WEIGHTS_NAME}"
    stage(unit, names, adapter.config, adapter.tensors, adapter.training)


def describe(
    model: nn.Module, names: list[str], gathered: Mapping[int, Tensor], *, beside_prefix: bool
) -> dict[str, Described]:
    """What to write of each of these adapters; arguments and errors as of save_peft.

    `gathered` has values by the id of the parameter that they are of, in the place of its own.
    """
    found: dict[str, Described] = {}
    for name in names:
        places = adapters_called("save_peft", model, name)
        if not beside_prefix and prompt_in(model, name) is not None:
            found[name] = Described(*describe_prompts(model, name, gathered), list(places))
            continue
        own = _collect(model, name, beside_prefix=beside_prefix)
        if own.alone:
            _say_alone(own)
        if own.own_bases:
            warnings.warn(
                f"save_peft: LoftQ gave {own.own_bases[0]} ({len(own.own_bases)} layers) other "
                "codes, which an adapter file does not hold; it fits this base only: keep it with "
                "io.bitsandbytes.save_quantized",
                stacklevel=3,
            )
        tensors = {f"{PREFIX}{key}": gathered.get(id(value), value)
                   for key, value in own.tensors.items()}  # fmt: skip
        config = _config(model, own)
        written = {place: stack for place, stack in places.items()
                   if place not in own.alone and not is_prompt(place)}  # fmt: skip
        modules = [*own.low_rank, *own.experts, *own.biases, *own.saved, *own.tokens]
        found[name] = Described(config, tensors, described(written, own.scales), modules)
    if not found:
        raise ValueError("save_peft: the model has no adapter; inject one first")
    if changed := changed_buffers(model):
        warnings.warn(f"save_peft: {complaint(changed)}", stacklevel=3)
    for adapter in found.values():
        check_writable(adapter.tensors)
    return found


def _say_alone(found: _Collected) -> None:
    """Warn of adapters that stand alone; raise ValueError where there is nothing else."""
    place, kind = next(iter(found.alone.items()))
    how = f"io.ptuning.save_prefix(model.{place}, path)"
    if kind != PrefixEncoder.__name__:
        how = "adapter_state_dict and safetensors"
    message = (
        f"save_peft: {place} is a {kind} that stands alone in the model ({len(found.alone)} in "
        f"all), for which PEFT's format has no place; write it with {how}"
    )
    if not found.tensors:
        raise ValueError(message)
    warnings.warn(f"{message}: it is not in this file", stacklevel=4)
