"""One 4-bit weight as bitsandbytes stores it, read and written without bitsandbytes.

Beside the weight `name`, in a state dict or a safetensors file (bitsandbytes 0.42 and later):

    name                              the packed codes; uint8, or viewed as a float dtype
    name.absmax                       float scales, or their 8-bit codes
    name.quant_map                    the 16 values
    name.nested_absmax                the scales' scales            (double quantisation)
    name.nested_quant_map             the 256 values of their codes (double quantisation)
    name.quant_state.bitsandbytes__nf4   JSON as bytes: shape, dtype, block sizes, offset

The JSON is padded with spaces to 256 bytes, so that sizes are known before the weights are.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minipeft.double_quant import ABSMAX_BLOCK_SIZE, dynamic_codebook
from minipeft.io.fields import Kind, check, list_of, one_of, parse_object, whole
from minipeft.nf4 import BLOCK_SIZES, NF4_CODEBOOK
from minipeft.qlora import PackedModule
from minipeft.quantized.codebooks import FP4

STATE_KEY = "quant_state.bitsandbytes__"  # and the data type: nf4, fp4
SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODEBOOKS = {"nf4": NF4_CODEBOOK, "fp4": FP4}
STATE_BYTES = 256
_MAX_STATE_BYTES = 2**16


def _is_finite(value: object) -> bool:
    """Whether a number is finite in float32."""
    return type(value) in (int, float) and abs(value) < torch.finfo(torch.float32).max  # type: ignore[arg-type]


_STATE = {
    "quant_type": one_of(*CODEBOOKS),
    "shape": list_of(whole(1, 2**63)),
    "dtype": one_of(*DTYPES),
    "blocksize": one_of(*BLOCK_SIZES),
}
_NESTED = {
    "nested_blocksize": whole(1, 2**63),
    "nested_offset": Kind("a finite number", _is_finite),
    "nested_dtype": one_of("float32"),
}


class Settings(NamedTuple):
    """What the JSON of a weight says."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    quant_type: str = "nf4"
    double_quant: bool = True
    nested_block_size: int = ABSMAX_BLOCK_SIZE

    @property
    def n_blocks(self) -> int:
        """How many block scales the weight has."""
        return -(-math.prod(self.shape) // self.block_size)


def weight_of(key: str) -> str:
    """The weight's own key, from that of its JSON; "" if this is no key of a weight's JSON."""
    return key.rpartition(f".{STATE_KEY}")[0]


def specs(name: str, settings: Settings) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The entries that `entries` makes for such a weight: their dtypes and shapes."""
    n = math.prod(settings.shape)
    made: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (torch.uint8, ((n + 1) // 2, 1)),
        f"{name}.quant_map": (torch.float32, (16,)),
        f"{name}.{STATE_KEY}{settings.quant_type}": (torch.uint8, (STATE_BYTES,)),
    }
    if settings.double_quant:
        groups = -(-settings.n_blocks // settings.nested_block_size)
        made[f"{name}.absmax"] = (torch.uint8, (settings.n_blocks,))
        made[f"{name}.nested_absmax"] = (torch.float32, (groups,))
        made[f"{name}.nested_quant_map"] = (torch.float32, (256,))
    else:
        made[f"{name}.absmax"] = (torch.float32, (settings.n_blocks,))
    return made


def entries(
    name: str, layer: PackedModule, *, quant_storage: torch.dtype = torch.uint8
) -> dict[str, Tensor]:
    """The entries of a layer's weight, which is called `name` in the file; nothing is copied.

    `quant_storage` views the codes as a float dtype, as sharded training wants them.

    Raises:
        ValueError: a codebook that is neither NF4 nor FP4, or codes that do not fill elements of
            `quant_storage`.
    """
    own = tuple(layer.codebook.tolist()) if layer.codebook is not None else NF4_CODEBOOK
    quant_type = next((kind for kind, values in CODEBOOKS.items() if values == own), None)
    if quant_type is None:
        raise ValueError(f"{name}: bitsandbytes has no data type with this codebook; dequantise it")
    if quant_storage not in (torch.uint8, *DTYPES.values()):
        raise ValueError(f"{name}: quant_storage={quant_storage}; uint8 or a float dtype")
    packed, absmax, _, scale, offset, _ = layer.state()
    if packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"{name}: {packed.numel()} bytes of codes do not fill elements of {quant_storage}; use "
            "quant_storage=torch.uint8"
        )
    state: dict[str, object] = {
        "quant_type": quant_type,
        "blocksize": layer.block_size,
        "dtype": str(layer.weight_dtype).removeprefix("torch."),
        "shape": list(layer.shape),
    }
    made = {
        name: packed.reshape(-1).view(quant_storage).view(-1, 1),
        f"{name}.absmax": absmax.reshape(-1),
        f"{name}.quant_map": torch.tensor(own, dtype=torch.float32),
    }
    if scale is not None and offset is not None:
        state |= {
            "nested_blocksize": ABSMAX_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
        made[f"{name}.nested_absmax"] = scale
        made[f"{name}.nested_quant_map"] = torch.tensor(dynamic_codebook(), dtype=torch.float32)
    text = json.dumps(state).encode().ljust(STATE_BYTES)
    made[f"{name}.{STATE_KEY}{quant_type}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return made


def settings_of(name: str, key: str, state: Tensor) -> tuple[Settings, float]:
    """The settings of weight `name`, and the scales' offset (0 if they are not nested).

    Raises:
        ValueError: the JSON is damaged, or says what bitsandbytes never writes.
    """
    if state.dtype != torch.uint8 or state.numel() > _MAX_STATE_BYTES:
        raise ValueError(f"{key}: expected at most {_MAX_STATE_BYTES} bytes of JSON")
    found = parse_object(bytes(state.flatten().tolist()), key)
    quant_type = key.rpartition(STATE_KEY)[2]
    if quant_type not in CODEBOOKS:
        raise ValueError(f"{key}: quant_type {quant_type!r:.80}; one of {list(CODEBOOKS)}")
    nested = {k for k in found if k.startswith("nested_")}
    needed = (*_STATE, *_NESTED) if nested else tuple(_STATE)
    check(key, found, {**_STATE, **_NESTED, "quant_type": one_of(quant_type)}, needed)
    value: dict[str, Any] = found
    settings = Settings(
        tuple(value["shape"]), DTYPES[value["dtype"]], value["blocksize"], quant_type, False
    )
    if not nested:
        return settings, 0.0
    offset = float(torch.tensor(value["nested_offset"], dtype=torch.float32))
    size = value["nested_blocksize"]
    return settings._replace(double_quant=True, nested_block_size=size), offset


def _floats(name: str, tensor: Tensor, count: int, finite: bool = True) -> Tensor:
    if not tensor.is_floating_point() or tensor.numel() != count:
        raise ValueError(
            f"{name}: {tensor.numel()} values of {tensor.dtype}; expected {count} floats"
        )
    values = tensor.flatten().float()
    if finite and not bool(values.isfinite().all()):
        raise ValueError(f"{name}: holds NaN or Inf")
    return values


def state_of(
    name: str, found: Mapping[str, Tensor], *, finite: bool = True
) -> tuple[Settings, dict[str, Tensor]]:
    """What a layer's `fill` takes, from the entries of weight `name`.

    With `finite` False, float32 scales of blocks are not looked at: the caller takes a part only.

    Scales whose 8-bit codes are not in blocks of 256 of the usual map are decoded: the settings
    then say double_quant=False.

    Raises:
        ValueError: an entry is missing or unexpected, has another size or dtype than the others ask
            for, or holds scales that are not finite.
    """
    keys = [key for key in found if weight_of(key)]
    if len(keys) != 1:
        raise ValueError(f"{name}: {len(keys)} descriptions ({keys}); expected one")
    settings, offset = settings_of(name, keys[0], found[keys[0]])
    expected = set(specs(name, settings))
    if expected != set(found):
        raise ValueError(
            f"{name}: missing {sorted(expected - set(found))}, unexpected "
            f"{sorted(set(found) - expected)}"
        )
    n, n_blocks = math.prod(settings.shape), settings.n_blocks
    codes = found[name]
    if codes.dtype not in (torch.uint8, *DTYPES.values()) or codes.nbytes != (n + 1) // 2:
        raise ValueError(
            f"{name}: {codes.nbytes} bytes as {codes.dtype}; shape {settings.shape} takes "
            f"{(n + 1) // 2}"
        )
    state = {
        "packed": codes.contiguous().view(-1).view(torch.uint8),
        "codebook": _floats(f"{name}.quant_map", found[f"{name}.quant_map"], 16),
    }
    if float(state["codebook"].abs().max()) > 1:
        raise ValueError(f"{name}.quant_map: values beyond [-1, 1]")
    absmax = found[f"{name}.absmax"]
    if not settings.double_quant:
        scales = _floats(f"{name}.absmax", absmax, n_blocks, finite)
        return settings, {**state, "absmax": scales}
    if absmax.dtype != torch.uint8 or absmax.numel() != n_blocks:
        raise ValueError(
            f"{name}.absmax: {absmax.numel()} values of {absmax.dtype}; expected {n_blocks} bytes"
        )
    size = settings.nested_block_size
    code, groups = absmax.contiguous().view(-1), -(-n_blocks // size)
    scale = _floats(f"{name}.nested_absmax", found[f"{name}.nested_absmax"], groups)
    table = _floats(f"{name}.nested_quant_map", found[f"{name}.nested_quant_map"], 256)
    if size == ABSMAX_BLOCK_SIZE and tuple(table.tolist()) == dynamic_codebook():
        state |= {
            "absmax_code": code, "absmax_scale": scale,
            "absmax_offset": torch.tensor([offset], dtype=torch.float32),
        }  # fmt: skip
        return settings, state
    groups_of = torch.arange(n_blocks) // size
    decoded = table.index_select(0, code.int()).mul_(scale.index_select(0, groups_of)).add_(offset)
    return settings._replace(double_quant=False), {**state, "absmax": decoded}
