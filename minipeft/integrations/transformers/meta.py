"""A checkpoint's model without its weights: every parameter on the meta device."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


def meta_model(path: str | os.PathLike[str]) -> nn.Module:
    """The model that config.json describes, by transformers' class, on the meta device.

    The class is the first of `architectures`; code that comes with a checkpoint is not run.  The
    model takes no memory and has no values: it is what `load_quantized` fills.

    Raises:
        ImportError: transformers is not installed.
        ValueError: config.json is missing or damaged, or names no model class of transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "meta_model needs transformers (pip install 'minipeft[hf]'); without it, build the "
            "model yourself under torch.device('meta')"
        ) from error
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: no config.json; expected a local checkpoint's folder")
    try:
        config: Any = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory}: config.json is not transformers' ({error})") from error
    return model_of(config, str(directory / "config.json"))


def model_of(config: Any, where: str = "config") -> nn.Module:
    """The model that a transformers config describes, on the meta device.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the config names no model class of transformers.
    """
    import transformers

    names = config.architectures or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(
            f"{where}: architectures {names!r} name no model class of transformers; build the "
            "model yourself under torch.device('meta')"
        )
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model
