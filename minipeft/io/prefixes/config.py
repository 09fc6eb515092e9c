"""prefix_config.json: what a directory of minipeft's own holds, its values checked."""

from pathlib import Path
from typing import Any

from minipeft.io import fields
from minipeft.io.fields import NAMES, TEXT, Kind, list_of, optional, whole
from minipeft.io.replace import current

CONFIG_NAME, WEIGHTS_NAME = "prefix_config.json", "prefix.safetensors"
_LARGEST_SIZE, _MOST_LAYERS = 2**24, 2**12
_SIZE = whole(0, _LARGEST_SIZE)


def _are_shapes(value: object) -> bool:
    """Whether this is a list of (kv_heads, key_dim, value_dim)."""
    if not isinstance(value, list) or len(value) > _MOST_LAYERS:
        return False
    sizes = list_of(whole(1, _LARGEST_SIZE))
    return all(sizes.fits(shape) and len(shape) == 3 for shape in value)


_FIELDS = {
    "format": fields.one_of(1),
    "kind": fields.one_of("encoder", "prefix", "prompt", "prompt_encoder"),
    "prefix_length": _SIZE,
    "hidden": optional(_SIZE),
    "embedding_dim": optional(_SIZE),
    "frozen": optional(_SIZE),
    "kv_shapes": Kind(f"three sizes for each of at most {_MOST_LAYERS} layers", _are_shapes),
    "locations": NAMES,
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
_NEEDED_SIZES = {
    "encoder": (),
    "prefix": (),
    "prompt": ("embedding_dim",),
    "prompt_encoder": ("embedding_dim",),
}


def read_config(path: Path) -> dict[str, Any]:
    """prefix_config.json, its values checked.

    Raises:
        ValueError: no such file, no JSON, or a field that is missing or has another kind of value.
    """
    if not current(path).is_file():
        hint = "; it holds an adapter_config.json: use load_peft"
        raise ValueError(
            f"{path}: no such file; expected a directory that save_prefix wrote"
            f"{hint if (path.parent / 'adapter_config.json').is_file() else ''}"
        )
    config: dict[str, Any] = {"heads": [], **fields.read_object(path)}
    fields.check(str(path), config, _FIELDS, _NEEDED)
    for key in _NEEDED_SIZES[config["kind"]]:
        if config.get(key) is None:
            raise ValueError(f"{path}: {key} is None, expected {_FIELDS[key].expected}")
    if len(config["locations"]) != len(config["kv_shapes"]):
        raise ValueError(
            f"{path}: locations is {config['locations']!r:.80}, expected a name for each layer"
        )
    return config
