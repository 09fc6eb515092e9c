"""`save_pretrained` of an injected model writes the adapter, as Trainer expects of it.

The method as it was would write base weights under names such as `q_proj.base.weight`, which
`from_pretrained` does not know: it would fill those layers with random numbers.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from minipeft import inject
from minipeft.adapters import named_adapters
from minipeft.protocol import is_adapter, is_packed
from minipeft.registry import DEFAULT, named


def save_adapters(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **arguments: object,
) -> None:
    """In the place of `model.save_pretrained`: save the adapter files, never base weights.

    Each adapter in PEFT's format; a prefix that it cannot express, that would lose its network or
    frozen positions, or that shares its name with LoRA, in the format of io.ptuning.save_prefix in
    the same directory, which load_prefix reads.

    Sharding, variants and serialisation options have no meaning for an adapter and are accepted.

    Raises:
        ValueError: packed layers and no adapter, which this format cannot hold; push_to_hub.
    """
    if arguments.get("push_to_hub"):
        raise ValueError("save_pretrained: save the adapter first, then upload the directory")
    if not named_adapters(model):
        raise ValueError(
            "save_pretrained: the model has NF4 layers, whose codes from_pretrained would not "
            "load; save model.state_dict() with safetensors, and load it into a model that "
            "quantize_model has prepared"
        )
    # io builds on integrations
    from minipeft.io.peft import CONFIG_NAME, WEIGHTS_NAME, CannotExpress, save_peft
    from minipeft.io.ptuning import config as own_files
    from minipeft.io.ptuning import save as ptuning

    if not is_main_process:
        return
    for name in named(model):
        directory = Path(save_directory) if name == DEFAULT else Path(save_directory) / name
        in_peft, beside = True, False
        try:
            save_peft(model, directory, name=name, state_dict=state_dict)
        except CannotExpress:
            in_peft = beside = ptuning.has_more_than_prefix(model, name)
            if beside:
                save_peft(model, directory, name=name, state_dict=state_dict, beside_prefix=True)
        own = not in_peft or beside or ptuning.loses_in_peft(model, name)
        if own and ptuning.has_prefix(model, name):
            ptuning.save_prefix(
                model, directory, name=name, reparametrization=True, heads=not beside,
                state_dict=state_dict,
            )  # fmt: skip
        stale = [] if in_peft else [CONFIG_NAME, WEIGHTS_NAME]
        stale += [] if own else [own_files.CONFIG_NAME, own_files.WEIGHTS_NAME]
        for file in stale:  # of an earlier save into the same directory
            (directory / file).unlink(missing_ok=True)


def adopt(model: nn.Module) -> None:
    """Give every Hugging Face model in `model` this `save_pretrained`, or its own back.

    Its own where neither adapters nor packed layers are left.
    """
    for module in model.modules():
        if not callable(getattr(type(module), "save_pretrained", None)):
            continue
        if any(is_adapter(part) or is_packed(part) for part in module.modules()):
            # a partial, not a bound method: pickle would look a bound method up by its name
            module.save_pretrained = functools.partial(save_adapters, module)  # type: ignore[assignment]
        else:
            vars(module).pop("save_pretrained", None)


inject.after_swap.append(adopt)
