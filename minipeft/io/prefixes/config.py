"""prefix_config.json: what a directory of minipeft's own holds, its values checked."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.io import fields
from minipeft.io.fields import NAMES, TEXT, Kind, list_of, optional, whole
from minipeft.io.replace import current
from minipeft.layers.prompt import PromptEncoder
from minipeft.prefix import PrefixEncoder

CONFIG_NAME, WEIGHTS_NAME = "prefix_config.json", "prefix.safetensors"
_LARGEST_SIZE, _MOST_LAYERS = 2**24, 2**12
_SIZE = whole(0, _LARGEST_SIZE)


_SHAPE = Kind(
    "(kv_heads, key_dim, value_dim)",
    lambda value: list_of(whole(1, _LARGEST_SIZE)).fits(value) and len(value) == 3,  # type: ignore[arg-type]
)
_SHAPES = Kind(
    f"three sizes for each of at most {_MOST_LAYERS} layers",
    lambda value: list_of(_SHAPE).fits(value) and len(value) <= _MOST_LAYERS,  # type: ignore[arg-type]
)
_FIELDS = {
    "format": fields.one_of(1),
    "kind": fields.one_of("encoder", "prefix", "prompt", "prompt_encoder"),
    "prefix_length": _SIZE,
    "hidden": optional(_SIZE),
    "embedding_dim": optional(_SIZE),
    "frozen": optional(_SIZE),
    "kv_shapes": _SHAPES,
    "locations": NAMES,
    "layers": optional(list_of(whole(0, _MOST_LAYERS))),
    "heads": NAMES,
    "position": TEXT,
    "window": TEXT,
    "dropout": fields.NUMBER,
    "gated": fields.TRUTH,
    "model": TEXT,
    "model_type": TEXT,
    "network": Kind(
        "'mlp'; of an LSTM only the table can be read: save it with reparametrization=False where "
        "it was trained",
        lambda value: value == "mlp",
    ),
}
_NEEDED = ("format", "kind", "prefix_length", "kv_shapes", "locations", "position", "window")


def read_config(path: Path) -> dict[str, Any]:
    """prefix_config.json, its values checked.

    Raises:
        ValueError: no such file, no JSON, or a field that is missing or has another kind of value.
    """
    folder = path.parent
    if not current(path).is_file() and (
        folder.is_file() or (folder / "pytorch_model.bin").is_file()
    ):
        raise ValueError(
            f"{path}: no such file; if {folder.name} is of P-tuning v2 or ChatGLM, "
            f"minipeft.io.prefixes.load_prefix_encoder(model, {str(folder)!r}) reads it"
        )
    found = fields.read_config(path, "save_prefix", "adapter_config.json", "load_peft")
    config: dict[str, Any] = {"heads": [], **found}
    fields.check(str(path), config, _FIELDS, _NEEDED)
    if config["kind"].startswith("prompt") and config.get("embedding_dim") is None:
        raise ValueError(f"{path}: embedding_dim is None, expected {_SIZE.expected}")
    if len(config["locations"]) != len(config["kv_shapes"]):
        raise ValueError(
            f"{path}: locations is {config['locations']!r:.80}, expected a name for each layer"
        )
    return config


def tensors_of(module: nn.Module, *, folded: bool) -> dict[str, Tensor]:
    """The tensors of an encoder or of a prompt's source, by their names in prefix.safetensors.

    `folded`: what an MLP produces in place of the MLP.
    """
    state = module.state_dict()
    if isinstance(module, PrefixEncoder) and folded:
        gates = {key: value for key, value in state.items() if key.startswith("gates.")}
        return {"flat": module.flat().detach(), **gates}
    if isinstance(module, PromptEncoder) and folded:
        state = module.bake().state_dict()
    return {f"encoder.{key}": value for key, value in state.items()}
