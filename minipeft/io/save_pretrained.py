"""`save_pretrained` of an injected model writes the adapter, as Trainer expects of it.

The method as it was would write base weights under names such as `q_proj.base.weight`, which
`from_pretrained` does not know: it would fill those layers with random numbers.  `inject.tell`
calls `adopt` after every change of a model that has the method (minipeft/__init__.py asks for
that), so nothing below io/ knows of this file.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT, named
from minipeft.adapters.protocol import is_adapter, is_packed
from minipeft.adapters.state import named_adapters
from minipeft.io.peft import CONFIG_NAME, WEIGHTS_NAME, CannotExpress
from minipeft.io.peft.save import describe, stage_adapter
from minipeft.io.prefixes import config as own_files
from minipeft.io.prefixes import save as own_format
from minipeft.io.replace import Replacement
from minipeft.io.seal import stage


def save_adapters(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **arguments: object,
) -> None:
    """In the place of `model.save_pretrained`: save the adapter files, never base weights.

    Each adapter in PEFT's format; a prefix that it cannot express, that would lose its network or
    frozen positions, or that shares its name with LoRA, in the format of io.prefixes.save_prefix in
    the same directory, which load_prefix reads.

    All files of all adapters are of one save, as of save_peft; those of an earlier one that are not
    written now go with it.

    Sharding, variants and serialisation options have no meaning for an adapter and are accepted.

    Raises:
        ValueError: packed layers and no adapter, which this format cannot hold; push_to_hub.
    """
    if arguments.get("push_to_hub"):
        raise ValueError("save_pretrained: save the adapter first, then upload the directory")
    if not named_adapters(model):
        raise ValueError(
            "save_pretrained: the model has 4-bit layers; io.bitsandbytes.save_quantized writes "
            "them as a checkpoint that from_pretrained (with bitsandbytes) and load_quantized load"
        )
    if not is_main_process:
        return
    gathered = own_format.gathered_by_id(model, state_dict or {})
    staged: list[Callable[[Replacement], None]] = []
    for name in named(model):
        folder, in_peft, beside = "" if name == DEFAULT else name, True, False
        try:
            found = describe(model, [name], gathered, beside_prefix=False)
        except CannotExpress:
            in_peft = beside = own_format.has_more_than_prefix(model, name)
            if beside:
                found = describe(model, [name], gathered, beside_prefix=True)
        own = not in_peft or beside or own_format.loses_in_peft(model, name)
        own = own and own_format.has_prefix(model, name)
        inside = f"{folder}/" if folder else ""
        files = [f"{inside}{file}" for file in (own_files.CONFIG_NAME, own_files.WEIGHTS_NAME)]
        if in_peft:
            staged.append(partial(stage_adapter, folder=folder, adapter=found[name]))
        if own:
            config, tensors = own_format.describe_prefix(
                model, name, gathered, reparametrization=True, heads=not beside
            )
            names = (files[0], files[1])
            staged.append(partial(stage, names=names, config=config, tensors=tensors))
        stale = [] if in_peft else [f"{inside}{file}" for file in (CONFIG_NAME, WEIGHTS_NAME)]
        for file in [*stale, *([] if own else files)]:  # of an earlier save into the same directory
            staged.append(partial(Replacement.remove, name=file))
    with Replacement(Path(save_directory)) as unit:
        for write in staged:
            write(unit)


def adopt(model: nn.Module) -> None:
    """Give every Hugging Face model in `model` this `save_pretrained`, or its own back.

    Its own where neither adapters nor packed layers are left.
    """
    ours = {id(part) for part in model.modules() if is_adapter(part) or is_packed(part)}
    for module in model.modules():
        if not callable(getattr(type(module), "save_pretrained", None)):
            continue
        if any(id(part) in ours for part in module.modules()):
            # a partial, not a bound method: pickle would look a bound method up by its name
            module.save_pretrained = partial(save_adapters, module)  # type: ignore[assignment]
        else:
            vars(module).pop("save_pretrained", None)
