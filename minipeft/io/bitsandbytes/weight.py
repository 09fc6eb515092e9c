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
from typing import NamedTuple

import torch
from torch import Tensor

from minipeft.double_quant import ABSMAX_BLOCK_SIZE, dynamic_codebook
from minipeft.io.files import parse_object
from minipeft.nf4 import BLOCK_SIZES, NF4_CODEBOOK
from minipeft.qlora import PackedModule
from minipeft.quantized.codebooks import FP4_CODEBOOK

STATE_KEY = "quant_state.bitsandbytes__"  # and the data type: nf4, fp4
SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODEBOOKS = {"nf4": NF4_CODEBOOK, "fp4": FP4_CODEBOOK}
STATE_BYTES = 256
_MAX_STATE_BYTES = 2**16


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
        return math.ceil(math.prod(self.shape) / self.block_size)


def is_state_key(key: str) -> bool:
    """Whether this is the key of a weight's JSON."""
    return f".{STATE_KEY}" in key


def weight_of(key: str) -> str:
    """The weight's own key, from that of its JSON."""
    return key.rpartition(f".{STATE_KEY}")[0]


def specs(name: str, settings: Settings) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The entries that `entries` makes for such a weight: their dtypes and shapes."""
    n = math.prod(settings.shape)
    made: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (torch.uint8, (math.ceil(n / 2), 1)),
        f"{name}.quant_map": (torch.float32, (16,)),
        f"{name}.{STATE_KEY}{settings.quant_type}": (torch.uint8, (STATE_BYTES,)),
    }
    if settings.double_quant:
        groups = math.ceil(settings.n_blocks / settings.nested_block_size)
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
    packed, absmax, scale, offset, _ = layer.state()
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
    if quant_type not in CODEBOOKS or found.get("quant_type") != quant_type:
        raise ValueError(
            f"{key}: quant_type {found.get('quant_type')!r}; expected one of {list(CODEBOOKS)}, "
            "the same as in the key"
        )
    shape, dtype, block_size = (found.get(k) for k in ("shape", "dtype", "blocksize"))
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{key}: shape {str(shape)[:80]}; expected a list of sizes")
    if dtype not in DTYPES:
        raise ValueError(f"{key}: dtype {str(dtype)[:80]!r}; expected one of {list(DTYPES)}")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(f"{key}: blocksize {str(block_size)[:80]}; one of {list(BLOCK_SIZES)}")
    settings = Settings(tuple(shape), DTYPES[str(dtype)], block_size, quant_type, False)
    nested = [k for k in found if k.startswith("nested_")]
    if not nested:
        return settings, 0.0
    size, offset = found.get("nested_blocksize"), found.get("nested_offset")
    if type(size) is not int or size < 1 or type(offset) not in (int, float):
        raise ValueError(f"{key}: {nested} without a block size and an offset")
    offset = float(torch.tensor(offset, dtype=torch.float32))
    if not math.isfinite(offset) or found.get("nested_dtype") != "float32":
        raise ValueError(f"{key}: offset {offset}, dtype {str(found.get('nested_dtype'))[:80]!r}")
    return settings._replace(double_quant=True, nested_block_size=size), offset


def _floats(name: str, tensor: Tensor, count: int) -> Tensor:
    if not tensor.is_floating_point() or tensor.numel() != count:
        raise ValueError(
            f"{name}: {tensor.numel()} values of {tensor.dtype}; expected {count} floats"
        )
    values = tensor.flatten().float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: holds NaN or Inf")
    return values


def state_of(name: str, found: Mapping[str, Tensor]) -> tuple[Settings, dict[str, Tensor]]:
    """What a layer's `fill` takes, from the entries of weight `name`.

    Scales whose 8-bit codes are not in blocks of 256 of the usual map are decoded: the settings
    then say double_quant=False.

    Raises:
        ValueError: an entry is missing, is one too many, or has another size or dtype than the
            others demand, or scales that are not finite.
    """
    keys = [key for key in found if is_state_key(key)]
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
    if codes.dtype not in (torch.uint8, *DTYPES.values()) or codes.nbytes != math.ceil(n / 2):
        raise ValueError(
            f"{name}: {codes.nbytes} bytes as {codes.dtype}; shape {settings.shape} takes "
            f"{math.ceil(n / 2)}"
        )
    state = {
        "packed": codes.contiguous().view(-1).view(torch.uint8),
        "codebook": _floats(f"{name}.quant_map", found[f"{name}.quant_map"], 16),
    }
    if float(state["codebook"].abs().max()) > 1:
        raise ValueError(f"{name}.quant_map: values beyond [-1, 1]")
    absmax = found[f"{name}.absmax"]
    if not settings.double_quant:
        return settings, {**state, "absmax": _floats(f"{name}.absmax", absmax, n_blocks)}
    if absmax.dtype != torch.uint8 or absmax.numel() != n_blocks:
        raise ValueError(
            f"{name}.absmax: {absmax.numel()} values of {absmax.dtype}; expected {n_blocks} bytes"
        )
    size = settings.nested_block_size
    code, groups = absmax.contiguous().view(-1), math.ceil(n_blocks / size)
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
