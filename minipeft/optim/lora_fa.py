"""LoRA-FA: A stays where it started, and B follows the gradient of the whole weight.

With A frozen, the step of B that comes nearest to a step of W + s B A along W's own gradient G is
along  G A^T (A A^T)^-1 / s = (dL/dB) (A A^T)^-1 / s^2  (Zhang et al. 2023, as PEFT has it).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.lora import LoRALinear
from minipeft.optim.lora_plus import check_is_model, lora_plus_groups


class LoRAFA(torch.optim.AdamW):
    """AdamW that freezes lora_a of every LoRALinear, with LoRA-FA's gradient for lora_b.

    Arguments as of torch.optim.AdamW.  In each step the gradients of `lora_b` of every LoRALinear
    are replaced, in place, by (dL/dB) (A A^T)^-1 / scaling^2, the inverse being the pseudo-inverse
    where a rank is above in_features; other adapter parameters are trained as they are.

    Raises:
        ValueError: the model has no LoRALinear.
        TypeError: model is no module; it is pickled or copied; `state_dict` is what can be saved.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, **adamw: Any) -> None:
        check_is_model("LoRAFA", model)
        self._layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
        if not self._layers:
            raise ValueError("LoRAFA: the model has no LoRALinear; inject first")
        frozen = {id(layer.lora_a) for layer in self._layers}
        groups = lora_plus_groups(model, lr, ratio=1.0)
        parameters = [p for group in groups for p in group["params"] if id(p) not in frozen]
        super().__init__(parameters, lr=lr, **adamw)
        for layer in self._layers:
            layer.lora_a.requires_grad_(False)
        self.register_step_pre_hook(_precondition)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "LoRAFA: a copy would have lost the layers and be AdamW; save state_dict() and make "
            "LoRAFA(model) anew"
        )

    @torch.no_grad()
    def project(self) -> None:
        """Replace the gradient of every lora_b."""
        for layer in self._layers:
            grad, strength = layer.lora_b.grad, layer.scaling * layer.scale
            if grad is not None and strength:  # at 0 the gradient is 0
                grad.copy_(projected(grad, layer.lora_a, strength))


def _precondition(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    assert isinstance(optimizer, LoRAFA)
    closure = next((given for given in (*args[1:], *kwargs.values()) if given is not None), None)
    if closure is None:
        optimizer.project()
        return None

    def then_project() -> Any:  # the gradients are the closure's
        loss = closure()
        optimizer.project()
        return loss

    return args[:1], {"closure": then_project}


def projected(
    grad: Float[Tensor, "out_features rank"], a: Float[Tensor, "rank in_features"], scaling: float
) -> Float[Tensor, "out_features rank"]:
    """grad (A A^T)^-1 / scaling^2, computed in float32 or better."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    inverse = torch.linalg.pinv(wide @ wide.T, hermitian=True)
    found: Tensor = grad.to(wide.dtype) @ inverse / scaling**2
    return found.to(grad.dtype)
