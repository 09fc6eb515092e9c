"""LoRA, QLoRA (NF4 with double quantisation) and P-tuning v2 as PyTorch layers."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

import torch  # first: from a deeper frame its import takes 0.1 s longer (measured)

from minipeft import inject as _inject
from minipeft import layers, optim, starts
from minipeft.adapters.products import SlowProductsWarning
from minipeft.adapters.state import (
    adapter_parameters,
    adapter_state_dict,
    disable_adapters,
    load_adapter_state_dict,
    scale_adapters,
)
from minipeft.double_quant import dequantize_absmax, quantize_absmax
from minipeft.fast import dense as _dense  # noqa: F401  (a row of the table)
from minipeft.fast import derivatives as _derivatives
from minipeft.fast import flops as _flops
from minipeft.fast.backend import backend, use_kernels
from minipeft.inject import freeze, inject
from minipeft.lora import LoRALinear, lora_delta, lora_forward, lora_scaling
from minipeft.model import peft_words as _peft_words
from minipeft.model.base_state import base_state_dict, load_base_state_dict
from minipeft.model.check import check_gradients
from minipeft.model.combine import combine_adapters
from minipeft.model.inject_lora import inject_lora
from minipeft.model.memory import count_parameters, memory_report
from minipeft.model.merge import merge, remove, unmerge
from minipeft.model.quantize import dequantize_model, inject_qlora, quantize_model
from minipeft.model.switch import factors_of, replace_adapter, use_adapters
from minipeft.model.train import tie_heads, train_biases, train_modules, train_tokens
from minipeft.model.vocabulary import extend_vocabulary
from minipeft.nf4 import NF4_CODEBOOK, dequantize_nf4, quantize_nf4
from minipeft.prefix import PrefixEncoder, prefix_attention
from minipeft.qlora import NF4Linear
from minipeft.quantized import codebooks

if _TYPE_CHECKING:
    from minipeft import integrations, io
    from minipeft.integrations.transformers import attach_prefix, attach_prompt, meta_model
    from minipeft.integrations.transformers.predict import predict_memory
    from minipeft.io.bitsandbytes import load_quantized, quantize_checkpoint, save_quantized
    from minipeft.io.peft import load_peft, merge_in_order, save_peft
    from minipeft.io.prefixes import load_prefix, save_prefix
    from minipeft.io.training_state import load_training_state, save_training_state
    from minipeft.measure import benchmark
    from minipeft.model.tensor_parallel import ColwiseParallel, RowwiseParallel, parallelize

_derivatives.register()  # of all operators, which the imports above have defined
_flops.count_products()

# a third of all files, imported when one of these names is first asked for
_LATER = {
    "ColwiseParallel": "model.tensor_parallel",
    "RowwiseParallel": "model.tensor_parallel",
    "integrations": "integrations",
    "io": "io",
    "attach_prefix": "integrations.transformers",
    "attach_prompt": "integrations.transformers",
    "benchmark": "measure",
    "load_peft": "io.peft",
    "load_prefix": "io.prefixes",
    "load_quantized": "io.bitsandbytes",
    "load_training_state": "io.training_state",
    "merge_in_order": "io.peft",
    "meta_model": "integrations.transformers",
    "parallelize": "model.tensor_parallel",
    "predict_memory": "integrations.transformers.predict",
    "quantize_checkpoint": "io.bitsandbytes",
    "save_peft": "io.peft",
    "save_prefix": "io.prefixes",
    "save_quantized": "io.bitsandbytes",
    "save_training_state": "io.training_state",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'minipeft' has no attribute {name!r}")
    module = _importlib.import_module(f"minipeft.{_LATER[name]}")
    globals()[name] = found = module if name == _LATER[name] else getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _adopt(model: torch.nn.Module) -> None:
    """Let `save_pretrained` write the adapter, in models that have that method."""
    if any(hasattr(type(module), "save_pretrained") for module in model.modules()):
        _importlib.import_module("minipeft.io.save_pretrained").adopt(model)


_inject.after_swap.append(_adopt)
_peft_words.teach(LoRALinear, NF4Linear, PrefixEncoder)
_peft_words.teach(*(getattr(layers, kind) for kind in layers.__all__))

__version__ = "0.1.0"

__all__ = [
    "NF4_CODEBOOK",
    "ColwiseParallel",
    "LoRALinear",
    "NF4Linear",
    "PrefixEncoder",
    "RowwiseParallel",
    "SlowProductsWarning",
    "__version__",
    "adapter_parameters",
    "adapter_state_dict",
    "attach_prefix",
    "attach_prompt",
    "backend",
    "base_state_dict",
    "benchmark",
    "check_gradients",
    "codebooks",
    "combine_adapters",
    "count_parameters",
    "dequantize_absmax",
    "dequantize_model",
    "dequantize_nf4",
    "disable_adapters",
    "extend_vocabulary",
    "factors_of",
    "freeze",
    "inject",
    "inject_lora",
    "inject_qlora",
    "integrations",
    "io",
    "layers",
    "load_adapter_state_dict",
    "load_base_state_dict",
    "load_peft",
    "load_prefix",
    "load_quantized",
    "load_training_state",
    "lora_delta",
    "lora_forward",
    "lora_scaling",
    "memory_report",
    "merge",
    "merge_in_order",
    "meta_model",
    "optim",
    "parallelize",
    "predict_memory",
    "prefix_attention",
    "quantize_absmax",
    "quantize_checkpoint",
    "quantize_model",
    "quantize_nf4",
    "remove",
    "replace_adapter",
    "save_peft",
    "save_prefix",
    "save_quantized",
    "save_training_state",
    "scale_adapters",
    "starts",
    "tie_heads",
    "train_biases",
    "train_modules",
    "train_tokens",
    "unmerge",
    "use_adapters",
    "use_kernels",
]
