"""How layers train, written and read where PEFT's format has no field for it.

PEFT's files say what a layer computes, but not always how it trains.  A weights file of ours says
the rest in its metadata, as JSON, for the modules that need it:

    slices          [[name, rank, scaling, [[first row, end], ...]], ...]   LoRAFusedLinear
    start           true: the second half of the rank is a frozen start that is subtracted
    scale           [alpha, rank_stabilized], where the configuration has other ones
    across_groups   true: a LoRAConv whose first factor may reach across groups
    dtype           of the factors, where it is not float32
    four_bit        true: the base was 4-bit; load_peft warns where it loads onto a dense one
    frozen          parameters that do not train, where others of the adapter do
    rows_before     trained tokens are new rows: how many the table has below them

All of it is checked against the tensors before a layer is made of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import Adapter, innermost, is_packed, linear_shape
from minipeft.io.fields import NAMES, Kind, check, list_of, one_of, whole
from minipeft.io.peft.keys import Key
from minipeft.io.peft.tensors import copy_into, parameters
from minipeft.layers.fused import LoRAFusedLinear
from minipeft.lora import LowRank, lora_scaling

_DTYPES = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STARTS = ("lora_a0", "lora_b0")
_NEAR = 1e-9  # two ways to write one scaling differ by rounding


class Slice(NamedTuple):
    """One slice of a fused layer: rows [first, end) of each run, in this order."""

    name: str
    rank: int
    scaling: float
    runs: list[tuple[int, int]]


@dataclass(frozen=True)
class Training:
    """What a file says of one layer."""

    slices: tuple[Slice, ...] = ()
    start: bool = False
    scale: tuple[float, bool] | None = None
    across_groups: bool = False
    dtype: torch.dtype = torch.float32
    four_bit: bool = False
    frozen: tuple[str, ...] = ()
    rows_before: int | None = None


PLAIN = Training()


def half(alpha: float, *, stabilized: bool) -> float:
    """The alpha of half the rank for the same scaling."""
    return alpha / 2 * (2**0.5 if stabilized else 1)


def described(
    places: Mapping[str, Iterable[Adapter]], scales: Mapping[str, tuple[float, bool]]
) -> dict[str, object]:
    """What to write of the layers of one adapter, by module; scales: what the configuration says.

    Frozen parameters are written only if others of the adapter train: one who freezes a whole
    adapter before saving it does not mean it to stay frozen.
    """
    found: dict[str, dict[str, object]] = {}
    trains = any(p.requires_grad for stack in places.values() for layer in stack
                 for p in layer.adapter_parameters().values())  # fmt: skip
    for place, stack in places.items():
        own: dict[str, object] = {}
        for layer in stack:
            if isinstance(layer, LowRank):
                own |= _described(layer, scales.get(place))
            if "new_rows" in layer.adapter_parameters():
                own["rows_before"] = layer.old_rows  # type: ignore[attr-defined]
            frozen = [n for n, p in layer.adapter_parameters().items()
                      if not p.requires_grad and n not in _STARTS]  # fmt: skip
            if trains and frozen:
                own["frozen"] = [*own.get("frozen", []), *frozen]  # type: ignore[misc]
        if own:
            found[place] = own
    return {"layers": found} if found else {}


def _described(layer: LowRank, scale: tuple[float, bool] | None) -> dict[str, object]:
    own: dict[str, object] = {}
    if isinstance(layer, LoRAFusedLinear):
        own["slices"] = [
            [n, layer.ranks.get(n, 0), layer.scalings.get(n, 1.0), runs(rows.tolist())]
            for n, rows in layer.rows.items()
        ]
    else:
        if layer.lora_a0 is not None:
            own["start"] = True
        mine = (layer.alpha, layer.rank_stabilized)
        exact = lora_scaling(layer.alpha, layer.rank, rank_stabilized=layer.rank_stabilized)
        if scale is not None and scale != mine and exact == layer.scaling:
            own["scale"] = list(mine)
    if getattr(layer, "across_groups", False):
        own["across_groups"] = True
    if (name := str(layer.lora_a.dtype).removeprefix("torch.")) in _DTYPES:
        own["dtype"] = name
    if is_packed(innermost(layer)):
        own["four_bit"] = True
    return own


def runs(rows: list[int]) -> list[list[int]]:
    """Row numbers as runs of consecutive ones: [first, end)."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    return runs


def parsed(found: Mapping[str, Any], where: str) -> dict[str, Training]:
    """What a file says of layers, by module.

    Raises:
        ValueError: something that `described` does not write; what does not fit the tensors is
            found when the layer is made.
    """
    layers = found.get("layers", {})
    if not isinstance(layers, dict):
        raise ValueError(f"{where}: the layers to train are {layers!r:.60}, expected an object")
    return {place: _parsed(own, f"{where}: {place:.80}") for place, own in layers.items()}


def _parsed(own: Any, where: str) -> Training:
    if not isinstance(own, dict) or not own.keys() <= _FIELDS.keys():
        raise ValueError(f"{where}: {own!r:.80}; expected some of {sorted(_FIELDS)}")
    check(where, own, _FIELDS)
    if "slices" in own and own.keys() & {"start", "scale", "across_groups"}:
        raise ValueError(f"{where}: slices, and {sorted(own)}; a fused layer has no such thing")
    made: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in own.items()}
    if "dtype" in own:
        made["dtype"] = _DTYPES[own["dtype"]]
    if "slices" in own:
        made["slices"] = tuple(
            Slice(name, rank, scaling, [(first, end) for first, end in runs])
            for name, rank, scaling, runs in own["slices"]
        )
    return Training(**made)


def _is_list(value: object, *kinds: type) -> bool:
    return isinstance(value, list) and tuple(map(type, value)) == kinds


def _is_slice(part: object) -> bool:
    if not isinstance(part, list) or not _is_list(part, str, int, float, list):
        return False
    runs_are_two_numbers = all(_is_list(run, int, int) for run in part[3])
    return runs_are_two_numbers and part[1] >= 0 and part[2] > 0


_FIELDS = {
    "slices": list_of(Kind("[name, rank, scaling, [[first row, end], ...]]", _is_slice)),
    "start": one_of(True),
    "scale": Kind("[alpha, rank_stabilized]", lambda value: _is_list(value, float, bool)),
    "across_groups": one_of(True),
    "dtype": one_of(*_DTYPES),
    "four_bit": one_of(True),
    "frozen": NAMES,
    "rows_before": whole(1),
}


def made_layer(
    where: str,
    kind: Any,
    base: nn.Module | nn.Parameter,
    found: Mapping[Key, Tensor],
    settings: Mapping[str, Any],
    training: Training,
) -> nn.Module:
    """A low-rank layer of this kind over `base`, filled with a file's tensors of its module.

    `settings`: what the configuration says, of the product as it is written.

    Raises:
        ValueError: tensors that do not belong to such a layer; nothing has changed then.
    """
    settings = {**settings, "dtype": training.dtype}
    if training.slices:
        return _fused(where, base, found, settings, training)
    if training.across_groups:
        settings["across_groups"] = True
    if training.start:
        if settings["rank"] % 2:
            raise ValueError(
                f"{where}: rank {settings['rank']} is odd; it has no half that is the start"
            )
        alpha = half(settings["alpha"], stabilized=settings["rank_stabilized"])
        settings |= {"rank": settings["rank"] // 2, "alpha": alpha}
    if training.scale is not None:
        settings = _scaled(where, settings, training.scale)
    try:
        layer: Any = kind(base, **settings)
    except TypeError as error:  # across_groups of what is no convolution
        raise ValueError(f"{where}: {error}") from error
    values = parameters(where, layer, found, halves=1 + training.start)
    if training.start:
        values["lora_a"], values["lora_b"], a0, b0 = layer.halves(
            values["lora_a"], values["lora_b"]
        )
        copy_into(where, layer, {"lora_a": a0, "lora_b": b0})
        layer.subtract_start()
    copy_into(where, layer, values)
    return layer  # type: ignore[no-any-return]


def freeze_named(where: str, layers: Iterable[Any], names: Iterable[str]) -> None:
    """Let these parameters of the layers over one module not train.

    Raises:
        ValueError: none of the layers has such a parameter.
    """
    own: dict[str, nn.Parameter] = {}
    for layer in layers:
        own |= layer.adapter_parameters()
    for name in names:
        if name not in own:
            raise ValueError(f"{where}: {name!r:.80} does not train, and is no parameter")
        own[name].requires_grad_(False)


def _scaled(where: str, settings: dict[str, Any], scale: tuple[float, bool]) -> dict[str, Any]:
    """The settings with another alpha and kind of scaling, which must come to the same."""
    rank, (alpha, stabilized) = settings["rank"], scale
    asked = lora_scaling(settings["alpha"], rank, rank_stabilized=settings["rank_stabilized"])
    if abs(lora_scaling(alpha, rank, rank_stabilized=stabilized) / asked - 1) > _NEAR:
        raise ValueError(f"{where}: alpha {alpha} is not the configuration's scaling {asked}")
    return {**settings, "alpha": alpha, "rank_stabilized": stabilized}


def _fused(
    where: str,
    base: Any,
    found: Mapping[Key, Tensor],
    settings: dict[str, Any],
    training: Training,
) -> LoRAFusedLinear:
    shape = linear_shape(innermost(base))
    roles = {(key.role, key.part): value for key, value in found.items()}
    if shape is None or roles.keys() != {("lora_A", ""), ("lora_B", "")}:
        raise ValueError(
            f"{where}: slices over a {type(innermost(base)).__name__}, {sorted(roles)}"
        )
    a, b = roles["lora_A", ""], roles["lora_B", ""]
    slices, out = training.slices, shape.out_features
    total = sum(part.rank for part in slices)
    expected = ((total, shape.in_features), (out, total))
    if (tuple(a.shape), tuple(b.shape)) != expected or settings["rank"] != total:
        raise ValueError(
            f"{where}: factors {tuple(a.shape)} and {tuple(b.shape)}; the slices ask for {expected}"
        )
    counted = [max(0, end - first) for part in slices for first, end in part.runs]
    names = [part.name for part in slices]
    if sum(counted) != out or 0 in counted or len(set(names)) < len(names):
        raise ValueError(f"{where}: slices {names[:5]} do not cover the {out} output rows once")
    rows = {
        part.name: torch.cat([torch.arange(*run, device="cpu") for run in part.runs])
        for part in slices
    }
    with_rank = [part for part in slices if part.rank]
    layer = LoRAFusedLinear(
        base, {part.name: part.rank for part in slices},
        {part.name: part.scaling * part.rank for part in with_rank},
        slices=rows, dropout=settings["dropout"], dtype=training.dtype,
    )  # fmt: skip
    layer.scalings = {part.name: part.scaling for part in with_rank}  # without rounding
    whole = lora_scaling(settings["alpha"], total, rank_stabilized=settings["rank_stabilized"])
    values, rest, start = {"lora_a": a}, b.clone(), 0
    for name, rank in layer.ranks.items():
        columns = slice(start, start + rank)
        own, factor = b[rows[name], columns], whole / layer.scalings[name]
        values[f"lora_b_{name}"] = own if abs(factor - 1) < _NEAR else own.double() * factor
        rest[rows[name], columns] = 0
        start = columns.stop
    if bool(rest.any()):
        raise ValueError(f"{where}: lora_B is not zero outside the slices")
    copy_into(where, layer, values)
    return layer
