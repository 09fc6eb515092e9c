"""Prefixes of SwissArmyTransformer (VisualGLM): a list with one tensor for each layer.

mixins.ptuning.prefix.<layer>, (2, heads, prefix_length, head_dim): keys, then values.  SAT puts
them after the text's keys, which attention does not tell from before them; the text's positions
start at 0.  Source: THUDM/SwissArmyTransformer, sat/model/finetune/prompt_tuning.py.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT
from minipeft.integrations.transformers.attach import attach
from minipeft.integrations.transformers.prefixes import Prefix
from minipeft.io.files import read_tensors
from minipeft.io.pickled import SUFFIXES, view_model
from minipeft.model.peft_words import in_our_words
from minipeft.prefix import PrefixEncoder

_KEY = re.compile(r"(?:.+\.)?prefix\.(?P<layer>\d{1,4})")


def prefix_list(state: Mapping[str, Tensor], where: str = "prefix_list") -> list[Tensor]:
    """The tensors (2, heads, prefix_length, head_dim) of a SAT state, in float32, by layer.

    Raises:
        ValueError: no such keys, a layer missing or twice, other shapes, values that are no floats.
    """
    found: dict[int, Tensor] = {}
    for key, value in state.items():
        if parsed := _KEY.fullmatch(key):
            if int(parsed["layer"]) in found:
                raise ValueError(f"{where}: two prefixes of layer {parsed['layer']}")
            found[int(parsed["layer"])] = value
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(
            f"{where}: prefixes of layers {sorted(found)}, expected mixins.ptuning.prefix.0, .1, "
            f"..., without a gap; it has {[key[:60] for key in state][:4]}"
        )
    values = [found[layer] for layer in range(len(found))]
    length = values[0].shape[2] if values[0].dim() == 4 else 0
    for layer, value in enumerate(values):
        fits = value.dim() == 4 and value.shape[0] == 2 and value.shape[2] == length
        if not fits or not value.is_floating_point() or not value.numel():
            raise ValueError(
                f"{where}: layer {layer} is {value.dtype} {tuple(value.shape)}; expected floats "
                "(2, heads, prefix_length, head_dim), of one length"
            )
    return [value.float() for value in values]


@in_our_words
def load_sat_prefix(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    name: str = DEFAULT,
    example: dict[str, Any] | None = None,
) -> Prefix | PrefixEncoder:
    """Attach the prefix of a SAT checkpoint: a file (.pt, .safetensors), or its tensors.

    `model` may be a PrefixEncoder without an MLP, for attention of your own: it is filled.
    `example` is as in attach_prefix.

    Raises:
        ValueError: a file that is missing, damaged, of more than data or without a prefix; other
            layers, heads or sizes than the model's; values that are not finite.  The model is then
            as it was.
    """
    if isinstance(source, Mapping):
        state, where = dict(source), "the tensors"
    else:
        path, where = Path(source), str(source)
        state = view_model(path) if path.suffix in SUFFIXES else read_tensors(path)
    layers = prefix_list(state, where)
    pairs = [(keys, values) for keys, values in (layer.unbind(0) for layer in layers)]
    if isinstance(model, PrefixEncoder):
        _fill(model, pairs, where)
        return model

    def make(prefix: Prefix) -> nn.Module:
        encoder = PrefixEncoder(prefix.kv_shapes, pairs[0][0].shape[1])
        _fill(encoder, pairs, where)
        return encoder

    return attach(
        model, pairs[0][0].shape[1], make, caller="load_sat_prefix", name=name, position="none",
        example=example,
    )  # fmt: skip


def _fill(encoder: PrefixEncoder, pairs: list[tuple[Tensor, Tensor]], where: str) -> None:
    shapes = [(len(k), k.shape[2], v.shape[2]) for k, v in pairs]
    own = [tuple(shape) for shape in encoder.kv_shapes]
    if shapes != own or pairs[0][0].shape[1] != encoder.prefix_length:
        raise ValueError(
            f"{where}: {len(shapes)} layers of (heads, key_dim, value_dim) {shapes[0]} and "
            f"{pairs[0][0].shape[1]} positions; this model has {len(own)} of {own[0]}, and "
            f"{encoder.prefix_length} positions"
        )
    if not all(bool(torch.isfinite(t).all()) for pair in pairs for t in pair):
        raise ValueError(f"{where}: holds NaN or Inf")
    encoder.load_kv(pairs)
