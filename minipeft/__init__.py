"""LoRA, QLoRA (NF4 with double quantisation) and P-tuning v2 as PyTorch layers."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

import torch  # first: from a deeper frame its import takes 0.1 s longer (measured)

from minipeft import inject as _inject
from minipeft.adapters.products import SlowProductsWarning
from minipeft.adapters.state import (
    adapter_parameters,
    adapter_state_dict,
    disable_adapters,
    load_adapter_state_dict,
    scale_adapters,
)
from minipeft.double_quant import dequantize_absmax, quantize_absmax
from minipeft.fast import derivatives as _derivatives
from minipeft.fast import flops as _flops
from minipeft.inject import freeze, inject
from minipeft.layers.attention import LoRAMultiheadAttention
from minipeft.layers.conv import LoRAConv
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.layers.fused import LoRAFusedLinear
from minipeft.layers.mixture import LoRAExperts
from minipeft.layers.prompt import PromptEmbedding, PromptEncoder
from minipeft.layers.tied import LoRATiedLinear
from minipeft.lora import LoRALinear, lora_delta, lora_forward, lora_scaling
from minipeft.model.base_state import base_state_dict, load_base_state_dict
from minipeft.model.check import check_gradients
from minipeft.model.combine import combine_adapters
from minipeft.model.eva import init_eva
from minipeft.model.inject_lora import inject_lora
from minipeft.model.memory import count_parameters, packed_bits, quantization_report
from minipeft.model.merge import merge, remove, unmerge
from minipeft.model.quantize import dequantize_model, inject_qlora, quantize_model
from minipeft.model.rows import LoRABank
from minipeft.model.switch import add_adapter, swap_adapter, use_adapters
from minipeft.model.train import tie_lora, train_biases, train_modules, train_tokens
from minipeft.nf4 import NF4_CODEBOOK, dequantize_nf4, normal_float_codebook, quantize_nf4
from minipeft.ops import backend, use_kernels
from minipeft.optim.lora_fa import LoRAFA, freeze_a
from minipeft.optim.lora_plus import lora_plus_groups
from minipeft.prefix import PrefixEncoder, prefix_attention
from minipeft.qlora import NF4Linear
from minipeft.quantized.codebooks import (
    FP4_CODEBOOK,
    FP4_E3M0_CODEBOOK,
    dequantize_blockwise,
    int_codebook,
    quantize_blockwise,
)
from minipeft.quantized.conv1d import NF4Conv1D
from minipeft.quantized.embedding import NF4Embedding
from minipeft.quantized.experts import NF4Experts
from minipeft.variants.dora import DoRAConv, DoRAEmbedding, DoRALinear
from minipeft.variants.loftq import loftq
from minipeft.variants.starts import (
    init_gaussian,
    init_olora,
    init_orthogonal,
    init_pissa,
    init_pissa_fast,
)

if _TYPE_CHECKING:
    from minipeft import integrations, io
    from minipeft.integrations.transformers import attach_prefix, attach_prompt
    from minipeft.io.peft import load_peft, save_peft

_derivatives.register()  # of all operators, which the imports above have defined
_flops.count_products()

# a third of all files, imported when one of these names is first asked for
_LATER = {
    "integrations": "integrations",
    "io": "io",
    "attach_prefix": "integrations.transformers",
    "attach_prompt": "integrations.transformers",
    "load_peft": "io.peft",
    "save_peft": "io.peft",
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

__version__ = "0.1.0"

__all__ = [
    "FP4_CODEBOOK",
    "FP4_E3M0_CODEBOOK",
    "NF4_CODEBOOK",
    "DoRAConv",
    "DoRAEmbedding",
    "DoRALinear",
    "LoRABank",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRAFA",
    "LoRAFusedLinear",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "LoRATiedLinear",
    "NF4Conv1D",
    "NF4Embedding",
    "NF4Experts",
    "NF4Linear",
    "PrefixEncoder",
    "PromptEmbedding",
    "PromptEncoder",
    "SlowProductsWarning",
    "__version__",
    "adapter_parameters",
    "adapter_state_dict",
    "add_adapter",
    "attach_prefix",
    "attach_prompt",
    "backend",
    "base_state_dict",
    "check_gradients",
    "combine_adapters",
    "count_parameters",
    "dequantize_absmax",
    "dequantize_blockwise",
    "dequantize_model",
    "dequantize_nf4",
    "disable_adapters",
    "freeze",
    "freeze_a",
    "init_eva",
    "init_gaussian",
    "init_olora",
    "init_orthogonal",
    "init_pissa",
    "init_pissa_fast",
    "inject",
    "inject_lora",
    "inject_qlora",
    "int_codebook",
    "integrations",
    "io",
    "load_adapter_state_dict",
    "load_base_state_dict",
    "load_peft",
    "loftq",
    "lora_delta",
    "lora_forward",
    "lora_plus_groups",
    "lora_scaling",
    "merge",
    "normal_float_codebook",
    "packed_bits",
    "prefix_attention",
    "quantization_report",
    "quantize_absmax",
    "quantize_blockwise",
    "quantize_model",
    "quantize_nf4",
    "remove",
    "save_peft",
    "scale_adapters",
    "swap_adapter",
    "tie_lora",
    "train_biases",
    "train_modules",
    "train_tokens",
    "unmerge",
    "use_adapters",
    "use_kernels",
]
