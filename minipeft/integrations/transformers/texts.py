"""The few tokens with which a model is tried."""

import itertools
from typing import Any

import torch
from torch import Tensor

from minipeft.integrations.transformers import positions, probe

PREFIX, TEXT, PAD = 3, 5, 6  # tokens


def invent(model: Any, length: int) -> dict[str, Tensor]:
    """A text of `length` tokens (for an encoder-decoder, two), without special ones."""
    table = model.get_input_embeddings()
    special = {
        value for config in probe.configs_of(model) for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }  # fmt: skip
    plain = (i for i in itertools.count() if i not in special)
    first = list(itertools.islice(plain, 64))
    usable = [i for i in first if i < table.num_embeddings] or [0]
    ids = torch.tensor([[usable[(5 * i + 3) % len(usable)] for i in range(length)]])
    ids = ids.to(positions.device_of(table))
    if probe.is_encoder_decoder(model):
        end = getattr(model.config, "eos_token_id", None)
        text = ids.clone()
        if isinstance(end, int) and 0 <= end < table.num_embeddings:
            text[:, -1] = end  # heads of classes look for it
        return {"input_ids": text, "decoder_input_ids": ids}
    return {"input_ids": ids}


def cut(inputs: dict[str, Tensor], first: int) -> dict[str, Any]:
    """The inputs without their first tokens."""
    return {name: ids[:, first:] for name, ids in inputs.items()}


def padded(model: Any, inputs: dict[str, Tensor], *, left: bool) -> dict[str, Tensor] | None:
    """The inputs with padding on one side of the text; None where there is no text to pad."""
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2:
        return None
    pad = getattr(model.config, "pad_token_id", None)
    table = model.get_input_embeddings()
    pad = pad if isinstance(pad, int) and 0 <= pad < table.num_embeddings else 0
    given = {"attention_mask": torch.ones_like(ids), **inputs}
    longer = {}
    for name, value in given.items():
        if value.shape == ids.shape and not name.startswith("decoder_"):
            filled = pad if name == "input_ids" else 0
            more = torch.full((len(ids), PAD), filled, dtype=value.dtype, device=value.device)
            value = torch.cat([more, value] if left else [value, more], dim=1)
        longer[name] = value
    return longer
