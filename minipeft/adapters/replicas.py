"""Adapters that are on and off beneath torch's DistributedDataParallel (DDP).

DDP notes the parameters that train when it is made.  In each step it waits for a gradient of every
one of them, unless it was made with `find_unused_parameters=True`, and of others it keeps no
gradients equal.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from minipeft.adapters.protocol import Adapter

Places = Mapping[str, Iterable[Adapter]]  # layers by the names of their modules


def unwrapped(model: Any) -> Any:
    """The model inside a DistributedDataParallel, whose class and configuration files ask for."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def check_replicas(caller: str, model: nn.Module, off: Mapping[str, Places]) -> None:
    """Raise ValueError if adapters that are to be off, by their names, are waited for by a DDP.

    Only a model that holds the DDP, or is one, can be asked; the module inside knows nothing of it.
    """
    for module in model.modules():
        if not isinstance(module, nn.parallel.DistributedDataParallel):
            continue
        ddp: Any = module
        finds = ddp.find_unused_parameters or getattr(ddp, "static_graph", False)
        if not finds and (waits := _first_that_trains(off)):
            raise ValueError(
                f"{caller}: {waits!r} would be off, and DistributedDataParallel waits for its "
                "gradients in every step; make that with find_unused_parameters=True, or freeze "
                f"{waits!r} before you make it (requires_grad_(False) on "
                f"minipeft.adapter_parameters(model, name={waits!r}))"
            )


def _first_that_trains(adapters: Mapping[str, Places]) -> str | None:
    """The name of the first adapter that has a trainable parameter."""
    for name, places in adapters.items():
        for layers in places.values():
            for layer in layers:
                if any(p.requires_grad for p in layer.adapter_parameters().values()):
                    return name
    return None
