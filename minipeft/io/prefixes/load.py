"""Loads a directory of minipeft's own format; shapes are checked before anything is allocated."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT
from minipeft.integrations.transformers.attach import attach
from minipeft.integrations.transformers.attach_prompt import check_decoder
from minipeft.integrations.transformers.prefixes import Prefix
from minipeft.integrations.transformers.prompt_runs import RunPrompt
from minipeft.io.heads import by_module, check_heads, fill_heads
from minipeft.io.prefixes.config import CONFIG_NAME, WEIGHTS_NAME, read_config
from minipeft.io.replace import read_whole
from minipeft.io.seal import read_sealed
from minipeft.layers.prompt import PromptEmbedding, PromptEncoder
from minipeft.prefix import KVShape, PrefixEncoder

Path_ = str | os.PathLike[str]


@overload
def load_prefix(  # type: ignore[overload-overlap]  # an encoder is a module, and more is known
    model: PrefixEncoder, path: Path_, *, name: str = ...
) -> PrefixEncoder:
    """An encoder filled."""


@overload
def load_prefix(model: nn.Module, path: Path_, *, name: str = ...) -> Prefix:
    """A prefix attached."""


def load_prefix(model: nn.Module, path: Path_, *, name: str = DEFAULT) -> Prefix | PrefixEncoder:
    """Attach the prefix or prompt that `save_prefix` wrote; trainable, with its heads.

    `model` may also be a PrefixEncoder, for attention of your own: it is filled, in place, and
    takes the file's dropout (`load_encoder` makes one).  Returns the Prefix, or the encoder.

    Raises:
        ValueError: a file missing or damaged, or of two saves; a prefix made for other shapes,
            heads that the model lacks, a name that is taken.  The model is then as it was.
    """
    directory = Path(path)
    if isinstance(model, PrefixEncoder):
        return _fill_encoder(model, load_encoder(directory), directory)
    return read_whole(directory, lambda: _load(model, directory, name))


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
    shapes = [{k: v.shape for k, v in e.state_dict().items()} for e in (encoder, loaded)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{directory}: the encoder's MLP has other sizes")
    encoder.load_state_dict(loaded.state_dict())
    encoder.dropout = loaded.dropout
    return encoder


def _load(model: nn.Module, directory: Path, name: str) -> Prefix:
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
        found = [list(shape) for shape in prefix.kv_shapes]
        if config["kind"] != "prompt" and found != config["kv_shapes"]:
            raise ValueError(
                f"{directory}: made for layers of (kv_heads, key_dim, value_dim) "
                f"{_few(config['kv_shapes'])} of a {config['model']}; this model has {_few(found)}"
            )
        return _built(config, tensors, prefix, directory / WEIGHTS_NAME)

    locations = (
        None if set(config["locations"]) == {"self"} else list(dict.fromkeys(config["locations"]))
    )
    prefix = attach(
        model, config["prefix_length"], make, caller="load_prefix", name=name,
        position=config["position"], window=config["window"], locations=locations,
        train_head=modules,
    )  # fmt: skip
    fill_heads(model, name, heads)
    return prefix


def _few(shapes: list[Any]) -> str:
    return f"{shapes[:2]}{' ...' if len(shapes) > 2 else ''} ({len(shapes)})"


def _built(
    config: dict[str, Any], tensors: dict[str, Tensor], prefix: Prefix, where: Path
) -> nn.Module:
    """The encoder that a configuration describes, filled; nothing is allocated before it fits."""
    kind, model = config["kind"], prefix.model
    if kind == "prefix" and config.get("gated") and prefix.route == "cache":
        raise ValueError(f"{where}: a gated prefix; {type(model).__name__} takes none")
    if kind != "prefix":
        check_prompt_size(where, prefix, config["embedding_dim"])
    if kind == "prefix":
        return _encoder(config, tensors, prefix.kv_shapes, where)
    with torch.device("meta"):
        _check_state(_prompt(config).state_dict(), tensors, where)
    source = _prompt(config)
    _fill(source, tensors, where, only="")
    return RunPrompt(source)


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
    config: Mapping[str, Any], tensors: dict[str, Tensor], shapes: list[KVShape], where: Path
) -> PrefixEncoder:
    """The PrefixEncoder that a configuration describes, filled; allocated when it fits."""

    def empty() -> PrefixEncoder:
        return PrefixEncoder(
            shapes, config["prefix_length"], hidden=config.get("hidden"),
            embedding_dim=config.get("embedding_dim"), dropout=config.get("dropout", 0.0),
            frozen=config.get("frozen", 0), gated=config.get("gated", False),
        )  # fmt: skip

    if config.get("hidden") is None:
        shape = (config["prefix_length"], sum(layer.width for layer in shapes))
        if tuple(tensors.get("flat", torch.empty(0)).shape) != shape:
            raise ValueError(f"{where}: no tensor 'flat'; expected {shape}")
    else:
        with torch.device("meta"):
            _check_state(empty().state_dict(), tensors, where)
    encoder = empty()
    flat = tensors.pop("flat", None)
    if flat is not None:
        encoder.load_flat(flat)
    _fill(encoder, tensors, where, only="gates" if flat is not None else "")
    return encoder


def _prompt(config: Mapping[str, Any]) -> nn.Module:
    """The prompt that a configuration describes."""
    length, kind = config["prefix_length"], config["kind"]
    size = config["embedding_dim"]
    if kind == "prompt":
        return PromptEmbedding(length, size)
    return PromptEncoder(length, size, hidden=config.get("hidden"))


def _check_state(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path, only: str = ""
) -> None:
    """Raise ValueError unless `encoder.*` are values for this state."""
    expected = {f"encoder.{key}" for key in own if key.startswith(only)}
    if expected != tensors.keys():
        wrong = sorted(expected ^ tensors.keys())
        raise ValueError(f"{where}: missing or unexpected {wrong[:3]} ({len(wrong)} in all)")
    for key, value in tensors.items():
        shape = own[key.removeprefix("encoder.")].shape
        if value.shape != shape or not value.is_floating_point():
            raise ValueError(
                f"{where}: {key} is {value.dtype} {tuple(value.shape)}; expected {tuple(shape)}"
            )
        if not bool(value.to(torch.float32).isfinite().all()):
            raise ValueError(f"{where}: {key} holds NaN or Inf")


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], where: Path, *, only: str) -> None:
    """Copy `encoder.*` into a module's state; gates are named as in the module."""
    named = {k if k.startswith("encoder.") else f"encoder.{k}": v for k, v in tensors.items()}
    own = module.state_dict()
    _check_state(own, named, where, only)
    with torch.no_grad():
        for key, value in named.items():
            own[key.removeprefix("encoder.")].copy_(value)
