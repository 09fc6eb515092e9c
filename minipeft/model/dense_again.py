"""A model whose last 4-bit layer is gone no longer says that it is 4-bit.

A Hugging Face model says so by `quantization_config` in its configuration, and by attributes that
transformers' loader sets.  If they stayed, `save_pretrained` would write dense weights that
`from_pretrained` takes for codes.
"""

from typing import Any

from torch import nn

_OF_THE_LOADER = (
    "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized",
    "is_4bit_serializable",
)  # fmt: skip


def forget_codes(model: nn.Module) -> None:
    """Drop these marks from modules that have a configuration and hold no codes any more.

    Only the marks of bitsandbytes' 4-bit layers are dropped, and none from a configuration shared
    with a module that still has codes.  This is a last step: it cannot fail.
    """
    owners = [module for module in model.modules() if _configuration(module) is not None]
    coded = {id(module): _holds_codes(module) for module in owners}
    kept = {id(_configuration(module)) for module in owners if coded[id(module)]}
    for module in owners:
        config = _configuration(module)
        if id(config) in kept or coded[id(module)]:
            continue
        parts = [config, *(part for part in vars(config).values() if hasattr(part, "__dict__"))]
        for part in parts:
            if _says_4_bit(vars(part).get("quantization_config")):
                vars(part).pop("quantization_config")
        if vars(module).get("is_loaded_in_4bit"):
            for name in _OF_THE_LOADER:
                vars(module).pop(name, None)


def _configuration(module: nn.Module) -> Any:
    config = vars(module).get("config")
    return config if hasattr(config, "__dict__") else None


def _holds_codes(module: nn.Module) -> bool:
    """Whether any parameter holds other numbers than floats: codes, ours or another library's."""
    return any(not parameter.is_floating_point() for parameter in module.parameters())


def _says_4_bit(config: object) -> bool:
    if isinstance(config, dict):
        return bool(config.get("load_in_4bit"))
    return bool(getattr(config, "load_in_4bit", False))
