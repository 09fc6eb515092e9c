"""Adapter layers for every kind of module, and 4-bit layers beside NF4Linear."""

from minipeft.layers.attention import LoRAMultiheadAttention
from minipeft.layers.bank import LoRABank
from minipeft.layers.conv import LoRAConv
from minipeft.layers.dora import DoRAConv, DoRAEmbedding, DoRALinear
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.layers.fused import LoRAFusedLinear
from minipeft.layers.mixture import LoRAExperts
from minipeft.layers.prompt import PromptEmbedding, PromptEncoder
from minipeft.layers.tied import LoRATiedLinear
from minipeft.layers.vocabulary import LongerHead, LongerTable
from minipeft.quantized.conv1d import NF4Conv1D
from minipeft.quantized.embedding import NF4Embedding
from minipeft.quantized.experts import NF4Experts

__all__ = [
    "DoRAConv",
    "DoRAEmbedding",
    "DoRALinear",
    "LoRABank",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRAFusedLinear",
    "LoRAMultiheadAttention",
    "LoRATiedLinear",
    "LongerHead",
    "LongerTable",
    "NF4Conv1D",
    "NF4Embedding",
    "NF4Experts",
    "PromptEmbedding",
    "PromptEncoder",
]
