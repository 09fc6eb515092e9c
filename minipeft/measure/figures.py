"""Figures of a prepared model: bytes, bits, FLOPs of a step, the predicted peak."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from minipeft.adapters.protocol import is_packed
from minipeft.fast.flops import attention_on_a_cpu
from minipeft.measure.loss import Loss, moved
from minipeft.model.memory import memory_report


def is_4_bit(module: nn.Module) -> bool:
    """Whether a layer is 4-bit: minipeft's, or bitsandbytes' Linear4bit."""
    return is_packed(module) or type(module).__name__ == "Linear4bit"


def weight_figures(model: nn.Module) -> dict[str, float | int | None]:
    """Trainable parameters, bytes of all parameters and buffers, bits per 4-bit weight.

    Counted from the tensors, for bitsandbytes' layers too: codes, scales and scales of scales.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    packed_bytes = weights = 0
    for module in model.modules():
        if not is_4_bit(module) or is_packed(module):
            continue
        layer: Any = module
        if (state := getattr(layer.weight, "quant_state", None)) is not None:
            extra = [state.absmax]
            if state.nested:
                extra += [state.state2.absmax, state.offset]
            tensors |= {id(t): t for t in extra}
            packed_bytes += layer.weight.nbytes + sum(t.nbytes for t in extra)
            weights += layer.in_features * layer.out_features
    bits: float | None = 8 * packed_bytes / weights if weights else None
    if bits is None and any(map(is_packed, model.modules())):
        bits = memory_report(model).packed.bits
    return {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weight_bytes": sum(t.nbytes for t in tensors.values()),
        "bits_per_quantized_weight": bits,
    }


def count_flops(loss: Loss, model: Any, batch: Any) -> int:
    """FLOPs of forward and backward by torch's counter: a 4-bit product as a dense one.

    Attention on a CPU counts too, by the formulas of fast/flops.py.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=attention_on_a_cpu()) as counter:
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return int(counter.get_total_flops())


def predicted(
    loss: Loss, model: Any, batch: Any, device: torch.device
) -> tuple[int | None, str | None]:
    """The peak that predict_memory says of such a step, or why it says none.

    A model of transformers is told there whether the batch's `attention_mask` hides tokens.
    """
    from minipeft.integrations.transformers.predict import predict_memory

    on_meta = moved(batch, torch.device("meta"))
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    try:
        found = predict_memory(
            model, "as_it_is",
            device="cuda" if device.type == "cuda" else "cpu",
            forward=lambda model: loss(model, on_meta),
            padded=isinstance(mask, torch.Tensor) and not bool(mask.all()),
        )  # fmt: skip
    except Exception as error:  # whatever a model or a loss that reads values raises
        return None, f"{type(error).__name__}: {error}"
    return found.peak, None
