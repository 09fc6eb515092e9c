"""Checkpoints of P-tuning v2 and ChatGLM: a prefix encoder in, a flat table out.

P-tuning v2 (THUDM, model/prefix_encoder.py) and ChatGLM keep `prefix_encoder.embedding.weight`, a
flat table, or an embedding with `prefix_encoder.trans.0` and `.2`, an MLP with tanh between.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT
from minipeft.integrations.transformers.attach import attach
from minipeft.integrations.transformers.prefixes import Prefix
from minipeft.io.files import check_finite, read_tensors, write_tensors
from minipeft.io.pickled import SUFFIXES, read_pickled
from minipeft.io.prefixes.load import encoder_of_table
from minipeft.io.prefixes.save import prefix_of
from minipeft.prefix import PrefixEncoder


def flat_table(state: Mapping[str, Tensor]) -> Tensor:
    """The flat table (prefix_length, total) of a P-tuning v2 or ChatGLM state, in float32.

    The keys end in `prefix_encoder.embedding.weight` and, re-parametrised,
    `prefix_encoder.trans.{0,2}.{weight,bias}`; other keys are not looked at.  The MLP is folded.

    Raises:
        ValueError: no such keys, keys of two encoders, or shapes that do not belong together.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"flat_table: {key!r:.40} is no named tensor")
        head, middle, own = key.rpartition("prefix_encoder.")
        if middle and (not head or head.endswith(".")):
            if own in found:
                raise ValueError(f"flat_table: two tensors called prefix_encoder.{own}")
            if not value.is_floating_point():
                raise ValueError(f"flat_table: prefix_encoder.{own} is {value.dtype}")
            # copied: some processors give a product other bits where a file's tensor is not aligned
            found[own] = value.to(torch.float32, copy=True)
    table = found.pop("embedding.weight", None)
    if table is None or table.dim() != 2:
        raise ValueError(
            "flat_table: no prefix_encoder.embedding.weight of two dimensions; it has "
            f"{list(state)[:4]}"
        )
    names = [f"trans.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    if found and sorted(found) != sorted(names):
        raise ValueError(f"flat_table: beside the embedding {sorted(found)}; expected {names}")
    if found:
        inner, inner_bias, outer, outer_bias = (found[name] for name in names)
        fits = (
            inner.dim() == outer.dim() == 2 and inner.shape[1] == table.shape[1]
            and outer.shape[1] == len(inner) and inner_bias.shape == inner.shape[:1]
            and outer_bias.shape == outer.shape[:1]
        )  # fmt: skip
        if not fits:
            shapes = {name: tuple(found[name].shape) for name in names}
            raise ValueError(f"flat_table: embedding {tuple(table.shape)} does not fit {shapes}")
        table = torch.tanh(table @ inner.T + inner_bias) @ outer.T + outer_bias
    return table


def _weights_in(path: Path) -> Path:
    """The file of weights in a folder, safetensors before pickled; a file is itself.

    Raises:
        ValueError: neither is there, or the file is of another kind.
    """
    if path.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return path / name
        raise ValueError(f"{path}: no model.safetensors and no pytorch_model.bin; pass the file")
    if path.suffix not in (".safetensors", *SUFFIXES):
        raise ValueError(
            f"{path}: expected a file that ends in .safetensors, {', '.join(SUFFIXES)}"
        )
    return path


def load_prefix_encoder(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    name: str = DEFAULT,
    position: str | None = None,
    example: dict[str, Any] | None = None,
) -> Prefix:
    """Attach the prefix of a P-tuning v2 or ChatGLM checkpoint: a folder, a file, or its tensors.

    A file is safetensors or pickled (.bin, .pt, .pth; see io/pickled.py); a folder holds
    model.safetensors or, where that is not, pytorch_model.bin, as THUDM's scripts write it.
    `position` None: "none" for ChatGLM's keys (transformer.prefix_encoder...), whose text starts at
    position 0, and "shift" otherwise, as P-tuning v2 numbers it.  A table, whatever it was.
    `example` is as in attach_prefix: ChatGLM needs ids with its special tokens.

    Raises:
        ValueError: a file that is missing, damaged or without a prefix, a pickle of anything but
            tensors, a prefix for other shapes.  The model is then as it was.
    """
    if isinstance(source, Mapping):
        state, where = dict(source), "the state"
    else:
        path = _weights_in(Path(source))
        reads = read_pickled if path.suffix in SUFFIXES else read_tensors
        state, where = reads(path), str(path)
    flat = flat_table(state)
    if position is None:
        chatglm = any(key.startswith("transformer.prefix_encoder.") for key in state)
        position = "none" if chatglm else "shift"

    return attach(
        model, len(flat), lambda prefix: encoder_of_table(where, prefix, flat),
        caller="load_prefix_encoder", name=name, position=position, example=example,
    )  # fmt: skip


def save_prefix_encoder(
    model: nn.Module, path: str | os.PathLike[str], *, name: str = DEFAULT,
    key: str = "prefix_encoder.embedding.weight",
) -> None:  # fmt: skip
    """Write a prefix as P-tuning v2 and ChatGLM keep it: one flat table, in a safetensors file.

    Raises:
        ValueError: a prompt or a gated prefix, which that table cannot say; NaN or Inf.
    """
    _, encoder = prefix_of("save_prefix_encoder", model, name)
    if not isinstance(encoder, PrefixEncoder) or encoder.gated:
        raise ValueError("save_prefix_encoder: only a prefix without gates is such a table")
    tensors = {key: encoder.flat().detach()}
    check_finite("save_prefix_encoder", tensors)
    write_tensors(Path(path), tensors)
