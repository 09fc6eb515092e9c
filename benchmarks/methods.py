"""minipeft's methods, and the same work by other libraries.

To add one, add a function and a row of METHODS.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from minipeft.measure.methods import METHODS as OURS
from minipeft.measure.methods import Method, Prepared, Unsupported


def _peft(model: Any, config: dict[str, Any]) -> Prepared:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config["rank"], lora_alpha=config["alpha"], target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(model, settings)
    return Prepared(wrapped, wrapped.disable_adapter)


def _peft_bitsandbytes(model: Any, config: dict[str, Any]) -> Prepared:
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


def _peft_prefix(model: Any, config: dict[str, Any]) -> Prepared:
    from peft import PrefixTuningConfig, get_peft_model

    if model.is_gradient_checkpointing:
        raise Unsupported("PEFT's prefix tuning refuses activation checkpointing")
    length = config["prefix_length"]
    settings = PrefixTuningConfig(num_virtual_tokens=length, task_type="CAUSAL_LM")
    decoder = model.base_model
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


_LLAMA = ["transformers.models.llama.modeling_llama"]  # for all alike, before memory is measured
_PEFT = ["peft", *_LLAMA]
METHODS = {
    "full": replace(OURS["full"], imports=_LLAMA),
    "lora": replace(OURS["lora"], peer="peft-lora", imports=_LLAMA),
    "peft-lora": Method("PEFT LoRA", _peft, 5e-4, is_peer=True, imports=_PEFT),
    "qlora": replace(OURS["qlora"], peer="peft-qlora", imports=_LLAMA),
    "peft-qlora": Method(
        "PEFT + bitsandbytes QLoRA", _peft_bitsandbytes, 5e-4, is_peer=True,
        imports=["bitsandbytes", *_PEFT],
    ),
    "ptuning": replace(
        OURS["ptuning"], peer="peft-prefix", imports=[*OURS["ptuning"].imports, *_LLAMA]
    ),
    "peft-prefix": Method(
        "PEFT prefix tuning", _peft_prefix, 1e-2, starts_at_base=False, is_peer=True, imports=_PEFT
    ),
}  # fmt: skip
