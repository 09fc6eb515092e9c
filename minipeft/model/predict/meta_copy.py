"""A copy of a model without its weights: on the meta device, whatever the model is on."""

import copy

import torch
from torch import Tensor, nn

from minipeft.adapters.ready import check_ready


def meta_copy(caller: str, model: nn.Module) -> nn.Module:
    """The model with empty tensors of the same shapes; no weight is copied and nothing is changed.

    Tensors that are shared, and views of one memory, stay so; parameters train where they trained.

    Raises:
        TypeError: not a module.
        ValueError: a parameter has no shape before the first forward (lazy modules), the model is
            sharded or wrapped for several processes, or it cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a module, got {type(model).__name__}")
    check_ready(caller, model)
    empty: dict[int, object] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(_empty(parameter, storages), parameter.requires_grad)
    for buffer in model.buffers():
        empty[id(buffer)] = _empty(buffer, storages)
    try:
        found: nn.Module = copy.deepcopy(model, empty)
    except Exception as error:  # whatever a module's own copying raises
        raise ValueError(
            f"{caller}: the model cannot be copied ({type(error).__name__}: {error}); pass its "
            "config, or a model that was built under torch.device('meta')"
        ) from error
    return found


def _empty(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """The same view of a storage on the meta device; `storages` has those that were made so far."""
    own = tensor.untyped_storage()
    if own._cdata not in storages:
        made = torch.empty(own.nbytes(), dtype=torch.uint8, device="meta")
        storages[own._cdata] = made.untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype, device="meta")
    return view.set_(storages[own._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
