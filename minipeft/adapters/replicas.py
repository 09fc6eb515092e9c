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


def check_replicas(
    caller: str, model: nn.Module, on: Mapping[str, Places], off: Mapping[str, Places]
) -> None:
    """Raise ValueError if these adapters, by their names, cannot be on and off in a DDP.

    Only a model that holds the DDP, or is one, can be asked; the module inside knows nothing of it.
    """
    for module in model.modules():
        if not isinstance(module, nn.parallel.DistributedDataParallel):
            continue
        ddp: Any = module
        known = {id(p) for p in getattr(ddp, "_module_parameters", ()) if p.requires_grad}
        finds = ddp.find_unused_parameters or getattr(ddp, "static_graph", False)
        if not finds and (waits := _first(off, known, among=True)):
            raise ValueError(
                f"{caller}: {waits!r} would be off, and DistributedDataParallel waits for its "
                "gradients in every step; make that with find_unused_parameters=True, or freeze "
                f"{waits!r} before you make it (requires_grad_(False) on "
                f"minipeft.adapter_parameters(model, name={waits!r}))"
            )
        if unknown := _first(on, known, among=False):
            raise ValueError(
                f"{caller}: {unknown!r} trains, and did not when DistributedDataParallel was made, "
                "so processes would not keep its gradients equal; make that anew"
            )


def _first(adapters: Mapping[str, Places], known: set[int], *, among: bool) -> str | None:
    """The first adapter with a trainable parameter that is (or is not) `among` the known ones."""
    for name, places in adapters.items():
        for layers in places.values():
            for layer in layers:
                own = layer.adapter_parameters().values()
                if any(p.requires_grad and (id(p) in known) == among for p in own):
                    return name
    return None
