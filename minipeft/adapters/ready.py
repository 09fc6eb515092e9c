"""Whether a model is ready to be changed: each parameter has its shape, and is here as a whole."""

import sys
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from minipeft.adapters.protocol import is_adapter
from minipeft.adapters.targets import survey

_DISTRIBUTED = (
    ("torch.nn.parallel", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
)


def check_model(caller: str, model: object) -> None:
    """Raise unless this is a module with submodules to replace, all there and whole."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a module, got {type(model).__name__}")
    if not any(True for _ in model.children()) and not survey(model).experts:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no submodules to replace; wrap it yourself"
        )
    check_ready(caller, model)


def check_ready(caller: str, model: nn.Module) -> None:
    """Raise unless parameters have their shapes, and this process has the whole of each.

    Raises:
        ValueError: lazy modules before their first call; weights that accelerate keeps elsewhere;
            DDP, FSDP or fully_shard: nothing would keep equal what each process draws.
    """
    for name, module in model.named_modules():
        stored = [*module._parameters.values(), *module._buffers.values()]
        if any(is_lazy(tensor) for tensor in stored if tensor is not None):
            raise ValueError(
                f"{caller}: {name or 'the model'} ({type(module).__name__}) has parameters without "
                "a shape yet; call the model once, so that they get one"
            )
        sharded = _is_a(module, "torch.distributed.fsdp", "FSDPModule")  # whole after a forward
        if sharded or any(_is_a(t, "torch.distributed.tensor", "DTensor") for t in stored):
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
        for where, kind in _DISTRIBUTED:
            if _is_a(module, where, kind):
                raise ValueError(
                    f"{caller}: {name or 'the model'} is a {kind}, which would not keep what is "
                    f"added equal in all processes; do this first, then wrap the model in {kind}"
                )


def _is_a(thing: object, module: str, name: str) -> bool:
    """Whether this is of a class of torch.distributed: it cannot be while that is not imported."""
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(thing, kind)
