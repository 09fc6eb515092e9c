"""The files of weights in an adapter's directory: one, several by an index, or a pickle.

adapter_model.safetensors
adapter_model.safetensors.index.json, adapter_model-00001-of-00002.safetensors, ...
adapter_model.bin                           refused: reading it can run code
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME
from minipeft.io.replace import current
from minipeft.io.seal import read_sealed
from minipeft.io.shards import indexed

INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
_PICKLE_NAME = "adapter_model.bin"


def read_weights(
    directory: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the directory's adapter, of one file or of those that an index names.

    And what the file says for training, empty where it says nothing; seal.py compares `config`,
    the content of the configuration, with what the weights were saved with.

    Raises:
        NotOneSave: the weights were saved with another configuration.
        ValueError: no such file, a pickle, a damaged file or index.
    """
    _refuse_pickle(directory)
    single, index = directory / WEIGHTS_NAME, directory / INDEX_NAME
    if current(single).is_file() or not index.is_file():
        return read_sealed(single, config, CONFIG_NAME)
    with indexed(index) as reader:
        return {name: reader.read(name) for name in reader.specs}, {}


def _refuse_pickle(directory: Path) -> None:
    """Raise ValueError if the weights are there as a pickle only."""
    safe = (directory / name for name in (WEIGHTS_NAME, INDEX_NAME))
    if (directory / _PICKLE_NAME).is_file() and not any(current(p).is_file() for p in safe):
        raise ValueError(
            f"{directory}: {_PICKLE_NAME} is a pickle, which can run code, so it is not read here; "
            "turn it into a safe file by two lines, which run none of its code:\n"
            f"    state = torch.load({str(directory / _PICKLE_NAME)!r}, weights_only=True)\n"
            "    safetensors.torch.save_file({name: value.clone() for name, value in "
            f"state.items()}}, {str(directory / WEIGHTS_NAME)!r})"
        )
