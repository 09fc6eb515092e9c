"""Finish, or leave the model as it was.

check_ready("inject", model)     before the first change: what no function here can change
with restoring(model):           on an error everything that a model consists of is put back
    ...
"""

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from minipeft.adapters.protocol import is_adapter

_CONTAINERS = (dict, OrderedDict, list, set)


def check_ready(caller: str, model: nn.Module) -> None:
    """Raise unless parameters have their shapes, and this process has the whole of each.

    Raises:
        ValueError: lazy modules before their first call; weights that accelerate keeps elsewhere; a
            model in DistributedDataParallel or FullyShardedDataParallel, or sharded by fully_shard:
            each process would draw an adapter of its own, and nothing would keep them equal.
    """
    for name, module in model.named_modules():
        stored = [*module._parameters.values(), *module._buffers.values()]
        if any(is_lazy(tensor) for tensor in stored if tensor is not None):
            raise ValueError(
                f"{caller}: {name or 'the model'} ({type(module).__name__}) has parameters without "
                "a shape yet; call the model once, so that they get one"
            )
        if any(_is_sharded(tensor) for tensor in stored):
            raise ValueError(
                f"{caller}: the parameters of {name or 'the model'} are shards (DTensor); do this "
                "first, in every process with the same random seed, then fully_shard the model"
            )
        offloaded = "_hf_hook" in vars(module) and not is_adapter(module)
        if offloaded and any(t.is_meta for t in stored if t is not None):
            raise ValueError(
                f"{caller}: {name or 'the model'} is offloaded by accelerate, and its weights are "
                "not here; do this first, then dispatch or offload the model"
            )
        if wrapped := _distributed(module):
            raise ValueError(
                f"{caller}: {name or 'the model'} is a {wrapped}, which would not keep what is "
                f"added equal in all processes; do this first, then wrap the model in {wrapped}"
            )


def _of_torch(module: str, name: str) -> Any:
    """A class of torch.distributed, if that is imported: nothing is of it if it is not."""
    return getattr(sys.modules.get(module), name, None)


def _is_sharded(tensor: object) -> bool:
    kind = _of_torch("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def _distributed(module: nn.Module) -> str | None:
    for where, name in (
        ("torch.nn.parallel", "DistributedDataParallel"),
        ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ):
        kind = _of_torch(where, name)
        if kind is not None and isinstance(module, kind):
            return name
    return None


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """On an error put back which modules, parameters and attributes the model has.

    Every module gets its attributes again, containers among them their contents, every parameter
    its `requires_grad`, every adapter its strength.  Values of tensors are not kept: who writes to
    them does so last.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [
        (module, dict(vars(module)), {n: copy.copy(v) for n, v in vars(module).items()
                                      if type(v) in _CONTAINERS})
        for module in model.modules()
    ]  # fmt: skip
    try:
        yield
    except BaseException:
        for module, attributes, contents in before:
            for name, content in contents.items():
                container = attributes[name]
                container.clear()
                (container.extend if type(container) is list else container.update)(content)
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, _, _ in before:
            if is_adapter(module):  # what follows from it: tensors that compiled code reads
                module.enabled = module.enabled
        raise
