"""Parts of a 4-bit linear layer, in equal bits: some of its rows, or some of its columns.

Tensor parallelism gives each device a part of a layer.  A weight (out_features, in_features) may be
cut where no block of codes is cut:

    rows (out_features)     at every row, where rows hold whole blocks
    columns (in_features)   at multiples of the block size, where rows hold whole blocks
    a flat layer            its blocks run over the ends of rows: rows, where a block ends too

Codes are copied, never decoded.  8-bit codes of scales stay where no group of 256 of them is cut;
anywhere else the scales are decoded to float32, which changes no bit of the weight and takes 0.5
instead of 0.127 bits a weight (blocks of 64).
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from minipeft.adapters.protocol import whole
from minipeft.double_quant import ABSMAX_BLOCK_SIZE
from minipeft.qlora import NF4Linear, as_bytes
from minipeft.quantized.conv1d import NF4Conv1D

ROWS, COLUMNS = 0, 1  # axes of a weight (out_features, in_features)
_SIDES = ("rows", "columns")


def rows_of(layer: NF4Linear, start: int, end: int) -> NF4Linear:
    """A layer that computes outputs `start` to `end` of this one, with their part of the bias.

    Its `dequantize()` is `layer.dequantize()[start:end]` in every bit.  It keeps double
    quantisation where no group of 256 scales is cut; anywhere else it has float32 scales
    (`double_quant=False`): exact, and 0.373 bits a weight more in blocks of 64.

    Raises:
        TypeError: the layer is neither an NF4Linear nor an NF4Conv1D.
        ValueError: not 0 <= start < end <= out_features, a cut inside a block (the message has the
            nearest rows that it may be cut at), or a layer that is sharded.

    >>> from torch import nn
    >>> layer = NF4Linear.from_linear(nn.Linear(64, 6))
    >>> torch.equal(rows_of(layer, 2, 5).weight, layer.weight[2:5])
    True
    """
    return _part("rows_of", layer, ROWS, start, end, bias=True)


def columns_of(layer: NF4Linear, start: int, end: int, *, bias: bool) -> NF4Linear:
    """A layer that multiplies inputs `start` to `end` of this one: a term of the layer's output.

    The outputs of all parts are summed, so `bias` is True for one of them only.  Its
    `dequantize()` is `layer.dequantize()[:, start:end]` in every bit.  Its scales are float32
    (`double_quant=False`), since a group of 256 scales runs over the ends of parts of rows: exact,
    and 0.373 bits a weight more in blocks of 64.

    Raises:
        TypeError: the layer is neither an NF4Linear nor an NF4Conv1D.
        ValueError: not 0 <= start < end <= in_features, a cut inside a block (the message has the
            nearest columns that it may be cut at), or a layer that is sharded.

    >>> from torch import nn
    >>> layer = NF4Linear.from_linear(nn.Linear(192, 6))
    >>> torch.equal(columns_of(layer, 64, 192, bias=False).weight, layer.weight[:, 64:])
    True
    """
    return _part("columns_of", layer, COLUMNS, start, end, bias=bias)


def stored_for_cuts(
    caller: str, layer: NF4Linear, axis: int, places: Sequence[int]
) -> dict[str, Tensor]:
    """Codes and scales, whole, by the names of parameters, so that they can be cut at `places`.

    Each is as the layer has it, but for scales whose 8-bit codes cannot be cut there: these come
    decoded, as `absmax_bytes`.

    Raises:
        TypeError: the layer is neither an NF4Linear nor an NF4Conv1D.
        ValueError: a place inside a block, or a layer that is sharded.
    """
    _check_kind(caller, layer)
    stored = {name: p.detach() for name, p in layer.packed_parameters().items()}
    if hasattr(stored["packed"], "full_tensor"):
        raise ValueError(f"{caller}: {_words(layer)} is sharded or cut already; cut it while whole")
    unit, total = _unit(caller, layer, axis), layer.shape[axis]
    for place in places:
        if place % unit and place != total:
            below, above = place // unit * unit, min(place // unit * unit + unit, total)
            raise ValueError(
                f"{caller}: a cut of {_words(layer)} at {place} of its {total} {_SIDES[axis]} is "
                f"inside a block; the nearest that it may be cut at are {below} and {above}"
            )
    group = layer.block_size * ABSMAX_BLOCK_SIZE  # weights
    inside = [place for place in places if place != total and place * layer.in_features % group]
    if layer.double_quant and (inside or axis == COLUMNS):
        for name in ("absmax_code", "absmax_scale", "absmax_offset"):
            del stored[name]
        stored["absmax_bytes"] = as_bytes(layer.absmax)
    return stored


def _check_kind(caller: str, layer: object) -> None:
    if type(layer) not in (NF4Linear, NF4Conv1D):
        raise TypeError(
            f"{caller}: {type(layer).__name__}; expected an NF4Linear or an NF4Conv1D (what "
            "another class adds to them is not known here)"
        )


def _unit(caller: str, layer: NF4Linear, axis: int) -> int:
    """Cuts are at multiples of this number of rows or columns."""
    width, size = layer.in_features, layer.block_size
    if axis == ROWS:
        return size // math.gcd(width, size)
    if width % size:
        raise ValueError(
            f"{caller}: {_words(layer)} has blocks that run over the ends of rows, so that no cut "
            "between columns is one between blocks; cut it by rows, or quantise it with a block "
            f"size that divides {width}"
        )
    return size


def _words(layer: NF4Linear) -> str:
    return f"{type(layer).__name__} {tuple(layer.shape)} in blocks of {layer.block_size}"


@torch.inference_mode(False)  # inference tensors cannot be saved for backward
def _part(
    caller: str, layer: NF4Linear, axis: int, start: int, end: int, *, bias: bool
) -> NF4Linear:
    _check_kind(caller, layer)
    whole(caller, "start", start, least=0)
    whole(caller, "end", end)
    if not start < end <= layer.shape[axis]:
        raise ValueError(
            f"{caller}: start={start}, end={end}; expected 0 <= start < end <= "
            f"{layer.shape[axis]}, the {_SIDES[axis]} of {_words(layer)}"
        )
    stored = stored_for_cuts(caller, layer, axis, (start, end))
    by_rows, size = axis == ROWS, layer.block_size
    first, last = (n * layer.in_features if by_rows else n for n in (start, end))
    weights_and_bytes = {
        "packed": (2, 1), "absmax_code": (size, 1), "absmax_bytes": (size, 4),
        "absmax_scale": (size * ABSMAX_BLOCK_SIZE, 4),
    }  # fmt: skip
    for name, (weights, taken) in weights_and_bytes.items():
        if name in stored:
            piece = slice(first // weights * taken, math.ceil(last / weights) * taken)
            value = stored[name]
            stored[name] = value.flatten()[piece] if by_rows else value[:, piece]
    part = type(layer)(
        layer.in_features if by_rows else end - start,
        end - start if by_rows else layer.out_features,
        bias=False, compute_dtype=layer.compute_dtype, block_size=size,
        double_quant="absmax_code" in stored, dtype=layer.weight_dtype, device="meta",
    )  # fmt: skip
    if "codebook_bytes" in stored:
        stored["codebook"] = cast(Tensor, layer.codebook)
    part.fill({name: value.clone() for name, value in stored.items()})
    if bias and layer.bias is not None:
        own = layer.bias.detach()[start:end] if by_rows else layer.bias.detach()
        part.bias = torch.nn.Parameter(own.clone(), requires_grad=layer.bias.requires_grad)
    if isinstance(part, NF4Conv1D):
        part.dense_class = cast(NF4Conv1D, layer).dense_class
    return part.train(layer.training)
