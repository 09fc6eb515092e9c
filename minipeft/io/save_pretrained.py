"""`save_pretrained` of an injected model writes the adapter, as Trainer expects of it.

The method as it was would write base weights under names such as `q_proj.base.weight`, which
`from_pretrained` does not know: it would fill those layers with random numbers.  `inject.tell`
calls `adopt` after every change of a model that has the method (minipeft/__init__.py asks for
that), so nothing below io/ knows of this file.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT, named
from minipeft.adapters.protocol import is_adapter, is_packed
from minipeft.adapters.sharded import gathered_all, is_shard, resharded
from minipeft.adapters.state import named_adapters
from minipeft.io.gathering import whole
from minipeft.io.peft import CONFIG_NAME, WEIGHTS_NAME, CannotExpress
from minipeft.io.peft.save import describe
from minipeft.io.prefixes import config as own_files
from minipeft.io.prefixes import save as prefixes
from minipeft.io.replace import Replacement
from minipeft.io.resume import load_state, stage_resume
from minipeft.io.seal import stage
from minipeft.model.trained_state import trained_state


def save_adapters(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **arguments: object,
) -> None:
    """In the place of `model.save_pretrained`: save the adapter files, never base weights.

    Each adapter is written in PEFT's format if that can express it.  A prefix or prompt is written
    in the format of save_prefix too, in the same directory: load_prefix reads all of
    it, with its network and frozen positions.  Where a prefix shares its name with LoRA, PEFT's
    files hold the LoRA.

    Beside them model.safetensors holds all that training has changed, under the model's own names:
    Trainer resumes from it and loads its best model (resume.py).

    All files of all adapters are of one save, as of save_peft; files of an earlier one that are not
    written now are removed.

    Sharding, variants and serialisation options have no meaning for an adapter and are accepted.

    Of a model that fully_shard has cut, every process calls this without a `state_dict`, as of
    save_peft; `is_main_process` says nothing then.  With a `state_dict` the main one alone does, as
    accelerate and Trainer call it.

    Raises:
        ValueError: packed layers and no adapter, which this format cannot hold; push_to_hub.
    """
    if arguments.get("push_to_hub"):
        raise ValueError("save_pretrained: save the adapter first, then upload the directory")
    if not named_adapters(model):
        raise ValueError(
            "save_pretrained: the model has 4-bit layers; minipeft.save_quantized writes "
            "them as a checkpoint that from_pretrained (with bitsandbytes) and load_quantized load"
        )
    meshes = None if state_dict is not None else resharded(model)
    if not is_main_process and meshes is None:
        return
    # two names of files, and what to write into them; None: they are removed
    staged: list[tuple[tuple[str, str], tuple[Any, ...] | None]] = []
    with whole("save_pretrained", model, state_dict) as writes:
        for name in named(model):
            inside = "" if name == DEFAULT else f"{name}/"
            beside = prefixes.has_more_than_prefix(model, name)
            peft: tuple[Any, ...] | None = None
            with suppress(CannotExpress):
                found = describe(model, [name], beside_prefix=beside, level=3)[name]
                peft = (found.config, found.tensors, found.training)
            own = None
            if prefixes.has_prefix(model, name):
                own = prefixes.describe_prefix(
                    model, name, reparametrization=True, heads=not beside
                )
            names = (f"{inside}{CONFIG_NAME}", f"{inside}{WEIGHTS_NAME}")
            staged.append((names, peft))
            names = (f"{inside}{own_files.CONFIG_NAME}", f"{inside}{own_files.WEIGHTS_NAME}")
            staged.append((names, own))
        given = state_dict or {}
        trained = {key: given.get(key, value) for key, value in trained_state(model).items()}
        if state_dict is not None and (cut := [k for k, v in trained.items() if is_shard(v)]):
            raise ValueError(
                f"save_pretrained: {cut[0]} trains and is a shard (DTensor), and state_dict lacks "
                "it; leave state_dict out and call this in every process"
            )
        trained = gathered_all("save_pretrained", meshes, trained)
        if writes:
            _write(Path(save_directory), staged, trained)


def _write(
    directory: Path,
    staged: list[tuple[tuple[str, str], tuple[Any, ...] | None]],
    trained: Mapping[str, Tensor],
) -> None:
    with Replacement(directory) as unit:
        for files, content in staged:
            if content is not None:
                stage(unit, files, *content)
            else:
                for file in files:
                    unit.remove(file)
        stage_resume(unit, trained)


def adopt(model: nn.Module) -> None:
    """Give every Hugging Face model in `model` these two methods, or its own back.

    `save_pretrained`, and the `load_state_dict` of resume.py; its own where neither adapters nor
    packed layers are left.
    """
    ours = {id(part) for part in model.modules() if is_adapter(part) or is_packed(part)}
    for module in model.modules():
        if not callable(getattr(type(module), "save_pretrained", None)):
            continue
        if any(id(part) in ours for part in module.modules()):
            # partials, not bound methods: pickle would look a bound method up by its name
            module.save_pretrained = partial(save_adapters, module)  # type: ignore[assignment]
            module.load_state_dict = partial(load_state, module)  # type: ignore[method-assign]
        else:
            for name in ("save_pretrained", "load_state_dict"):
                vars(module).pop(name, None)
