"""What a foreign file holds of one module, turned into factors as PEFT's files hold them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from minipeft.adapters.protocol import innermost, linear_shape
from minipeft.io.lora.places import Place
from minipeft.io.lora.scale import Scales
from minipeft.io.peft.merged import Pair, merged_parts, sliced
from minipeft.layers.fused import Rows, blocks

Slices = Mapping[str, Rows | Mapping[str, int]]


@dataclass
class Pairs:
    """The factors that a file holds of one module."""

    spelled: str
    program: str = ""
    roles: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)

    def number(self) -> list[int | None]:
        """The numbers of its pairs: [None], or 0, 1, .. of SAT's lists."""
        return sorted({n for role, n in self.roles if role in "ab"}, key=lambda n: n or 0)


@dataclass
class Branch:
    """One module's part of an adapter, as PEFT's files hold it."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    slices: list[list[object]] | None = None


def branch_of(
    own: Pairs, place: Place, module: nn.Module, scales: Scales, where: str,
    slices: Slices, enabled: Sequence[bool] | None,
) -> Branch:  # fmt: skip
    """The factors of one module; `slices` and `enabled` are load_lora's of those names.

    Raises:
        ValueError: factors that are missing, of two ranks, or of another size than the module's;
            several pairs without rows for each; no alpha.
    """
    numbers = own.number()
    pairs = [_pair(own, number, where) for number in numbers]
    if not (rank := len(pairs[0][0])):
        raise ValueError(f"{where}: factors of rank 0; expected at least 1")
    given = own.roles.get(("alpha", None))
    shape = linear_shape(innermost(module))
    if own.program == "loralib" and shape is not None:
        a, b = pairs[0]
        parts = len(a) // b.shape[1] if b.dim() >= 2 and b.shape[1] else 1
        if parts > 1 or (enabled is not None and len(b) != shape.out_features):
            enabled = [True] * parts if enabled is None else enabled
            return _merged(own, place, shape.out_features, (a, b), enabled, scales, where)
    if len(pairs) > 1:
        if numbers != list(range(len(numbers))) or shape is None:
            raise ValueError(f"{where}: parts {numbers} over a {type(innermost(module)).__name__}")
        rows = _rows_of(place.name, slices, len(pairs), where)
        if sum(map(len, rows.values())) != shape.out_features:
            raise ValueError(f"{where}: slices of {[len(r) for r in rows.values()]} rows; the "
                             f"projection has {shape.out_features}")  # fmt: skip
        alpha = scales.alpha(own.spelled, place.part, own.program, rank, given)
        return _sliced(where, dict(zip(rows, pairs, strict=True)), rows, alpha / rank)
    a, b = (_fitted(factor, module) for factor in pairs[0])
    kind = "lora_embedding_{}" if isinstance(innermost(module), nn.Embedding) else "lora_{}.weight"
    made = {kind.format("A"): a, kind.format("B"): b}
    if (magnitude := own.roles.get(("magnitude", None))) is not None:
        made["lora_magnitude_vector"] = magnitude
    return Branch(made, rank, scales.alpha(own.spelled, place.part, own.program, rank, given))


def _pair(own: Pairs, number: int | None, where: str) -> Pair:
    """A and B of one pair, as (rank, in) and (out, rank)."""
    a, b = own.roles.get(("a", number)), own.roles.get(("b", number))
    if a is None or b is None:
        number_of = "" if number is None else f" of part {number}"
        raise ValueError(
            f"{where}: {'A' if a is None else 'B'}{number_of} is missing; is the file complete?"
        )
    if a.dim() < 2 or b.dim() < 2 or not a.is_floating_point() or not b.is_floating_point():
        raise ValueError(f"{where}: {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)} are "
                         "no factors")  # fmt: skip
    if own.program == "MLX":
        a, b = a.transpose(-1, -2), b.transpose(-1, -2)
    if own.program != "loralib" and len(a) != b.shape[1]:
        raise ValueError(f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} have two ranks")
    return a.contiguous(), b.contiguous()


def _fitted(factor: Tensor, module: nn.Module) -> Tensor:
    """A factor of a 1x1 convolution as one of a linear layer, where the module is that."""
    if factor.dim() == 4 and factor.shape[2:] == (1, 1) and linear_shape(innermost(module)):
        return factor.flatten(1)
    return factor


def _merged(
    own: Pairs, place: Place, out: int, pair: Pair, enabled: Sequence[bool], scales: Scales,
    where: str,
) -> Branch:  # fmt: skip
    pairs, rows = merged_parts(where, *pair, enabled)
    if (found := sum(map(len, rows.values()))) != out:
        raise ValueError(
            f"{where}: {sum(enabled)} parts of {len(enabled)} make {found} rows, the projection "
            f"has {out}; pass enable_lora= as it was trained, [True, False, True] for q and v"
        )
    rank = pair[1].shape[1]
    given = own.roles.get(("alpha", None))
    alpha = scales.alpha(own.spelled, place.part, own.program, rank, given)
    return _sliced(where, pairs, rows, alpha / rank)


def _sliced(where: str, pairs: Mapping[str, Pair], rows: Rows, scaling: float) -> Branch:
    made = sliced(where, pairs, rows, scaling)
    tensors = {"lora_A.weight": made.a, "lora_B.weight": made.b}
    return Branch(tensors, len(made.a), scaling * len(made.a), made.slices)


def _rows_of(name: str, slices: Slices, count: int, where: str) -> Rows:
    """The rows of each part of a fused projection, as the caller says."""
    fits = [end for end in slices if f".{name}".endswith(f".{end}")]
    if len(fits) != 1:
        raise ValueError(
            f"{where}: has {count} pairs of factors; pass slices={{{name.rpartition('.')[2]!r}: "
            "rows}, the rows of each in the model's order: minipeft.layers.fused.per_head(heads, "
            "head_dim) for ChatGLM-6B and VisualGLM, where they go by head"
        )
    given = slices[fits[0]]
    sizes = {key: value for key, value in given.items() if isinstance(value, int)}
    rows = blocks(sizes) if sizes else {k: v for k, v in given.items() if isinstance(v, Tensor)}
    if len(rows) != count:
        raise ValueError(f"{where}: has {count} pairs of factors, slices {list(given)}")
    return rows
