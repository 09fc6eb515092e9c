"""The methods that are compared: a name, what it is, and how it prepares a model.

To add one, add a function and a row of METHODS.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import minipeft as mp
from benchmarks.models import require


@dataclass(frozen=True)
class Prepared:
    """A model ready to train, and a context within which its adapters are off."""

    model: Any
    adapters_off: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Method:
    """`peer` is the method of another library that does the same work.

    `starts_at_base`: untrained, it computes what the base does (a prefix does not).
    """

    title: str
    prepare: Callable[[Any, dict[str, Any]], Prepared]
    learning_rate: float
    starts_at_base: bool = True
    peer: str | None = None
    is_peer: bool = False


def _full(model: Any, config: dict[str, Any]) -> Prepared:
    return Prepared(model.requires_grad_(True), nullcontext)


def _lora(model: Any, config: dict[str, Any]) -> Prepared:
    mp.inject_lora(model, "all-linear", config["rank"], config["alpha"])
    return Prepared(model, lambda: mp.disable_adapters(model))


def _qlora(model: Any, config: dict[str, Any]) -> Prepared:
    mp.inject_qlora(model, "all-linear", config["rank"], config["alpha"])
    return Prepared(model, lambda: mp.disable_adapters(model))


def _peft(model: Any, config: dict[str, Any]) -> Prepared:
    require("peft", "peers")
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config["rank"], lora_alpha=config["alpha"], target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(model, settings)
    return Prepared(wrapped, wrapped.disable_adapter)


def _peft_bitsandbytes(model: Any, config: dict[str, Any]) -> Prepared:
    require("bitsandbytes", "peers")
    import bitsandbytes

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        layer = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None,
            compute_dtype=module.weight.dtype, compress_statistics=True, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        layer.weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        layer.bias = module.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.to(module.weight.device))
    model.is_loaded_in_4bit = True  # what PEFT looks at to pick its 4-bit layer
    return _peft(model, config)


def _ptuning(model: Any, config: dict[str, Any]) -> Prepared:
    mp.attach_prefix(model, config["prefix_length"])
    return Prepared(model, lambda: mp.disable_adapters(model))


def _peft_prefix(model: Any, config: dict[str, Any]) -> Prepared:
    require("peft", "peers")
    from peft import PrefixTuningConfig, get_peft_model

    if config["checkpointing"]:
        raise NotImplementedError("PEFT's prefix tuning refuses activation checkpointing")
    length = config["prefix_length"]
    settings = PrefixTuningConfig(num_virtual_tokens=length, task_type="CAUSAL_LM")
    decoder = model.model
    wrapped = get_peft_model(model, settings)
    with torch.no_grad():  # from N(0, 1), with which it learns nothing in so few steps, to ours
        wrapped.prompt_encoder["default"].embedding.weight.mul_(0.02)
    switched_on = [True]

    def add_prompt(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What PEFT's forward does before it calls the whole model; here for the decoder."""
        if not switched_on[0]:
            return None
        mask = kwargs["attention_mask"]
        mask = torch.cat([mask.new_ones(len(mask), length), mask], dim=1)
        prompt = wrapped.get_prompt(len(mask))
        return args, {**kwargs, "attention_mask": mask, "past_key_values": prompt}

    @contextmanager
    def off() -> Iterator[None]:
        switched_on[0] = False
        yield
        switched_on[0] = True

    decoder.register_forward_pre_hook(add_prompt, with_kwargs=True)
    return Prepared(wrapped, off)


METHODS = {
    "full": Method("full fine-tuning", _full, 5e-5),
    "lora": Method("LoRA", _lora, 5e-4, peer="peft-lora"),
    "peft-lora": Method("PEFT LoRA", _peft, 5e-4, is_peer=True),
    "qlora": Method("QLoRA", _qlora, 5e-4, peer="peft-qlora"),
    "peft-qlora": Method(
        "PEFT + bitsandbytes QLoRA", _peft_bitsandbytes, 5e-4, is_peer=True
    ),
    "ptuning": Method(
        "P-tuning v2", _ptuning, 1e-2, starts_at_base=False, peer="peft-prefix"
    ),
    "peft-prefix": Method(
        "PEFT prefix tuning", _peft_prefix, 1e-2, starts_at_base=False, is_peer=True
    ),
}  # fmt: skip


def weight_figures(model: Any) -> dict[str, float | int | None]:
    """Trainable parameters, bytes of all parameters and buffers, bits per 4-bit weight.

    Counted from the tensors, for bitsandbytes' layers too: codes, scales and scales of scales.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    packed_bytes = weights = 0
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None) if (
            type(module).__name__ == "Linear4bit"
        ) else None  # fmt: skip
        if state is not None:
            extra = [state.absmax]
            if state.nested:
                extra += [state.state2.absmax, state.offset]
            tensors |= {id(t): t for t in extra}
            packed_bytes += module.weight.nbytes + sum(t.nbytes for t in extra)
            weights += module.in_features * module.out_features
    if weights:
        bits = 8 * packed_bytes / weights
    else:
        packed = any(isinstance(module, mp.NF4Linear) for module in model.modules())
        bits = mp.memory_report(model).packed.bits if packed else None
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "trainable_parameters": trainable,
        "weight_bytes": sum(t.nbytes for t in tensors.values()),
        "bits_per_quantized_weight": bits,
    }


def optimizer_for(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay over what is trainable: the same for every method."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
