"""The weights of an open checkpoint by their names in the file: dense ones, and 4-bit ones.

A 4-bit weight is several tensors of the file: bitsandbytes' (weight.py), or MXFP4's (mxfp4.py).
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from minipeft.io import mxfp4
from minipeft.io.bitsandbytes.blocks import Coded
from minipeft.io.bitsandbytes.weight import Settings, settings_of, state_of, weight_of
from minipeft.io.shards import Reader
from minipeft.qlora import PackedModule


class Contents:
    """What a reader's files hold; `dtype` is that of MXFP4 weights, whose files do not say it.

    With `views` tensors stay in the mapped file and nothing is copied; without `finite` float32
    scales of blocks are not looked at.
    """

    def __init__(
        self, reader: Reader, dtype: torch.dtype, *, views: bool = False, finite: bool = True
    ) -> None:
        self.reader, self.dtype, self.views, self.finite = reader, dtype, views, finite
        self.mxfp4 = mxfp4.groups(reader.specs)
        self.coded_keys = _groups(reader) | self.mxfp4  # 4-bit weight: the tensors that it is
        self._settings: dict[str, Settings] = {}
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
        if key in self.mxfp4:
            try:
                return mxfp4.shape_of(key, self.reader.specs)
            except ValueError as error:
                raise ValueError(f"{self.file(key)}: {error}") from error
        return self.settings(key).shape

    def settings(self, key: str) -> Settings:
        """What the file says of a weight in bitsandbytes' format.

        Raises:
            ValueError: its description is damaged, or the codes have another size.
        """
        if key not in self._settings:
            try:
                self._settings[key] = self._read_settings(key)
            except ValueError as error:
                raise ValueError(f"{self.file(key)}: {error}") from error
        return self._settings[key]

    def model_shape(self, key: str) -> tuple[int, ...]:
        """The shape that a weight has in the model: MXFP4's is turned there."""
        shape = self.shape(key)
        return (shape[0], *shape[:0:-1]) if key in self.mxfp4 else shape

    def _read_settings(self, key: str) -> Settings:
        name = next(own for own in self.coded_keys[key] if weight_of(own) == key)
        settings, _ = settings_of(key, name, self.reader.read(name))
        kind, stored = self.reader.specs.get(key, (torch.uint8, (0,)))
        if kind.itemsize * math.prod(stored) != -(-math.prod(settings.shape) // 2):
            raise ValueError(f"{key}: {stored} of {kind} for a weight {settings.shape}")
        return settings

    def coded(self, key: str) -> Coded:
        """Codes and scales of a 4-bit weight, as `fill` takes them.

        Raises:
            ValueError: they are damaged; the file is named.
        """
        found = {name: self._tensor(name) for name in self.coded_keys[key]}
        try:
            if key in self.mxfp4:
                return mxfp4.state_of(key, found, self.dtype)
            return state_of(key, found, finite=self.finite)
        except ValueError as error:
            raise ValueError(f"{self.file(key)}: {error}") from error

    def dense(self, key: str) -> Tensor:
        """The values of a weight; those of a 4-bit one are decoded."""
        if key not in self.coded_keys:
            return self._tensor(key)
        return decoded(self.coded(key))

    def _tensor(self, name: str) -> Tensor:
        return self.reader.view(name) if self.views else self.reader.read(name)


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
