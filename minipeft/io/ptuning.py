"""Prefixes and prompts as files: minipeft's own, and those of P-tuning v2 and ChatGLM.

Own directory: prefix_config.json and prefix.safetensors, whose `flat` is the whole prefix as one
table (prefix_length, sum of kv_heads * (key_dim + value_dim)): layer by layer, keys of all heads,
then values of all heads.  It says what no other format can: positions, windows, locations, gates.

P-tuning v2 (THUDM, model/prefix_encoder.py) and ChatGLM keep `prefix_encoder.embedding.weight`,
that table, or an embedding with `prefix_encoder.trans.0` and `.2`, an MLP with tanh between.
"""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers.attached import NAME, Prefix
from minipeft.integrations.transformers.attaching import attach
from minipeft.integrations.transformers.prompted import RunPrompt, ZeroGated
from minipeft.integrations.transformers.prompts import check_decoder, sizes_for_zero_gated
from minipeft.io.heads import by_module, check_heads, fill_heads, head_tensors
from minipeft.io.tensors import (
    check_writable,
    parse_object,
    read_tensors,
    write_atomically,
    write_tensors,
)
from minipeft.layers.trained import TrainedModule
from minipeft.prefix import PrefixEncoder
from minipeft.prompt import PromptEmbedding, PromptEncoder, ZeroGatedPrompt
from minipeft.registry import DEFAULT, adapters_called

CONFIG_NAME, WEIGHTS_NAME = "prefix_config.json", "prefix.safetensors"
_LARGEST_CONFIG = 2**24  # bytes
_LARGEST_SIZE, _MOST_LAYERS = 2**24, 2**12
_SIZES = (
    "prefix_length",
    "hidden",
    "embedding_dim",
    "frozen",
    "n_layers",
    "n_heads",
    "lstm_layers",
)
_KINDS = ("prefix", "prompt", "prompt_encoder", "zero_gated")


def prefix_of(caller: str, model: nn.Module, name: str | None) -> tuple[Prefix, Any]:
    """The model's Prefix, and the encoder of that name.

    Raises:
        ValueError: the model has none.
    """
    prefix = getattr(model, NAME, None)
    if not isinstance(prefix, Prefix):
        raise ValueError(f"{caller}: the model has no prefix; attach_prefix first")
    if name is not None and name not in prefix.encoders:
        raise ValueError(f"{caller}: no prefix {name!r}; the model has {list(prefix.encoders)}")
    return prefix, prefix.encoder if name is None else prefix.encoders[name]


def has_prefix(model: nn.Module, name: str) -> bool:
    """Whether the adapter called `name` has a prefix or prompt."""
    prefix = getattr(model, NAME, None)
    return isinstance(prefix, Prefix) and name in prefix.encoders


def loses_in_peft(model: nn.Module, name: str) -> bool:
    """Whether the folded table that PEFT keeps is less than what training needs to go on."""
    if not has_prefix(model, name):
        return False
    encoder = prefix_of("save_prefix", model, name)[1]
    if isinstance(encoder, PrefixEncoder):
        return encoder.hidden is not None or encoder.frozen > 0
    return isinstance(encoder.source, PromptEncoder)


def has_more_than_prefix(model: nn.Module, name: str) -> bool:
    """Whether it has layers other than that and heads."""
    return any(
        not place.startswith(f"{NAME}.") and not isinstance(layer, TrainedModule)
        for place, stack in adapters_called("save_prefix", model, name).items()
        for layer in stack
    )


def save_prefix(
    model: nn.Module, path: str | os.PathLike[str], *, name: str = DEFAULT,
    reparametrization: bool = False, heads: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write one prefix or prompt, with the `heads` that train with it, to directory `path`.

    An MLP or a prompt's network is folded into what it produces, unless `reparametrization`: then
    training can go on from the file.  `state_dict` gives values gathered elsewhere (a sharded
    model's), under the model's own names.

    Raises:
        ValueError: the model has no such prefix, or its values are not here or not finite.  Nothing
            is written then.
    """
    prefix, encoder = prefix_of("save_prefix", model, name)
    gathered = gathered_by_id(model, state_dict or {})
    settings, tensors = _described(with_values(encoder, gathered), reparametrization)
    states = head_tensors(model, name, gathered) if heads else {}
    config = {
        "format": 1, **settings,
        "position": prefix.position, "window": prefix.window, "locations": prefix.locations,
        "kv_shapes": [list(shape) for shape in prefix.kv_shapes],
        "model": type(model).__name__, "heads": sorted(states),
    }  # fmt: skip
    for place, state in states.items():
        tensors |= {f"head.{place}.{key}": value for key, value in state.items()}
    for key, value in tensors.items():
        if not value.is_meta and not bool(value.isfinite().all()):
            raise ValueError(f"save_prefix: {key} holds NaN or Inf; look for a diverged training")
    check_writable(tensors)
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS_NAME, tensors)
    write_atomically(directory / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True).encode())


def gathered_by_id(model: nn.Module, state: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Values by the id of the parameter that they are of."""
    own = dict(model.named_parameters(remove_duplicate=False))
    return {id(own[key]): value for key, value in state.items() if key in own}


def with_values(encoder: Any, gathered: Mapping[int, Tensor]) -> Any:
    """The encoder, or a copy that has the gathered values."""
    if not any(id(parameter) in gathered for parameter in encoder.parameters()):
        return encoder
    twin = copy.deepcopy(encoder)
    for own, other in zip(encoder.parameters(), twin.parameters(), strict=True):
        other.data = gathered.get(id(own), own).detach().to("cpu", torch.float32)
    return twin


def _described(encoder: Any, reparametrization: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What to write of an encoder: how to build it, and its tensors."""
    if isinstance(encoder, PrefixEncoder):
        settings = {
            "kind": "prefix", "prefix_length": encoder.prefix_length, "dropout": encoder.dropout,
            "frozen": encoder.frozen, "gated": encoder.gated,
        }  # fmt: skip
        if reparametrization and encoder.hidden is not None:
            sizes = {"hidden": encoder.hidden, "embedding_dim": encoder.embedding.shape[1]}
            return {**settings, **sizes}, _encoder_tensors(encoder)
        gates = (
            {f"gates.{i}": gate for i, gate in enumerate(encoder.gates)} if encoder.gated else {}
        )
        return settings, {"flat": encoder.flat().detach(), **gates}
    source = encoder.source
    settings = {"prefix_length": source.prompt_length, "embedding_dim": source.embedding_dim}
    if isinstance(encoder, ZeroGated):
        more = {"kind": "zero_gated", "n_layers": source.n_layers, "n_heads": source.n_heads}
        return {**settings, **more}, _encoder_tensors(source)
    if isinstance(source, PromptEncoder):
        if not reparametrization:
            return {**settings, "kind": "prompt"}, {"encoder.table": source.bake().table.detach()}
        lstm = getattr(source, "lstm", None)
        more = {
            "kind": "prompt_encoder", "hidden": source.hidden, "network": source.kind,
            "lstm_layers": 2 if lstm is None else lstm.num_layers,
            "dropout": 0.0 if lstm is None else lstm.dropout,
        }  # fmt: skip
        return {**settings, **more}, _encoder_tensors(source)
    return {**settings, "kind": "prompt"}, _encoder_tensors(source)


def _encoder_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {f"encoder.{name}": value for name, value in module.state_dict().items()}


def load_prefix(model: nn.Module, path: str | os.PathLike[str], *, name: str = DEFAULT) -> Prefix:
    """Attach the prefix or prompt that `save_prefix` wrote; trainable, with its heads.

    Raises:
        ValueError: a file missing or damaged, a prefix made for other shapes, heads that the model
            lacks, a name that is taken.  The model is then as it was.
    """
    directory = Path(path)
    config = _read_config(directory / CONFIG_NAME)
    tensors = read_tensors(directory / WEIGHTS_NAME)
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
        model, config["prefix_length"], make, name=name, position=config["position"],
        window=config["window"], locations=locations, train_head=modules,
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
    if kind == "zero_gated":
        found = sizes_for_zero_gated(str(where), model, prefix, config["n_layers"])
        if found != (config["embedding_dim"], config["n_heads"]):
            raise ValueError(
                f"{where}: prompts of (size, heads) {config['embedding_dim'], config['n_heads']}; "
                f"the model has {found}"
            )
    elif kind != "prefix":
        check_decoder(str(where), model, prefix)
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        if table.embedding_dim != config["embedding_dim"]:
            raise ValueError(
                f"{where}: a prompt of size {config['embedding_dim']}; the model's embeddings have "
                f"{table.embedding_dim}"
            )
    if kind == "prefix" and config.get("hidden") is None:
        total = sum(shape.width for shape in prefix.kv_shapes)
        shape = (config["prefix_length"], total)
        if tuple(tensors.get("flat", torch.empty(0)).shape) != shape:
            raise ValueError(f"{where}: no tensor 'flat'; expected {shape}")
    else:
        with torch.device("meta"):
            _check_state(_empty(config, prefix).state_dict(), tensors, where)
    encoder = _empty(config, prefix)
    flat = tensors.pop("flat", None)
    if flat is not None:
        encoder.load_flat(flat)  # type: ignore[operator]
    _fill(encoder, tensors, where, only="gates" if flat is not None else "")
    if kind == "zero_gated":
        return ZeroGated(encoder, len(prefix.kv_shapes) - config["n_layers"])  # type: ignore[arg-type]
    return encoder if kind == "prefix" else RunPrompt(encoder)


def _empty(config: dict[str, Any], prefix: Prefix) -> nn.Module:
    """The module that a configuration describes."""
    length, kind = config["prefix_length"], config["kind"]
    if kind == "prefix":
        return PrefixEncoder(
            prefix.kv_shapes, length, hidden=config.get("hidden"),
            embedding_dim=config.get("embedding_dim"), dropout=config.get("dropout", 0.0),
            frozen=config.get("frozen", 0), gated=config.get("gated", False),
        )  # fmt: skip
    size = config["embedding_dim"]
    if kind == "zero_gated":
        return ZeroGatedPrompt(config["n_layers"], length, size, config["n_heads"])
    if kind == "prompt":
        return PromptEmbedding(length, size)
    return PromptEncoder(
        length, size, hidden=config.get("hidden"), kind=config.get("network", "mlp"),
        lstm_layers=config.get("lstm_layers", 2), dropout=config.get("dropout", 0.0),
    )  # fmt: skip


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


def _read_config(path: Path) -> dict[str, Any]:
    """prefix_config.json, its values checked."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a directory that save_prefix wrote")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for a configuration")
    config: dict[str, Any] = parse_object(path.read_bytes(), str(path))
    if (
        type(config.get("format")) is not int
        or config["format"] != 1
        or (config.get("kind") not in _KINDS)
    ):
        raise ValueError(
            f"{path}: format {config.get('format')!r:.40} of kind {config.get('kind')!r:.40}; "
            f"expected 1 and one of {_KINDS}"
        )
    needed = {"zero_gated": ("n_layers", "n_heads", "embedding_dim"), "prefix": ()}
    for key in _SIZES:
        value = config.get(key)
        required = key == "prefix_length" or key in needed.get(config["kind"], ("embedding_dim",))
        if value is None and not required:
            continue
        most = _MOST_LAYERS if key.endswith("layers") else _LARGEST_SIZE
        if type(value) is not int or not 0 <= value < most:
            raise ValueError(
                f"{path}: {key} is {value!r:.40}, expected a whole number below {most}"
            )
    shapes, locations = config.get("kv_shapes"), config.get("locations")
    if not isinstance(shapes, list) or not all(
        isinstance(s, list)
        and len(s) == 3
        and all(type(n) is int and 0 < n < _LARGEST_SIZE for n in s)
        for s in shapes
    ):
        raise ValueError(f"{path}: kv_shapes is {str(shapes)[:80]}, expected three sizes a layer")
    if (
        not isinstance(locations, list)
        or len(locations) != len(shapes)
        or not all(isinstance(x, str) for x in locations)
    ):
        raise ValueError(f"{path}: locations is {locations!r:.80}, expected a name for each layer")
    heads = config.setdefault("heads", [])
    if not isinstance(heads, list) or not all(isinstance(x, str) for x in heads):
        raise ValueError(f"{path}: heads is {heads!r:.80}, expected names of modules")
    for key in ("position", "window"):
        if not isinstance(config.get(key), str):
            raise ValueError(f"{path}: {key}={config.get(key)!r:.40}; expected a word")
    for key, default, kinds in (("dropout", 0.0, (int, float)), ("gated", False, bool),
                                ("model", "", str), ("network", "", str)):  # fmt: skip
        if not isinstance(config.get(key, default), kinds):
            raise ValueError(f"{path}: {key} is {config[key]!r:.40}")
    return config


def flat_table(state: Mapping[str, Tensor]) -> Tensor:
    """The flat table (prefix_length, total) of a P-tuning v2 or ChatGLM state, in float32.

    The keys end in `prefix_encoder.embedding.weight` and, re-parametrised,
    `prefix_encoder.trans.{0,2}.{weight,bias}`; other keys are not looked at.  The MLP is folded.

    Raises:
        ValueError: no such keys, keys of two encoders, or shapes that do not belong together.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"flat_table: {key!r:.40} is no named tensor")
        head, middle, own = key.rpartition("prefix_encoder.")
        if middle and (not head or head.endswith(".")):
            if own in found:
                raise ValueError(f"flat_table: two tensors called prefix_encoder.{own}")
            if not value.is_floating_point():
                raise ValueError(f"flat_table: prefix_encoder.{own} is {value.dtype}")
            found[own] = value.float()
    table = found.pop("embedding.weight", None)
    if table is None or table.dim() != 2:
        raise ValueError(
            "flat_table: no prefix_encoder.embedding.weight of two dimensions; it has "
            f"{list(state)[:4]}"
        )
    names = [f"trans.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    if found and sorted(found) != sorted(names):
        raise ValueError(f"flat_table: beside the embedding {sorted(found)}; expected {names}")
    if found:
        inner, inner_bias, outer, outer_bias = (found[name] for name in names)
        fits = (
            inner.dim() == outer.dim() == 2 and inner.shape[1] == table.shape[1]
            and outer.shape[1] == len(inner) and inner_bias.shape == inner.shape[:1]
            and outer_bias.shape == outer.shape[:1]
        )  # fmt: skip
        if not fits:
            shapes = {name: tuple(found[name].shape) for name in names}
            raise ValueError(f"flat_table: embedding {tuple(table.shape)} does not fit {shapes}")
        table = torch.tanh(table @ inner.T + inner_bias) @ outer.T + outer_bias
    return table


def load_prefix_encoder(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    name: str = DEFAULT,
    position: str | None = None,
) -> Prefix:
    """Attach the prefix of a P-tuning v2 or ChatGLM checkpoint: a safetensors file, or its tensors.

    `position` None: "none" for ChatGLM's keys (transformer.prefix_encoder...), whose text starts at
    position 0, and "shift" otherwise, as P-tuning v2 numbers it.  A table, whatever it was.

    Raises:
        ValueError: a pickle, a file without a prefix, a prefix for other shapes.  The model is then
            as it was.
    """
    if isinstance(source, Mapping):
        state, where = dict(source), "the state"
    else:
        path = Path(source)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path}: expected a .safetensors file; a pickle can run code, so it is not read: "
                "load it where you trust it, and save its prefix_encoder tensors with safetensors"
            )
        state, where = read_tensors(path), str(path)
    flat = flat_table(state)
    if position is None:
        chatglm = any(key.startswith("transformer.prefix_encoder.") for key in state)
        position = "none" if chatglm else "shift"

    def make(prefix: Prefix) -> PrefixEncoder:
        total = sum(shape.width for shape in prefix.kv_shapes)
        if flat.shape[1] != total:
            raise ValueError(
                f"{where}: {flat.shape[1]} columns; the {len(prefix.kv_shapes)} layers of "
                f"{type(model).__name__} take {total}"
            )
        encoder = PrefixEncoder(prefix.kv_shapes, len(flat))
        encoder.load_flat(flat)
        return encoder

    return attach(model, len(flat), make, name=name, position=position)


def save_prefix_encoder(
    model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None,
    key: str = "prefix_encoder.embedding.weight",
) -> None:  # fmt: skip
    """Write a prefix as P-tuning v2 and ChatGLM keep it: one flat table, in a safetensors file.

    Raises:
        ValueError: a prompt or a gated prefix, which that table cannot say.
    """
    _, encoder = prefix_of("save_prefix_encoder", model, name)
    if not isinstance(encoder, PrefixEncoder) or encoder.gated:
        raise ValueError("save_prefix_encoder: only a prefix without gates is such a table")
    write_tensors(Path(path), {key: encoder.flat().detach()})
