"""The weights of an open checkpoint by their names in the file: dense ones, and 4-bit ones.

A 4-bit weight is several tensors of the file: bitsandbytes' (weight.py), or MXFP4's (mxfp4.py).
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from minipeft.io import mxfp4
from minipeft.io.bitsandbytes.blocks import Coded
from minipeft.io.bitsandbytes.weight import settings_of, state_of, weight_of
from minipeft.io.shards import Reader
from minipeft.qlora import PackedModule


class Contents:
    """What a reader's files hold; `dtype` is that of MXFP4 weights, whose files do not say it."""

    def __init__(self, reader: Reader, dtype: torch.dtype) -> None:
        self.reader, self.dtype = reader, dtype
        self.mxfp4 = mxfp4.groups(reader.specs)
        self.coded_keys = _groups(reader) | self.mxfp4  # 4-bit weight: the tensors that it is
        self._shapes: dict[str, tuple[int, ...]] = {}
        inside = {key for keys in self.coded_keys.values() for key in keys}
        self.keys = [*self.coded_keys, *(key for key in reader.specs if key not in inside)]

    def file(self, key: str) -> Path:
        """The file of a weight."""
        return self.reader.file_of[self.coded_keys.get(key, [key])[0]]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a weight; of a 4-bit one that of its dense values, (out, in).

        Raises:
            ValueError: the description of a 4-bit weight is damaged.
        """
        if key not in self.coded_keys:
            return self.reader.specs[key][1]
        if key not in self._shapes:
            try:
                self._shapes[key] = self._coded_shape(key)
            except ValueError as error:
                raise ValueError(f"{self.file(key)}: {error}") from error
        return self._shapes[key]

    def model_shape(self, key: str) -> tuple[int, ...]:
        """The shape that a weight has in the model: MXFP4's is turned there."""
        shape = self.shape(key)
        return (shape[0], *shape[:0:-1]) if key in self.mxfp4 else shape

    def _coded_shape(self, key: str) -> tuple[int, ...]:
        if key in self.mxfp4:
            return mxfp4.shape_of(key, self.reader.specs)
        name = next(own for own in self.coded_keys[key] if weight_of(own) == key)
        settings, _ = settings_of(key, name, self.reader.read(name))
        kind, stored = self.reader.specs.get(key, (torch.uint8, (0,)))
        if kind.itemsize * math.prod(stored) != math.ceil(math.prod(settings.shape) / 2):
            raise ValueError(f"{key}: {stored} of {kind} for a weight {settings.shape}")
        return settings.shape

    def coded(self, key: str) -> Coded:
        """Codes and scales of a 4-bit weight, as `fill` takes them.

        Raises:
            ValueError: they are damaged; the file is named.
        """
        found = {name: self.reader.read(name) for name in self.coded_keys[key]}
        try:
            if key in self.mxfp4:
                return mxfp4.state_of(key, found, self.dtype)
            return state_of(key, found)
        except ValueError as error:
            raise ValueError(f"{self.file(key)}: {error}") from error

    def dense(self, key: str) -> Tensor:
        """The values of a weight; those of a 4-bit one are decoded."""
        if key not in self.coded_keys:
            return self.reader.read(key)
        return decoded(self.coded(key))


def decoded(weight: Coded) -> Tensor:
    """The values that codes stand for, in the layout of the codes."""
    settings, state = weight
    layer = PackedModule(
        settings.shape, block_size=settings.block_size, double_quant=settings.double_quant,
        dtype=settings.dtype, device="meta",
    )  # fmt: skip
    layer.fill(dict(state))
    return layer.dequantize()


def _groups(reader: Reader) -> dict[str, list[str]]:
    """The keys that belong to each of bitsandbytes' weights, by the weight's own key."""
    groups = {weight: [key] for key in reader.specs if (weight := weight_of(key))}
    for key in reader.specs:
        name = key if key in groups else key.rpartition(".")[0]
        if name in groups and key not in groups[name]:
            groups[name].append(key)
    return groups
