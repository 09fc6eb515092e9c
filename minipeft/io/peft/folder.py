"""The files of weights in an adapter's directory: one, or several by an index.

adapter_model.safetensors
adapter_model.safetensors.index.json, adapter_model-00001-of-00002.safetensors, ...
adapter_model.bin                           read where none of the above is there: pickled.py
adapter_model.bin.index.json, adapter_model-00001-of-00002.bin, ...
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME
from minipeft.io.pickled import read_pickled
from minipeft.io.replace import current
from minipeft.io.seal import read_sealed
from minipeft.io.shards import indexed

INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
PICKLED_NAME = "adapter_model.bin"


def read_weights(
    directory: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the directory's adapter, of one file or of those that an index names.

    And what the file says for training, empty where it says nothing; seal.py compares `config`,
    the content of the configuration, with what the weights were saved with.

    Raises:
        NotOneSave: the weights were saved with another configuration.
        ValueError: no such file, a damaged file or index, a pickle of anything but tensors.
    """
    path = weights_file(directory)
    if path.name.endswith(".index.json"):
        with indexed(path) as reader:
            return {name: reader.read(name) for name in reader.specs}, {}
    if path.name == PICKLED_NAME:
        return read_pickled(path), {}
    return read_sealed(path, config, CONFIG_NAME)


def weights_file(directory: Path) -> Path:
    """The file that is read: weights or an index; where there is none, the name of the first."""
    if current(directory / WEIGHTS_NAME).is_file():
        return directory / WEIGHTS_NAME
    others = (INDEX_NAME, PICKLED_NAME, f"{PICKLED_NAME}.index.json")
    found = (directory / name for name in others if (directory / name).is_file())
    return next(found, directory / WEIGHTS_NAME)
