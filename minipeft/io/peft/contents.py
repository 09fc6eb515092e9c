"""What the tensors of an adapter file are for, in a given model."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.io.peft.config import CONFIG_NAME, MatchedConfig
from minipeft.io.peft.keys import PREFIX, Key, parse, without_prefix
from minipeft.protocol import is_packed
from minipeft.targets import head_reasons, visible_modules
from minipeft.wrapper import innermost


@dataclass
class Contents:
    """The tensors of a file by purpose and by the names of modules in the model."""

    low_rank: dict[str, dict[Key, Tensor]] = field(default_factory=dict)
    experts: dict[str, list[dict[Key, Tensor]]] = field(default_factory=dict)  # innermost first
    biases: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tokens: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    example: str = ""  # the name of some module of the model

    def complaint(self, where: Path) -> str:
        """What is wrong with the file, for an error."""
        parts = []
        if self.unexpected:
            parts.append(
                f"unexpected {self.unexpected[0]!r} ({len(self.unexpected)} in all; the model has "
                f"for example {self.example!r}); is this adapter another model's, or one of the "
                "model with or without its head?"
            )
        if self.missing:
            parts.append(
                f"no keys for {self.missing[0]!r} ({len(self.missing)} in all that {CONFIG_NAME} "
                "asks for); is the file complete?"
            )
        return f"{where}: {'; '.join(parts)}"


def _base_value(model: nn.Module, key: Key) -> Tensor | None:
    """The parameter of the plain model that a plain key names."""
    try:
        module = innermost(model.get_submodule(key.module)) if key.module else model
    except AttributeError:
        return None
    return None if is_packed(module) else module._parameters.get(key.part)


def sort_out(
    where: Path, tensors: dict[str, Tensor], model: nn.Module, config: MatchedConfig
) -> Contents:
    """Give every tensor its purpose; what has none is unexpected, what lacks one is missing.

    Base weights in the file (PEFT adds those of targeted embeddings) are passed over where they
    equal the model's.

    Raises:
        ValueError: two keys that mean the same tensor.
    """
    modules, contents = visible_modules(model), Contents()
    contents.example = next(iter(reversed(modules)), "")
    saved = _saved_modules(model, modules, config)
    seen: dict[Key, str] = {}
    by_depth: dict[str, dict[int, dict[Key, Tensor]]] = {}
    plain_keys = without_prefix(tensors, modules)
    if len(plain_keys) < len(tensors):
        raise ValueError(f"{where}: the same key with and without {PREFIX!r}")
    for plain, in_file in plain_keys.items():
        key, value = parse(plain), tensors[in_file]
        if key in seen:
            raise ValueError(f"{where}: {in_file!r} and {seen[key]!r} are the same tensor")
        seen[key] = in_file
        if key.module not in modules and not (key.role == "plain" and key.module == ""):
            contents.unexpected.append(in_file)
        elif key.role == "tokens":
            ids = config.token_ids(key.module)
            if ids is None:
                contents.unexpected.append(in_file)
            else:
                contents.tokens[key.module] = (ids, value)
        elif key.role != "plain":
            by_depth.setdefault(key.module, {}).setdefault(key.depth, {})[key] = value
        elif root := next((r for r in saved if f"{key.module}.".startswith(f"{r}.")), None):
            own = ".".join(filter(None, [key.module[len(root) + 1 :], key.part]))
            contents.saved.setdefault(root, {})[own] = value
        elif key.part == "bias" and _is_trained(config.config.bias, key):
            contents.biases[key.module] = value
        elif not _is_the_models(model, key, value):
            contents.unexpected.append(in_file)
    for name, levels in by_depth.items():
        if config.has_expert_weights(name):
            contents.experts[name] = [levels[depth] for depth in sorted(levels, reverse=True)]
        else:
            contents.low_rank[name] = {k: v for level in levels.values() for k, v in level.items()}
    contents.biases = {
        name: value for name, value in contents.biases.items()
        if not _is_the_models(model, Key(name, "plain", "bias"), value)
        or name in contents.low_rank
    }  # fmt: skip
    contents.missing = _missing(model, modules, config, contents, saved)
    return contents


def _is_trained(mode: str, key: Key) -> bool:
    """Whether a bias with this key is trained in this mode."""
    return mode == "all" or (mode == "lora_only" and key.depth == 1)


def _is_the_models(model: nn.Module, key: Key, value: Tensor) -> bool:
    own = _base_value(model, key)
    if own is None or own.is_meta or own.shape != value.shape:
        return False
    return torch.equal(own.detach().cpu().to(value.dtype), value)


def _saved_modules(
    model: nn.Module, modules: dict[str, nn.Module], config: MatchedConfig
) -> list[str]:
    """The modules that are saved whole, and the heads tied to them where the file ties weights."""
    roots = [name for name in modules if config.saves(name)]
    roots = [r for r in roots if not any(r.startswith(f"{other}.") for other in roots)]
    if config.config.tied:
        weights = {id(innermost(modules[r])._parameters.get("weight")) for r in roots}
        weights.discard(id(None))
        roots += [
            name for name, module in modules.items()
            if name not in roots and id(innermost(module)._parameters.get("weight")) in weights
        ]  # fmt: skip
    return roots


def _missing(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: MatchedConfig,
    contents: Contents,
    saved: list[str],
) -> list[str]:
    heads = head_reasons(model) if config.config.all_linear else {}
    covered = {id(modules[name]) for name in contents.low_rank}
    missing = [
        name for name, module in modules.items()
        if config.targets(name, module) and id(module) not in covered and name not in heads
        and not _inside(name, contents.low_rank)
    ]  # fmt: skip
    missing += [name for name in saved if name not in contents.saved]
    wanted = config.config.tokens
    entries = (
        list(wanted) if isinstance(wanted, dict) else ["trainable_token_indices"] * bool(wanted)
    )
    found = [name.split(".") for name in contents.tokens]
    for entry in entries:
        parts = entry.split(".") if isinstance(wanted, dict) else []
        if not any(name[len(name) - len(parts) :] == parts for name in found):
            missing.append(entry)
    return missing


def _inside(name: str, wrapped: dict[str, dict[Key, Tensor]]) -> bool:
    """Whether the module lies in one that is wrapped as a whole (attention's out_proj)."""
    return any(name.startswith(f"{outer}.") for outer in wrapped)
