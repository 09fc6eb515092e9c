"""prefix_config.json: what a directory of minipeft's own holds, its values checked."""

from pathlib import Path
from typing import Any

from minipeft.io.files import parse_object
from minipeft.io.replace import current

CONFIG_NAME, WEIGHTS_NAME = "prefix_config.json", "prefix.safetensors"
_LARGEST_CONFIG = 2**24  # bytes
_LARGEST_SIZE, _MOST_LAYERS = 2**24, 2**12
_SIZES = ("prefix_length", "hidden", "embedding_dim", "frozen", "lstm_layers")
_KINDS = ("encoder", "prefix", "prompt", "prompt_encoder")


def read_config(path: Path) -> dict[str, Any]:
    """prefix_config.json, its values checked."""
    place = current(path)
    if not place.is_file():
        hint = "; it holds an adapter_config.json: use load_peft"
        raise ValueError(
            f"{path}: no such file; expected a directory that save_prefix wrote"
            f"{hint if (path.parent / 'adapter_config.json').is_file() else ''}"
        )
    if (size := place.stat().st_size) > _LARGEST_CONFIG:
        raise ValueError(f"{path}: {size} bytes are too many for a configuration")
    config: dict[str, Any] = parse_object(place.read_bytes(), str(path))
    if (
        type(config.get("format")) is not int
        or config["format"] != 1
        or (config.get("kind") not in _KINDS)
    ):
        raise ValueError(
            f"{path}: format {config.get('format')!r:.40} of kind {config.get('kind')!r:.40}; "
            f"expected 1 and one of {_KINDS}"
        )
    of_a_prompt = config["kind"] in ("prompt", "prompt_encoder")
    for key in _SIZES:
        value = config.get(key)
        required = key == "prefix_length" or (key == "embedding_dim" and of_a_prompt)
        if value is None and not required:
            continue
        most = _MOST_LAYERS if key.endswith("layers") else _LARGEST_SIZE
        if type(value) is not int or not 0 <= value < most:
            raise ValueError(
                f"{path}: {key} is {value!r:.40}, expected a whole number below {most}"
            )
    shapes, locations = config.get("kv_shapes"), config.get("locations")
    if (
        not isinstance(shapes, list)
        or len(shapes) > _MOST_LAYERS
        or not all(
            isinstance(s, list)
            and len(s) == 3
            and all(type(n) is int and 0 < n < _LARGEST_SIZE for n in s)
            for s in shapes
        )
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
    optional: dict[str, tuple[type, ...]] = {
        "dropout": (int, float), "gated": (bool,), "model": (str,), "model_type": (str,),
        "network": (str,),
    }  # fmt: skip
    for key, kinds in optional.items():
        if key in config and not isinstance(config[key], kinds):
            raise ValueError(f"{path}: {key} is {config[key]!r:.40}")
    return config
