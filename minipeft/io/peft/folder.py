"""The files of weights in an adapter's directory: one, several by an index, or a pickle.

adapter_model.safetensors
adapter_model.safetensors.index.json, adapter_model-00001-of-00002.safetensors, ...
adapter_model.bin                           refused: reading it can run code
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.io.fields import read_object
from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME
from minipeft.io.replace import current
from minipeft.io.seal import read_sealed
from minipeft.io.shards import Reader

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
    refuse_pickle(directory)
    single, index = directory / WEIGHTS_NAME, directory / INDEX_NAME
    if current(single).is_file() or not index.is_file():
        return read_sealed(single, config, CONFIG_NAME)
    return _sharded(index), {}


def refuse_pickle(directory: Path) -> None:
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


def _sharded(index: Path) -> dict[str, Tensor]:
    """The tensors that an index names: each in its file, and nothing else in those files."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: no 'weight_map' from names to files")
    for name, file in places.items():
        # a plain name: no other folder, no drive, nothing hidden
        plain = isinstance(file, str) and file == Path(file).name and "\\" not in file
        if not plain or file.startswith(".") or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {name:.80} is in {str(file)[:80]!r}; expected the name of a "
                ".safetensors file in the same directory"
            )
    with Reader(index.parent / file for file in sorted(set(places.values()))) as reader:
        for name, path in reader.file_of.items():
            if places.get(name) != path.name:
                raise ValueError(
                    f"{path}: {name:.80} is in this file; {index.name} does not say so"
                )
        if lost := sorted(name for name in places if name not in reader.file_of):
            counts = Counter(places[name] for name in lost)
            raise ValueError(
                f"{index}: {lost[0]:.80} is not in {places[lost[0]]} ({len(lost)} names in all, of "
                f"{len(counts)} files)"
            )
        return {name: reader.read(name) for name in reader.file_of}
