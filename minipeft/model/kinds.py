"""Which adapter layer goes over which kind of module.

    nn.Linear, Conv1D, NF4Linear, linear-like    LoRALinear             DoRALinear
    nn.Embedding, NF4Embedding                   LoRAEmbedding          DoRAEmbedding
    nn.Conv1d, Conv2d, Conv3d                    LoRAConv               DoRAConv
    nn.MultiheadAttention                        LoRAMultiheadAttention
    3-D weights of experts, NF4Experts           LoRAExperts

LoRAFusedLinear, whose slices only you know, is put in with `minipeft.inject`.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from minipeft.adapters.protocol import innermost, linear_shape
from minipeft.layers.attention import LoRAMultiheadAttention
from minipeft.layers.conv import LoRAConv
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.layers.mixture import LoRAExperts
from minipeft.lora import LoRALinear
from minipeft.quantized.embedding import NF4Embedding
from minipeft.quantized.experts import NF4Experts
from minipeft.variants.dora import DoRALinear
from minipeft.variants.dora_layers import DoRAConv, DoRAEmbedding

LayerClass = Callable[..., Any]


def layer_class(module: nn.Module | nn.Parameter, *, dora: bool = False) -> LayerClass | None:
    """The class of adapter layer for this module or 3-D parameter; None where there is none."""
    if isinstance(module, nn.Parameter):
        return LoRAExperts if module.dim() == 3 and not dora else None
    plain = innermost(module)
    if isinstance(plain, nn.MultiheadAttention):
        return None if dora else LoRAMultiheadAttention
    if isinstance(plain, NF4Experts) or hasattr(plain, "original"):
        return None if dora else LoRAExperts
    if isinstance(plain, nn.Embedding | NF4Embedding):
        return DoRAEmbedding if dora else LoRAEmbedding
    if isinstance(plain, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return DoRAConv if dora else LoRAConv
    if linear_shape(plain) is not None:
        return DoRALinear if dora else LoRALinear
    return None
