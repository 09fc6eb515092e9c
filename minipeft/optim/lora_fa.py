"""LoRA-FA: A stays where it started, and B follows the gradient of the whole weight.

With A frozen, the step of B that comes nearest to a step of W + s B A along W's own gradient G is
along  G A^T (A A^T)^-1 / s = (dL/dB) (A A^T)^-1 / s^2  (Zhang et al. 2023, as PEFT has it).
"""

from typing import Any

import torch
from torch import Tensor, nn

from minipeft.lora import LoRALinear
from minipeft.optim.lora_plus import lora_plus_groups

_RIDGE = 1e-8  # on A A^T, so that dependent rows leave it invertible


def freeze_a(model: nn.Module) -> list[str]:
    """Freeze every adapter's A factors; returns the names of the parameters.

    Raises:
        ValueError: the model has no LoRALinear.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.lora_a.requires_grad_(False)
            names.append(f"{name}.lora_a".lstrip("."))
    if not names:
        raise ValueError("freeze_a: the model has no LoRALinear; inject first")
    return names


class LoRAFA(torch.optim.AdamW):
    """AdamW for a model whose A factors are frozen (`freeze_a`), with LoRA-FA's gradient for B.

    Arguments as of torch.optim.AdamW.  Gradients of `lora_b` are replaced, before each step, by
    (dL/dB) (A A^T)^-1 / scaling^2; other adapter parameters are trained as they are.

    Raises:
        ValueError: no LoRALinear, or one whose lora_a is trainable.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, **adamw: Any) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
        if not self._layers:
            raise ValueError("LoRAFA: the model has no LoRALinear; inject first")
        if any(layer.lora_a.requires_grad for layer in self._layers):
            raise ValueError("LoRAFA: lora_a is trainable; call minipeft.freeze_a(model) first")
        groups = lora_plus_groups(model, lr, ratio=1.0)
        parameters = [p for group in groups for p in group["params"]]
        super().__init__(parameters, lr=lr, **adamw)
        self.register_step_pre_hook(_precondition)


def _precondition(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    assert isinstance(optimizer, LoRAFA)
    with torch.no_grad():
        for layer in optimizer._layers:
            grad = layer.lora_b.grad
            if grad is not None:
                grad.copy_(projected(grad, layer.lora_a, layer.scaling * layer.scale))


def projected(grad: Tensor, a: Tensor, scaling: float) -> Tensor:
    """grad (A A^T)^-1 / scaling^2, computed in float32."""
    wide = a.to(torch.float32)
    gram = wide @ wide.T
    gram.diagonal().add_(_RIDGE)
    solved: Tensor = torch.linalg.solve(gram, grad.to(torch.float32).T).T
    return (solved / scaling**2).to(grad.dtype)
