"""A family's 4-bit checkpoint in each direction, compared in every bit with a reference.

The reference is the dense model with every 4-bit weight decoded by whoever made the codes:
bitsandbytes' own function for its files, `quantize_nf4` and `dequantize_nf4` for ours.
"""

import copy
import gc
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minipeft as mp
from minipeft.adapters.protocol import is_packed
from tests.checkpoint_families import FAMILIES, build, eager, outputs


def empty(folder: Path) -> nn.Module:
    """The model that config.json describes, without values."""
    return eager(mp.meta_model(folder)).eval()


def dense_like(family: str, values: Mapping[str, Tensor]) -> nn.Module:
    """The dense model with these values."""
    model = build(family, seed=1)
    own = model.state_dict(keep_vars=True)
    held = {id(own[name]) for name in values if name in own}
    if wrong := [n for n, v in own.items() if id(v) not in held] + sorted(values.keys() - own):
        raise ValueError(f"{family}: the values of {wrong[:3]} are missing or unexpected")
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value.view_as(own[name]))
    return model


def decoded_by_bitsandbytes(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with bitsandbytes' 4-bit weights decoded by bitsandbytes."""
    import bitsandbytes

    found: dict[str, Tensor] = {}
    coded: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight: Any = module.weight
            # as one row: on AVX-512 bitsandbytes 0.50 takes wrong scales in rows of part blocks
            state = copy.copy(weight.quant_state)
            shape, state.shape = state.shape, (1, state.shape.numel())
            flat = bitsandbytes.functional.dequantize_4bit(weight.data, state)
            dense = flat.reshape(shape)
            conv1d = module.source_cls.__name__ == "Conv1D"
            coded[f"{name}.weight"] = dense.T if conv1d else dense
    for name, value in model.state_dict().items():
        owner = next((c for c in coded if name == c or name.startswith(f"{c}.")), None)
        if owner is None:
            found[name] = value
    return {**found, **coded}


def theirs(folder: Path, family: str, **settings: Any) -> Any:
    """What transformers with bitsandbytes makes of a folder."""
    import transformers

    kind = getattr(transformers, FAMILIES[family].model)
    return eager(kind.from_pretrained(folder, dtype=torch.float32, **settings)).train()


def compared(family: str, model: nn.Module, values: Mapping[str, Tensor]) -> float:
    """The largest difference of logits from the reference with these values, both decoded."""
    if any(is_packed(module) for module in model.modules()):
        mp.dequantize_model(model)
    own, reference = model.state_dict(), dense_like(family, values)
    for name, value in reference.state_dict().items():
        if not torch.equal(own[name], value):
            raise AssertionError(f"{name} differs by {(own[name] - value).abs().max():.1e}")
    # matmul chooses another order of sums for a weight that trains
    a, b = (outputs(m.requires_grad_(False), family) for m in (model, reference))
    return float((a - b).abs().max())


def from_bitsandbytes(family: str, folder: Path) -> float:
    """transformers + bitsandbytes quantises and saves; load_quantized reads."""
    import transformers

    build(family).save_pretrained(folder / "dense")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    made = theirs(folder / "dense", family, quantization_config=config)
    made.save_pretrained(folder / "theirs")
    ours = empty(folder / "theirs")
    mp.load_quantized(ours, folder / "theirs")
    return compared(family, ours, decoded_by_bitsandbytes(made))


def ours_dense(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with our codes, and the values that they decode to."""
    model = build(family)
    mp.quantize_model(model)
    return model, decoded(model)


def decoded(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with our 4-bit weights decoded."""
    found: dict[str, Tensor] = {}
    packed = {n: m for n, m in model.named_modules(remove_duplicate=False) if is_packed(m)}
    for name, value in model.state_dict().items():
        owner, _, own = name.rpartition(".")
        if owner not in packed or own == "bias":
            found[name] = value
    for name, layer in packed.items():
        layer_: Any = layer
        plain = layer_.dense()
        found[f"{name}.weight" if isinstance(plain, nn.Module) else name] = layer_.weight
    return found


def quantized_and_back(family: str, folder: Path) -> float:
    """quantize_checkpoint writes; load_quantized reads."""
    build(family).save_pretrained(folder / "dense")
    mp.quantize_checkpoint(folder / "dense", folder / "ours")
    ours = empty(folder / "ours")
    mp.load_quantized(ours, folder / "ours")
    return compared(family, ours, ours_dense(family)[1])


def saved_and_back(family: str, folder: Path) -> float:
    """save_quantized writes; load_quantized reads."""
    model, values = ours_dense(family)
    mp.save_quantized(model, folder / "ours")
    ours = empty(folder / "ours")
    mp.load_quantized(ours, folder / "ours")
    return compared(family, ours, values)


def into_bitsandbytes(family: str, folder: Path) -> float:
    """quantize_checkpoint and save_quantized write; transformers + bitsandbytes reads both."""
    build(family).save_pretrained(folder / "dense")
    mp.quantize_checkpoint(folder / "dense", folder / "ours")
    model, values = ours_dense(family)
    mp.save_quantized(model, folder / "saved")
    worst = 0.0
    for name in ("ours", "saved"):
        made = theirs(folder / name, family)
        reference = dense_like(family, decoded_by_bitsandbytes(made))
        worst = max(worst, compared(family, reference, values))
    return worst


TRIPS: dict[str, Callable[[str, Path], float]] = {
    "bitsandbytes' file in": from_bitsandbytes,
    "quantize_checkpoint and back": quantized_and_back,
    "save_quantized and back": saved_and_back,
    "ours into bitsandbytes": into_bitsandbytes,
}
OWN = ("quantize_checkpoint and back", "save_quantized and back")  # minipeft reads what it wrote


def measured(family: str, folder: Path) -> dict[str, float | str]:
    """Every trip's difference, or its error."""
    found: dict[str, float | str] = {}
    for number, (name, trip) in enumerate(TRIPS.items()):
        place = folder / str(number)
        place.mkdir(parents=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = trip(family, place)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        gc.collect()
    return found
