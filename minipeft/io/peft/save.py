"""Saves a model's adapters as directories that PEFT and minipeft load."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT, adapters_called, named
from minipeft.adapters.plain_names import PlainNames
from minipeft.adapters.protocol import Adapter, innermost, is_conv1d
from minipeft.adapters.replicas import unwrapped
from minipeft.adapters.sharded import own_class
from minipeft.adapters.targets import matches, visible_modules
from minipeft.io.files import check_finite, check_writable
from minipeft.io.gathering import whole
from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME
from minipeft.io.peft.keys import PREFIX
from minipeft.io.peft.new_rows import is_longer, written_rows
from minipeft.io.peft.prompts import describe_prompts
from minipeft.io.peft.tensors import lora_biases, written, written_experts
from minipeft.io.peft.training import described, half
from minipeft.io.prefixes.save import has_prefix, is_prompt
from minipeft.io.replace import Replacement
from minipeft.io.seal import stage
from minipeft.layers.bias import LoRABias
from minipeft.layers.fused import LoRAFusedLinear
from minipeft.layers.mixture import LoRAExperts
from minipeft.layers.tied import LoRATiedLinear
from minipeft.layers.trained import TrainedBias, TrainedLogits, TrainedModule, TrainedTokens
from minipeft.layers.trained_head import TrainedHeadRows
from minipeft.lora import LowRank, lora_scaling
from minipeft.model.buffers import changed_buffers, complaint
from minipeft.model.peft_words import in_our_words
from minipeft.prefix import PrefixEncoder


@dataclass
class _Collected:
    """One adapter's layers by kind, and its tensors by their keys."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    lora_biases: dict[str, Tensor] = field(default_factory=dict)
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


def _collect(name: str, places: Mapping[str, list[Adapter]]) -> _Collected:
    """Sort the layers of the adapter called `name`; `places` are its stacks by plain names."""
    found = _Collected()
    by_module: dict[str, list[LoRAExperts]] = {}
    for place, stack in places.items():
        if not place or (isinstance(stack[0], LoRAExperts) and "." not in place):
            raise ValueError(
                "save_peft: the model is the adapter layer itself, which has no name in PEFT's "
                "format; save the module that holds it"
            )
        if is_longer(stack[0]):
            ids, tensors, tied = written_rows(place, stack)
            found.tensors |= tensors
            if ids is None:
                found.saved.append(place)
                found.tied = found.tied or tied
            elif ids:
                found.tokens[place] = ids
            continue
        for layer in stack:
            if getattr(layer, "base", None) is None:
                found.alone[place] = own_class(layer).__name__
            elif isinstance(layer, LoRAExperts):
                found.experts[place] = layer
                by_module.setdefault(place.rpartition(".")[0], []).append(layer)
            elif isinstance(layer, TrainedBias):
                found.biases.append(place)
            elif isinstance(layer, LoRABias):
                found.lora_biases[place] = layer.lora_bias
            elif isinstance(layer, TrainedModule):
                path = _place_of_copy(place, layer, stack)
                if path == place:
                    found.saved.append(place)
                plain = PlainNames(layer.copy).plain
                found.tensors |= {f"{path}.{plain(own)}": value for own, value
                                  in layer.copy.state_dict(keep_vars=True).items()}  # fmt: skip
            elif isinstance(layer, TrainedTokens | TrainedHeadRows):
                found.tokens[place] = layer.token_ids.tolist()
                found.tensors[f"{place}.token_adapter.trainable_tokens_delta"] = layer.token_rows
            elif isinstance(layer, TrainedLogits):  # PEFT follows tied weights by itself
                if any(isinstance(other, LowRank) for other in stack[stack.index(layer) :]):
                    raise ValueError(
                        f"save_peft: the rows of {place} that an embedding trains lie over its "
                        "LoRA; in PEFT they lie below"
                    )
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
    _drop_tied_tables(found)
    for owner, layers in by_module.items():
        found.tensors |= written_experts(owner, layers)
    for place in list(found.biases):
        layer = next(a for a in places[place] if isinstance(a, TrainedBias))
        inner = ".base_layer" if place in found.low_rank else ""
        key = f"{place}{inner}.bias"
        if key in found.tensors:  # of a module saved whole, whose bias trains once more
            copied = found.tensors[key]
            found.tensors[key] = (copied.detach() + layer.bias_delta.detach()).to(copied.dtype)
            found.biases.remove(place)
        else:
            found.tensors[key] = layer.trained_bias()
    if found.lora_biases:
        found.tensors |= lora_biases(found.low_rank, found.lora_biases, found.experts)
    return found


def _place_of_copy(place: str, layer: TrainedModule, stack: list[Adapter]) -> str:
    """Where the tensors of a copy stand: of a frozen table under other layers, where the base's do.

    Raises:
        ValueError: a copy that trains lies under layers that PEFT has over no module saved whole.
    """
    above = stack[: stack.index(layer)]
    tokens = any(isinstance(other, TrainedTokens | TrainedLogits) for other in above)
    low_rank = any(isinstance(other, LowRank | LoRATiedLinear) for other in above)
    if not tokens and not low_rank:
        return place
    if any(parameter.requires_grad for parameter in layer.copy.parameters()):
        raise ValueError(
            f"save_peft: {place} trains whole and has {type(above[-1]).__name__} over it; PEFT's "
            "format has one or the other"
        )
    path = f"{place}.base_layer" if low_rank else place
    return f"{path}.token_adapter.base_layer" if tokens else path


def _drop_tied_tables(found: _Collected) -> None:
    """Leave out heads whose weight is that of a table under LoRA: PEFT ties what it loads there."""
    below = {id(value) for key, value in found.tensors.items() if ".base_layer." in key}
    for place in list(found.saved):
        keys = [key for key in found.tensors if key.startswith(f"{place}.")]
        if all(id(found.tensors[key]) in below for key in keys):
            found.saved.remove(place)
            for key in keys:
                del found.tensors[key]


def target_modules(model: nn.Module, names: set[str]) -> list[str] | str:
    """What names exactly these modules by PEFT's rules: last components, full names, or a regex.

    PEFT compares with every module, wrappers excluded, so a short name must not fit another.
    """
    if not names:
        return []
    everything = PlainNames(model).by_plain(visible_modules(model))
    wrapped = {id(everything[name]) for name in names}
    for candidate in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        fitting = [m for n, m in everything.items() if matches(candidate, n, m)]
        if {id(module) for module in fitting} == wrapped:
            return candidate
    return "|".join(re.escape(name) for name in sorted(names))


def _rank_and_alpha(layer: LowRank, stabilized: bool) -> tuple[int, float]:
    """Rank and alpha of the product that is written: a subtracted start doubles the rank."""
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
        "target_modules": target_modules(model, set(found.low_rank)),
        "target_parameters": sorted(found.experts) or None,
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "use_rslora": stabilized,
        "fan_in_fan_out": any(is_conv1d(innermost(layer)) for layer in layers.values()),
        "bias": bias,
        "lora_bias": bool(found.lora_biases),
        "use_dora": bool(dora),
        "modules_to_save": sorted(found.saved) or None,
        "trainable_token_indices": found.tokens or None,
        "ensure_weight_tying": found.tied or _tied_copies(model, found.saved),
        "init_lora_weights": True,
    }


def _tied_copies(model: nn.Module, saved: list[str]) -> bool:
    """Whether two of the modules saved whole share a parameter in their copies."""
    seen: set[int] = set()
    modules: dict[str, Any] = PlainNames(model).by_plain(visible_modules(model))
    for name in saved:
        own = {id(p) for p in modules[name].adapter_parameters().values()}
        if own & seen:
            return True
        seen |= own
    return False


@in_our_words
def save_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Save the model's adapters in PEFT's format; returns the names of their modules.

    The adapter "default" goes into directory `path`, others into subdirectories of their names;
    `name` saves one adapter, into `path` itself.  Writes adapter_model.safetensors (a sha256 for
    each tensor) and adapter_config.json.  The same whether merged or not; the runtime factor of
    `scale_adapters` is not part of an adapter and is not saved.  An initialisation that subtracts
    its start is written as the plain LoRA of twice the rank that it is.  No name that is
    written or returned has what torch wraps around modules in it (torch.compile, DDP,
    checkpointing); names are the model's of today, as PEFT writes them, not those of its weights in
    checkpoints.

    Of a model that fully_shard has cut, every process calls this: the values are gathered, the
    first process writes, and the others wait for it.  `state_dict` gives values gathered elsewhere,
    under the model's own names; then only the process that writes calls this.

    All files are of one save: whenever it dies, every adapter is the old one, or the new one, or,
    in a new folder, one that load_peft refuses; io/replace.py says what others see.  What training
    needs and PEFT's format lacks (slices of fused projections, a subtracted start, dropout of a
    prefix, parameters of the adapter that do not train) is in the weights' metadata for load_peft.
    A prefix with frozen positions is written as PEFT's cartridge, other prefixes as prefix tuning.
    An encoder that stands alone in the model, for attention of your own, is no part of PEFT's
    format: a warning names it.

    Raises:
        ValueError: no adapter, one that PEFT's format cannot express (prompts.py says which
            prefixes; save_prefix writes all), parameters whose values are not here, or NaN or Inf,
            which load_peft refuses.  Nothing is written then.
        OSError: the disk is full, and the like; the old files are as they were.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_peft: expected a module, got {type(model).__name__}")
    model = model if state_dict is not None else unwrapped(model)
    names = list(named(model)) if name is None else [name]
    with whole("save_peft", model, state_dict) as writes:
        found = describe(model, names)
        if writes:
            _write(Path(path), found, name)
    return list(dict.fromkeys(place for own in found.values() for place in own.modules))


def _write(path: Path, found: Mapping[str, Described], name: str | None) -> None:
    with Replacement(path) as unit:
        for adapter, own in found.items():
            folder = "" if name is not None or adapter == DEFAULT else f"{adapter}/"
            files = f"{folder}{CONFIG_NAME}", f"{folder}{WEIGHTS_NAME}"
            stage(unit, files, own.config, own.tensors, own.training)


def describe(
    model: nn.Module, names: list[str], *,
    beside_prefix: bool = False, level: int = 4,
) -> dict[str, Described]:  # fmt: skip
    """What to write of each of these adapters; raises what save_peft raises.

    `beside_prefix` leaves out prefixes and prompts; `level`: how far above this the user's line is,
    for warnings.
    """
    found: dict[str, Described] = {}
    for name in names:
        places = PlainNames(model).by_plain(adapters_called("save_peft", model, name))
        if not beside_prefix and has_prefix(model, name):
            found[name] = Described(*describe_prompts(model, name), list(places))
            continue
        places = {place: stack for place, stack in places.items() if not is_prompt(place)}
        own = _collect(name, places)
        if own.alone:
            _say_alone(own, level + 1)
        if own.own_bases:
            warnings.warn(
                f"save_peft: LoftQ gave {own.own_bases[0]} ({len(own.own_bases)} layers) other "
                "codes, which an adapter file does not hold; it fits this base only: keep it with "
                "minipeft.save_quantized",
                stacklevel=level,
            )
        tensors = {f"{PREFIX}{key}": value for key, value in own.tensors.items()}
        config = _config(model, own)
        written = {place: stack for place, stack in places.items() if place not in own.alone}
        modules = [*own.low_rank, *own.experts, *own.biases, *own.saved, *own.tokens]
        found[name] = Described(config, tensors, described(written, own.scales), modules)
    if not found:
        raise ValueError("save_peft: the model has no adapter; inject one first")
    if changed := changed_buffers(model):
        warnings.warn(f"save_peft: {complaint(changed)}", stacklevel=level)
    for adapter in found.values():
        check_writable(adapter.tensors)
        check_finite("save_peft", adapter.tensors)
    return found


def _say_alone(found: _Collected, level: int) -> None:
    """Warn of adapters that stand alone; raise ValueError where there is nothing else."""
    place, kind = next(iter(found.alone.items()))
    how = f"minipeft.save_prefix(model.{place}, path)"
    if kind != PrefixEncoder.__name__:
        how = "adapter_state_dict and safetensors"
    message = (
        f"save_peft: {place} is a {kind} that stands alone in the model ({len(found.alone)} in "
        f"all), for which PEFT's format has no place; write it with {how}"
    )
    if not found.tensors:
        raise ValueError(message)
    warnings.warn(f"{message}: it is not in this file", stacklevel=level)
