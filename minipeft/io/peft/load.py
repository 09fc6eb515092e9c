"""A PEFT LoRA directory onto a model: everything is checked before the first layer is wrapped."""

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.inject import inject
from minipeft.io.peft.config import CONFIG_NAME, PREFIX, WEIGHTS_NAME, MatchedConfig, read_config
from minipeft.io.tensors import read_tensors
from minipeft.lora import LoRALinear
from minipeft.protocol import LinearShape, is_adapter, linear_shape
from minipeft.targets import Names, head_reasons, visible_modules

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KEY = re.compile(r"(?P<name>.+)\.lora_(?P<factor>[AB])\.weight")


def _by_module(tensors: dict[str, Tensor], where: Path) -> dict[str, dict[str, Tensor]]:
    """{module name: {"A": (rank, in), "B": (out, rank)}}."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(
                f"{where}: unexpected key {key!r}; a plain LoRA has '<module>.lora_A.weight' and "
                "'<module>.lora_B.weight' only"
            )
        if tensor.dtype not in _DTYPES or tensor.ndim != 2:
            raise ValueError(f"{where}: {key} is {tensor.dtype} {tuple(tensor.shape)}")
        modules.setdefault(found["name"], {})[found["factor"]] = tensor
    for name, factors in modules.items():
        if len(factors) < 2:
            raise ValueError(f"{where}: {name} has lora_{'/'.join(factors)} without its partner")
    if not modules:
        raise ValueError(f"{where}: holds no adapter")
    return modules


def _without_prefix(
    modules: dict[str, dict[str, Tensor]], names: dict[str, nn.Module], where: Path
) -> dict[str, dict[str, Tensor]]:
    """Names as the model has them: with PEFT's prefix taken off, or as they are; all alike."""
    stripped = {name.removeprefix(PREFIX): factors for name, factors in modules.items()}
    if all(name.startswith(PREFIX) for name in modules) and stripped.keys() <= names.keys():
        return stripped
    if modules.keys() <= names.keys():
        return modules
    unknown = sorted(stripped.keys() - names.keys())
    raise ValueError(
        f"{where}: the model has no {unknown[0]!r} ({len(unknown)} of {len(modules)} modules are "
        f"unknown; it has for example {next(iter(reversed(names)), None)!r}); is this adapter "
        "another model's, or one of the model with or without its head?"
    )


def _check_layer(
    name: str, module: nn.Module, factors: dict[str, Tensor], config: MatchedConfig, where: Path
) -> None:
    shape: LinearShape | None = linear_shape(module)
    if is_adapter(module):
        raise ValueError(f"load_peft: {name!r} already has an adapter; load onto the plain model")
    if shape is None:
        raise ValueError(f"load_peft: {name!r} is a {type(module).__name__}, no linear layer")
    rank = config.rank_of(name)
    expected = {"A": (rank, shape.in_features), "B": (shape.out_features, rank)}
    for factor, tensor in factors.items():
        if tuple(tensor.shape) != expected[factor]:
            raise ValueError(
                f"{where}: {name}.lora_{factor} has shape {tuple(tensor.shape)}; the model and "
                f"{CONFIG_NAME} ask for {expected[factor]}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: {name}.lora_{factor} holds NaN or Inf")


def load_peft(model: nn.Module, path: str | os.PathLike[str]) -> Names:
    """Inject and load the plain LoRA that PEFT or minipeft saved in directory `path`; trainable.

    Every key must belong to a module of the model, with or without PEFT's "base_model.model."
    before it, and every module that the configuration targets must have its keys.  Factors become
    float32, as in PEFT.  Freezes every parameter that no adapter owns.  Returns the names.

    Raises:
        ValueError: a file missing or damaged, another kind of adapter, a key missing, extra or of
            another shape, an adapter of another model.  The model is then as it was.
    """
    directory = Path(path)
    names = visible_modules(model)
    plain = read_config(directory / CONFIG_NAME)
    config = plain.of_model(names, CONFIG_NAME)
    where = directory / WEIGHTS_NAME
    if not where.is_file() and (directory / "adapter_model.bin").is_file():
        raise ValueError(
            f"{directory}: adapter_model.bin is a pickle and can run code, so it is not read; "
            "load it with PEFT where you trust it and save it with safe_serialization=True"
        )
    modules = _without_prefix(_by_module(read_tensors(where), where), names, where)
    for name, factors in modules.items():
        _check_layer(name, names[name], factors, config, where)
    heads = head_reasons(model) if plain.all_linear else {}
    covered = {id(names[name]) for name in modules}
    missing = [
        name
        for name, module in names.items()
        if config.targets(name, module) and id(module) not in covered and name not in heads
    ]
    if missing:
        raise ValueError(
            f"{where}: no keys for {missing[0]!r} ({len(missing)} modules that {CONFIG_NAME} "
            "targets have none); is the file complete?"
        )
    of_module = {id(names[name]): name for name in modules}

    def wrap(module: nn.Module) -> nn.Module:
        name = of_module[id(module)]

        def fill(layer: LoRALinear) -> None:
            if layer.lora_a.is_meta:
                raise ValueError("is on the meta device; load the base model's weights first")
            with torch.no_grad():
                layer.lora_a.copy_(modules[name]["A"])
                layer.lora_b.copy_(modules[name]["B"])

        return LoRALinear(
            module,
            config.rank_of(name),
            config.alpha_of(name),
            dropout=plain.dropout,
            rank_stabilized=plain.rank_stabilized,
            init=fill,
        )

    return inject(model, lambda _name, module: id(module) in of_module, wrap)
