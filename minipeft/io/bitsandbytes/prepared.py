"""A model as a checkpoint sees it: without adapters, and with weights in the place of codes.

    in the model                            here
    layers.0.up.base.packed, ...            layers.0.up.weight     of the weight's shape, no values
    layers.0.up.base.bias                   layers.0.up.bias
    layers.0.up.lora_a                      nothing: an adapter's own

So a model that was injected and quantised on the meta device is filled like a plain one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import innermost, is_adapter, is_packed
from minipeft.model.base_state import plain_modules
from minipeft.qlora import PackedModule


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor, asked without importing torch.distributed."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


class Prepared:
    """The tensors of a model by the names of the plain one, and where each is kept."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.own: dict[str, Tensor] = {}
        self.coded: dict[str, PackedModule] = {}  # weights that are codes: the layer that has them
        self._holders: dict[str, tuple[nn.Module, str]] = {}
        if not any(is_adapter(module) or is_packed(module) for module in model.modules()):
            self.own = model.state_dict(keep_vars=True)
            return
        self.modules = plain_modules(model)
        weights: dict[int, Tensor] = {}
        for path, module in self.modules.items():
            before = f"{path}." if path else ""
            if is_adapter(module):
                continue
            stored: dict[str, Any] = {**module._parameters, **module._buffers}
            if isinstance(module, PackedModule):
                name = path if len(module.shape) == 3 else f"{before}weight"
                empty = torch.empty(module.shape, dtype=module.weight_dtype, device="meta")
                self.own[name] = weights.setdefault(id(module), empty)
                self.coded[name] = module
                stored = {"bias": stored.get("bias")}
            for own, value in stored.items():
                if value is not None and own not in module._non_persistent_buffers_set:
                    self.own[before + own] = value
                    self._holders[before + own] = module, own

    def module(self, path: str) -> nn.Module:
        """The model's own module of this name, below adapters."""
        found = self.modules.get(path)
        return innermost(self.model.get_submodule(path)) if found is None else found

    def holder(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a tensor, and the tensor's name in it."""
        if name not in self._holders:
            path, _, own = name.rpartition(".")
            return self.module(path), own
        return self._holders[name]

    def owner(self, name: str) -> nn.Module:
        """The module whose weight this is: of codes their layer, of others the holder."""
        return self.coded[name] if name in self.coded else self.holder(name)[0]

    def real(self, name: str) -> str:
        """The name that the model itself has for a tensor."""
        holder, own = self.holder(name)
        path = next(path for path, module in self.model.named_modules() if module is holder)
        return f"{path}.{own}" if path else own
