"""Loads a directory of minipeft's own format; shapes are checked before anything is allocated."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT
from minipeft.adapters.sharded import refuse_shards
from minipeft.integrations.transformers.attach import attach
from minipeft.integrations.transformers.attach_prompt import check_decoder
from minipeft.integrations.transformers.prefixes import Prefix
from minipeft.integrations.transformers.prompt_runs import RunPrompt
from minipeft.io.files import check_values
from minipeft.io.heads import by_module, check_heads, fill_heads
from minipeft.io.prefixes.config import CONFIG_NAME, WEIGHTS_NAME, read_config, tensors_of
from minipeft.io.replace import read_whole
from minipeft.io.seal import read_sealed
from minipeft.layers.prompt import PromptEmbedding, PromptEncoder
from minipeft.model.peft_words import in_our_words
from minipeft.prefix import KVShape, PrefixEncoder

Path_ = str | os.PathLike[str]
Module = TypeVar("Module", bound=nn.Module)


@overload
def load_prefix(  # type: ignore[overload-overlap]  # an encoder is a module, and more is known
    model: PrefixEncoder, path: Path_, *, name: str = ...
) -> PrefixEncoder:
    """An encoder filled."""


@overload
def load_prefix(
    model: nn.Module, path: Path_, *, name: str = ..., example: dict[str, Any] | None = ...
) -> Prefix:
    """A prefix attached."""


@in_our_words
def load_prefix(
    model: nn.Module,
    path: Path_,
    *,
    name: str = DEFAULT,
    example: dict[str, Any] | None = None,
) -> Prefix | PrefixEncoder:
    """Attach the prefix or prompt that `save_prefix` wrote; trainable, with its heads.

    `model` may also be a PrefixEncoder, for attention of your own: it is filled, in place, and
    takes the file's dropout (`load_encoder` makes one).  `example` is as in attach_prefix.  Returns
    the Prefix, or the encoder.

    Raises:
        ValueError: a file missing or damaged, or of two saves; a prefix made for other shapes,
            heads that the model lacks, a name that is taken.  The model is then as it was.
    """
    directory = Path(path)
    if isinstance(model, PrefixEncoder):
        refuse_shards("load_prefix", model, "load it first, then fully_shard the model")
        return _fill_encoder(model, load_encoder(directory), directory)
    return read_whole(directory, lambda: _load(model, directory, name, example))


def load_encoder(path: Path_) -> PrefixEncoder:
    """The PrefixEncoder that `save_prefix` wrote, or that of an attached prefix; trainable.

    Raises:
        ValueError: a file missing or damaged, or one of a prompt.
    """
    directory = Path(path)

    def read() -> PrefixEncoder:
        config = read_config(directory / CONFIG_NAME)
        if config["kind"] not in ("prefix", "encoder"):
            raise ValueError(f"{directory}: holds a {config['kind']}, which is no PrefixEncoder")
        where = directory / WEIGHTS_NAME
        tensors, _ = read_sealed(where, config, CONFIG_NAME)
        tensors = {k: v for k, v in tensors.items() if not k.startswith("head.")}
        shapes = [KVShape(*shape) for shape in config["kv_shapes"]]
        return _encoder(config, tensors, shapes, where)

    return read_whole(directory, read)


def _fill_encoder(encoder: PrefixEncoder, loaded: PrefixEncoder, directory: Path) -> PrefixEncoder:
    """Copy all of an encoder into another one of its form."""
    for key in ("kv_shapes", "prefix_length", "hidden", "frozen", "gated"):
        own, found = getattr(encoder, key), getattr(loaded, key)
        if own != found:
            more = ""
            if key == "hidden" and found is None:
                more = "; the MLP was folded (save_prefix(..., reparametrization=True) keeps it): "
                more += "load into encoder.bake(), or by load_encoder"
            raise ValueError(
                f"{directory}: {key} is {found!s:.80}, the encoder's {own!s:.80}{more}"
            )
    check_values(directory, loaded.state_dict(), encoder.state_dict())
    encoder.load_state_dict(loaded.state_dict())
    encoder.dropout = loaded.dropout
    return encoder


def _load(model: nn.Module, directory: Path, name: str, example: dict[str, Any] | None) -> Prefix:
    config = read_config(directory / CONFIG_NAME)
    if config["kind"] == "encoder":
        raise ValueError(
            f"{directory}: holds an encoder for attention of one's own: pass a PrefixEncoder in "
            "the place of the model, or use load_encoder"
        )
    own = getattr(getattr(model, "config", None), "model_type", "")
    if config.get("model_type") and own and config["model_type"] != own:
        raise ValueError(
            f"{directory}: made for a {config['model']} (model type {config['model_type']!r:.40}); "
            f"this is a {type(model).__name__} ({own!r})"
        )
    tensors, _ = read_sealed(directory / WEIGHTS_NAME, config, CONFIG_NAME)
    of_heads = {key[5:]: tensors.pop(key) for key in list(tensors) if key.startswith("head.")}
    heads = by_module(of_heads, config["heads"])
    if sorted(heads) != sorted(config["heads"]):
        raise ValueError(f"{directory}: heads {config['heads']!r:.80}, tensors {list(heads)!r:.80}")
    modules = check_heads("load_prefix", model, heads)

    def make(prefix: Prefix) -> nn.Module:
        where = directory / WEIGHTS_NAME
        if config["kind"] != "prefix":
            check_prompt_size(where, prefix, config["embedding_dim"])
            return RunPrompt(_filled(where, tensors, lambda: _prompt(config)))
        found = [list(shape) for shape in prefix.kv_shapes]
        if found != config["kv_shapes"]:
            raise ValueError(
                f"{directory}: made for layers of (kv_heads, key_dim, value_dim) "
                f"{_few(config['kv_shapes'])} of a {config['model']}; this model has {_few(found)}"
            )
        return _encoder(config, tensors, prefix.kv_shapes, where)

    locations = (
        None if set(config["locations"]) == {"self"} else list(dict.fromkeys(config["locations"]))
    )
    prefix = attach(
        model, config["prefix_length"], make, caller="load_prefix", name=name,
        position=config["position"], window=config["window"], locations=locations,
        layers=config.get("layers"), example=example, train_head=modules,
    )  # fmt: skip
    fill_heads(model, name, heads)
    return prefix


def _few(shapes: list[Any]) -> str:
    return f"{shapes[:2]}{' ...' if len(shapes) > 2 else ''} ({len(shapes)})"


def check_prompt_size(where: Path, prefix: Prefix, size: int) -> None:
    """Raise ValueError unless the model is a decoder whose embeddings have this size."""
    model: Any = prefix.model
    check_decoder(str(where), model, prefix)
    if (own := model.get_input_embeddings().embedding_dim) != size:
        raise ValueError(f"{where}: a prompt of size {size}; the model's embeddings have {own}")


def encoder_of_table(
    where: str | Path, prefix: Prefix, table: Tensor, **settings: Any
) -> PrefixEncoder:
    """A PrefixEncoder for the model of `prefix` that holds a flat table (prefix_length, total).

    Raises:
        ValueError: the layers take another number of columns; values that are not finite.
    """
    total = sum(shape.width for shape in prefix.kv_shapes)
    if table.shape[1] != total:
        raise ValueError(
            f"{where}: {table.shape[1]} columns; the {len(prefix.kv_shapes)} layers of "
            f"{type(prefix.model).__name__} take {total}"
        )
    encoder = PrefixEncoder(prefix.kv_shapes, len(table), **settings)
    encoder.load_flat(table.float())
    return encoder


def _encoder(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: list[KVShape], where: Path
) -> PrefixEncoder:
    """The PrefixEncoder that a configuration describes, filled."""
    return _filled(where, tensors, lambda: PrefixEncoder(
        shapes, config["prefix_length"], hidden=config.get("hidden"),
        embedding_dim=config.get("embedding_dim"), dropout=config.get("dropout", 0.0),
        frozen=config.get("frozen", 0), gated=config.get("gated", False),
    ))  # fmt: skip


def _prompt(config: Mapping[str, Any]) -> nn.Module:
    """The prompt that a configuration describes."""
    length, size = config["prefix_length"], config["embedding_dim"]
    if config["kind"] == "prompt":
        return PromptEmbedding(length, size)
    return PromptEncoder(length, size, hidden=config.get("hidden"))


def _filled(where: Path, tensors: Mapping[str, Tensor], make: Callable[[], Module]) -> Module:
    """What `make` makes, filled with a file's tensors; allocated when they fit."""
    with torch.device("meta"):
        twin = make()
    folded = getattr(twin, "hidden", None) is None
    check_values(where, tensors, tensors_of(twin, folded=folded))
    made = make()
    own = tensors_of(made, folded=folded)
    with torch.no_grad():
        for key, value in tensors.items():
            if key == "flat":
                made.load_flat(value)  # type: ignore[operator]
            else:
                own[key].copy_(value)
    return made
