"""One more file beside the adapters': what Trainer needs to go on, and to load its best model.

For `resume_from_checkpoint` and `load_best_model_at_end` transformers' Trainer looks for
`model.safetensors` in the checkpoint and gives its tensors to `model.load_state_dict(state, False)`
(transformers 5.23, trainer.py).  So here they stand under the names of the model's own state dict,
as they are: PEFT's files have other names, and lack what only training needs (the network behind a
prefix, a start that is subtracted, statistics).

    folder/adapter_model.safetensors     PEFT's; other programs, load_peft
    folder/model.safetensors             this one; Trainer

A folder that holds a whole model already keeps it: from_pretrained would take this file for it.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.io.files import encoded
from minipeft.io.replace import Replacement
from minipeft.io.shards import Reader
from minipeft.model.trained_state import trained_state

FILE_NAME = "model.safetensors"
_MARK = "minipeft_resume"  # in the metadata of such a file
_OF_A_MODEL = (FILE_NAME, f"{FILE_NAME}.index.json", "pytorch_model.bin",
               "pytorch_model.bin.index.json", "config.json")  # fmt: skip


def stage_resume(unit: Replacement, tensors: Mapping[str, Tensor]) -> None:
    """Let `tensors` be the folder's file, in the save that `unit` stands for.

    Where the folder holds a model of its own (weights, or a configuration to which this file would
    be the weights), that stays, no such file is written, and a warning says so; an older file of
    this kind is removed then, for it would not belong to the adapters beside it.
    """
    mine = is_resume(unit.folder / FILE_NAME)
    taken = [name for name in _OF_A_MODEL if (unit.folder / name).exists()
             and not (name == FILE_NAME and mine)]  # fmt: skip
    if not taken:
        unit.write(FILE_NAME, encoded(tensors, {_MARK: "1"}))
        return
    if mine:
        unit.remove(FILE_NAME)
    warnings.warn(
        f"save_pretrained: {unit.folder} holds {taken[0]}, which is a model's; the adapter files "
        f"are saved, but not the {FILE_NAME} beside them from which Trainer resumes and loads its "
        "best model: save into a folder of their own for that",
        stacklevel=4,
    )


def is_resume(path: Path) -> bool:
    """Whether this is a file of that kind, and not somebody's model."""
    try:
        with Reader([path]) as reader:
            return _MARK in reader.metadata[path]
    except ValueError:  # not there, or damaged: then it is not known to be ours
        return False


def load_state(
    model: nn.Module, state_dict: Mapping[str, Any], *arguments: Any, **options: Any
) -> Any:
    """In the place of `model.load_state_dict`: the same, but for what it says is missing.

    With `strict` off and exactly the tensors that `trained_state` names, nothing is missing: the
    base stays as it is, and Trainer would warn of each of its weights.
    """
    found = type(model).load_state_dict(model, state_dict, *arguments, **options)
    strict = options.get("strict", arguments[0] if arguments else True)
    if not strict and state_dict and state_dict.keys() == trained_state(model).keys():
        found.missing_keys.clear()
    return found
