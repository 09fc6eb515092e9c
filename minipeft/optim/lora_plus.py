"""LoRA+: the B factors learn faster than the A factors  (Hayou et al. 2024)."""

from typing import Any

from torch import nn

from minipeft.adapters.protocol import is_adapter


def lora_plus_groups(
    model: nn.Module, lr: float, *, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any optimiser: lr for A factors, ratio * lr for B factors.

    Factors get `weight_decay`; what else adapters train (magnitudes, biases, tokens, whole modules)
    learns with lr and without decay.  Each trainable parameter of the model's adapters comes once.

    Raises:
        ValueError: lr or ratio not above 0, or no trainable adapter parameter.
        TypeError: model is no module.

    >>> from minipeft import inject_lora
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> names = inject_lora(model, ["0"], rank=2)
    >>> [(group["name"], group["lr"]) for group in lora_plus_groups(model, 0.5, ratio=4)]
    [('a', 0.5), ('b', 2.0)]
    """
    check_is_model("lora_plus_groups", model)
    if not lr > 0 or not ratio > 0:
        raise ValueError(f"lora_plus_groups: lr={lr}, ratio={ratio}; expected numbers above 0")
    found: dict[str, list[nn.Parameter]] = {"a": [], "b": [], "other": []}
    seen: set[int] = set()
    for module in model.modules():
        if not is_adapter(module):
            continue
        for name, parameter in module.adapter_parameters().items():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found[_factor(name)].append(parameter)
    if not seen:
        raise ValueError("lora_plus_groups: the model has no trainable adapter parameter")
    rates = {"a": lr, "b": lr * ratio, "other": lr}
    return [
        {"name": name, "params": parameters, "lr": rates[name],
         "weight_decay": 0.0 if name == "other" else weight_decay}
        for name, parameters in found.items() if parameters
    ]  # fmt: skip


def check_is_model(caller: str, model: object) -> None:
    """Raise TypeError unless this is the model itself: its parameters have no layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{caller}: expected the model, got {type(model).__name__}; it finds the adapters' "
            "parameters itself"
        )


def _factor(name: str) -> str:
    """Which factor a parameter of an adapter is, by its own name in the layer."""
    if name.endswith("lora_a"):
        return "a"
    return "b" if name.endswith("lora_b") or name.startswith("lora_b_") else "other"
