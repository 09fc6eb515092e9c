"""LoRA, QLoRA (NF4 with double quantisation) and P-tuning v2 as PyTorch layers."""

import torch  # noqa: F401  first: from a deeper frame its import takes 0.1 s longer (measured)

from minipeft import integrations, io
from minipeft.adapters import (
    adapter_parameters,
    adapter_state_dict,
    base_state_dict,
    disable_adapters,
    freeze,
    load_adapter_state_dict,
    scale_adapters,
)
from minipeft.codebooks import (
    FP4_CODEBOOK,
    FP4_E3M0_CODEBOOK,
    dequantize_blockwise,
    int_codebook,
    quantize_blockwise,
)
from minipeft.double_quant import dequantize_absmax, quantize_absmax
from minipeft.inject import inject, inject_lora
from minipeft.integrations.transformers import attach_prefix
from minipeft.io.peft import load_peft, save_peft
from minipeft.layers.conv1d import NF4Conv1D
from minipeft.layers.embedding import NF4Embedding
from minipeft.layers.experts import NF4Experts
from minipeft.lora import LoRALinear, lora_delta, lora_forward, lora_scaling
from minipeft.memory import count_parameters, packed_bits, quantization_report
from minipeft.merge import merge, remove, unmerge
from minipeft.nf4 import NF4_CODEBOOK, dequantize_nf4, normal_float_codebook, quantize_nf4
from minipeft.ops import backend, use_kernels
from minipeft.prefix import PrefixEncoder, prefix_attention
from minipeft.qlora import NF4Linear
from minipeft.quantize import dequantize_model, inject_qlora, quantize_model

__version__ = "0.1.0"

__all__ = [
    "FP4_CODEBOOK",
    "FP4_E3M0_CODEBOOK",
    "NF4_CODEBOOK",
    "LoRALinear",
    "NF4Conv1D",
    "NF4Embedding",
    "NF4Experts",
    "NF4Linear",
    "PrefixEncoder",
    "__version__",
    "adapter_parameters",
    "adapter_state_dict",
    "attach_prefix",
    "backend",
    "base_state_dict",
    "count_parameters",
    "dequantize_absmax",
    "dequantize_blockwise",
    "dequantize_model",
    "dequantize_nf4",
    "disable_adapters",
    "freeze",
    "inject",
    "inject_lora",
    "inject_qlora",
    "int_codebook",
    "integrations",
    "io",
    "load_adapter_state_dict",
    "load_peft",
    "lora_delta",
    "lora_forward",
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
    "unmerge",
    "use_kernels",
]
