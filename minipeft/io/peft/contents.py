"""The tensors of an adapter file sorted by purpose, for a given model.

A tensor is a factor of a layer, a bias, part of a module saved whole, rows of tokens, or wrong.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import innermost, is_packed
from minipeft.io.lora_keys import program_of
from minipeft.io.peft.config import CONFIG_NAME, OTHER_READER
from minipeft.io.peft.keys import Key
from minipeft.io.peft.located import Located
from minipeft.io.peft.matched import MatchedConfig
from minipeft.io.peft.new_rows import is_longer, rows_now
from minipeft.io.peft.training import Training


@dataclass
class Contents:
    """The tensors of a file by purpose and by the names of modules in the model."""

    low_rank: dict[str, dict[Key, Tensor]] = field(default_factory=dict)
    experts: dict[str, list[dict[Key, Tensor]]] = field(default_factory=dict)  # innermost first
    biases: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tokens: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)  # base tables that end in new rows
    resized: list[tuple[str, int, int]] = field(default_factory=list)  # rows in the file, the model
    untargeted: str = ""  # the fields that say which modules, if they fit none
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    example: str = ""  # the name of some module of the model
    joined: dict[str, str] = field(default_factory=dict)  # Located's: unexpected key, weight

    def complaint(self) -> str:
        """What is wrong with the file, for an error; empty if nothing is."""
        if self.resized:
            name, rows, own = max(self.resized, key=lambda found: found[1])
            new = list(range(own, rows))
            alone = all(self.tokens.get(n, ([], None))[0] == new for n, *_ in self.resized)
            has = f"{rows} rows"
            if all(n in self.tokens for n, *_ in self.resized):
                has = f"token ids up to {rows - 1}, so at least {rows} rows"
            grow = f"or give the model tables of {rows} rows"
            if alone:
                grow = f"or minipeft.extend_vocabulary(model, {rows - own})"
            elif rows > own:
                grow += (
                    " (not minipeft.extend_vocabulary, which adds rows for new tokens alone: the "
                    "file has other rows too)"
                )
            return (
                f"{name!r} has {has} in the file and {own} in "
                "the model: the vocabulary was resized where the adapter was made; call "
                f"model.resize_token_embeddings({rows}) first, {grow}"
            )
        parts = []
        if self.untargeted:
            parts.append(f"{self.untargeted} in {CONFIG_NAME} fit no module of the model")
        if part := next((key for key in self.unexpected if key in self.joined), None):
            parts.append(
                f"unexpected {part!r} ({len(self.unexpected)} in all): transformers 5 joined this "
                f"module's weight with those of other experts into {self.joined[part]!r}; load the "
                "adapter with PEFT, which joins the factors too, and save it again"
            )
        elif self.unexpected:
            question = (
                "is this adapter another model's, or one of the model with or without its head?"
            )
            if program := program_of(self.unexpected[0]):
                question = f"such keys are of {program}: {OTHER_READER} reads them"
            parts.append(
                f"unexpected {self.unexpected[0]!r} ({len(self.unexpected)} in all; the model has "
                f"for example {self.example!r}); {question}"
            )
        if self.missing:
            parts.append(
                f"no keys for {self.missing[0]!r} ({len(self.missing)} in all that {CONFIG_NAME} "
                "asks for); is the file complete?"
            )
        return "; ".join(parts)


def sort_out(
    where: Path, tensors: dict[str, Tensor], model: nn.Module, config: MatchedConfig,
    found: Located, training: Mapping[str, Training],
) -> Contents:  # fmt: skip
    """Give every tensor its purpose; what has none is unexpected, what lacks one is missing.

    PEFT adds the base weights of targeted embeddings.  Base weights that equal the model's are
    passed over.  A table that differs in its last rows alone is kept: they are of added tokens, for
    which every resized model draws other random numbers.

    Raises:
        ValueError: two keys that mean the same tensor.
    """
    modules, contents = found.modules, Contents(joined=found.joined)
    contents.example = next(iter(reversed(modules)), "")
    saved, bias = _saved_modules(found, config), config.config.bias
    wrapped = _wrapped_ids(found, config)
    seen: dict[Key, str] = {}
    for in_file, value in tensors.items():
        key = found.keys[in_file]
        if key.role == "unknown":
            contents.unexpected.append(in_file)
            continue
        if key in seen:
            if key.role == "plain" and torch.equal(tensors[seen[key]], value):
                continue  # a module saved whole, in two spellings
            raise ValueError(f"{where}: {in_file!r} and {seen[key]!r} are the same tensor")
        seen[key] = in_file
        name, plain = key.module, key.role == "plain"
        if key.role == "tokens" and (ids := config.token_ids(name)) is not None:
            contents.tokens[name] = (ids, value)
        elif key.role.startswith("lora_") and (
            id(modules[name]) in wrapped or config.has_expert_weights(name)
        ):
            contents.low_rank.setdefault(name, {})[key] = value
        elif plain and (root := _root(key, saved, config)) is not None:
            own = ".".join(filter(None, [name[len(root) + 1 :], key.part]))
            contents.saved.setdefault(root, {})[own] = value
        elif (
            plain and key.part == "bias" and (bias == "all" or (bias == "lora_only" and key.depth))
        ):
            contents.biases[name] = value
        elif (plain or key.role == "base") and (
            how := _beside_the_models(model, found, key, value)
        ) != "other":
            if plain and how == "new rows":  # below a module saved whole they are not computed with
                contents.tables[name] = value
        else:
            contents.unexpected.append(in_file)
    for name in [name for name in contents.low_rank if config.has_expert_weights(name)]:
        levels = contents.low_rank.pop(name)
        contents.experts[name] = [
            {key: value for key, value in levels.items() if key.depth == depth}
            for depth in sorted({key.depth for key in levels}, reverse=True)
        ]
    contents.biases = {
        name: value for name, value in contents.biases.items()
        if name in contents.low_rank
        or _beside_the_models(model, found, Key(name, "plain", "bias"), value) != "same"
    }  # fmt: skip
    if config.config.target_modules and not wrapped:
        layers = "" if config.config.layers is None else " and layers_to_transform"
        contents.untargeted = f"target_modules{layers}"
    contents.missing = _missing(found, config, contents, saved)
    new = {name for name, own in training.items() if own.rows_before is not None}
    contents.resized = _resized(found, seen, tensors, config, new)
    return contents


def _wrapped_ids(found: Located, config: MatchedConfig) -> set[int]:
    """The modules that PEFT would wrap, with the heads that follow an embedding."""
    chosen = [
        name for name, module in found.modules.items()
        if config.targets(name, module)
        or (config.config.all_linear and isinstance(innermost(module), nn.MultiheadAttention))
    ]  # fmt: skip
    if config.config.tied:
        chosen += [other for name in chosen for other in found.tied(name)]
    return {id(found.modules[name]) for name in chosen}


def _root(key: Key, saved: list[str], config: MatchedConfig) -> str | None:
    """The module saved whole that a plain key belongs to."""
    root = next((r for r in saved if f"{key.module}.".startswith(f"{r}.")), None)
    if root is None and key.depth == 0 and key.module and config.may_save(key.module):
        return key.module
    return root


def _beside_the_models(model: nn.Module, found: Located, key: Key, value: Tensor) -> str:
    """What a plain tensor is beside the model's own: "same", "new rows" or "other".

    New rows are in the last half of the table of an embedding or a head, and all else is the same.
    """
    top = found.modules[key.module] if key.module else model
    module = innermost(top)
    if is_longer(top) and value.dim() and len(value) == rows_now(top):
        value = value[: top.old_rows]  # the others are among its tokens
    own = None if is_packed(module) else module._parameters.get(key.part)
    if own is None or own.is_meta or own.shape != value.shape:
        return "other"
    base = own.detach().cpu().to(value.dtype)
    if torch.equal(base, value):
        return "same"
    if key.part != "weight" or value.dim() != 2 or not _is_vocabulary(found, key.module):
        return "other"
    first = int((base != value).any(dim=1).nonzero()[0])
    return "new rows" if value.is_floating_point() and first > len(value) // 2 else "other"


def _is_vocabulary(found: Located, name: str) -> bool:
    """Whether a module has a row for each token: the input embedding, or the output head."""
    return bool(name) and id(innermost(found.modules[name])) in found.vocabulary


def _resized(
    found: Located, seen: dict[Key, str], tensors: dict[str, Tensor], config: MatchedConfig,
    new: Container[str],
) -> list[tuple[str, int, int]]:  # fmt: skip
    """Tables and heads that have another number of rows in the file; `new` say so of themselves."""
    result = []
    for key, in_file in seen.items():
        shape, plain = tensors[in_file].shape, key.role in ("plain", "base")
        if key.role == "lora_embedding_A":
            shape = shape[::-1]  # (rank, tokens)
        elif key.role == "tokens":
            ids = config.token_ids(key.module) or [0]
            own = rows_now(found.modules[key.module])
            if max(ids) >= own and key.module not in new and _is_vocabulary(found, key.module):
                result.append((key.module, max(ids) + 1, own))
            continue
        elif key.role != "lora_B" and not (plain and key.part == "weight"):
            continue
        if len(shape) != 2 or not _is_vocabulary(found, key.module):
            continue
        own = rows_now(found.modules[key.module]) or shape[0]
        if own != shape[0]:
            result.append((key.module, shape[0], own))
    return result


def _saved_modules(found: Located, config: MatchedConfig) -> list[str]:
    """The modules that are saved whole, and the heads tied to them where the file ties weights."""
    roots = [name for name in found.modules if config.saves(name)]
    roots = [r for r in roots if not any(r.startswith(f"{other}.") for other in roots)]
    if config.config.tied:
        tied = (other for root in roots for other in found.tied(root))
        roots = list(dict.fromkeys([*roots, *tied]))
    return roots


def _missing(
    found: Located, config: MatchedConfig, contents: Contents, saved: list[str]
) -> list[str]:
    heads = found.heads if config.config.all_linear else {}
    covered = {id(found.modules[name]) for name in contents.low_rank}
    missing = [
        name for name, module in found.modules.items()
        if config.targets(name, module) and id(module) not in covered and name not in heads
        and not any(name.startswith(f"{outer}.") for outer in contents.low_rank)  # out_proj
    ]  # fmt: skip
    missing += [name for name in saved if name not in contents.saved]
    return [*missing, *_missing_tokens(found, config, contents)]


def _missing_tokens(found: Located, config: MatchedConfig, contents: Contents) -> Iterator[str]:
    """Entries of trainable_token_indices without rows: neither their own nor a tied table's."""
    wanted = config.config.tokens
    if not isinstance(wanted, dict):
        if wanted and not contents.tokens:
            yield "trainable_token_indices"
        return
    for entry, ids in wanted.items():
        named = [name for name in found.modules if config.fits([entry], name)]
        follows = [other for name in named for other in found.tied(name)
                   if contents.tokens.get(other, (None,))[0] == ids]  # fmt: skip
        if not follows and not any(name in contents.tokens for name in named):
            yield entry
