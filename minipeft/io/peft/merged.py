"""Fused projections whose parts have factors of their own, in the files of other programs.

    MergedLinear (loralib, PEFT 0.2)     lora_A (r n, in)   lora_B (rows of n parts, r [, 1])

The output is cut into equal blocks, one for each entry of `enable_lora`; the n that are true have
factors, one pair below the other.  Such pairs become what our own files hold of LoRAFusedLinear:
one lora_A, one lora_B with zeros outside the parts, and the `slices` of training.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minipeft.io.peft.keys import PREFIX
from minipeft.io.peft.training import runs
from minipeft.layers.fused import Rows, blocks

Pair = tuple[Tensor, Tensor]
_NEWER = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])(\.weight)?")


class Sliced(NamedTuple):
    """One product over the whole output, and its slices as training.py writes them."""

    a: Tensor  # (sum of ranks, in)
    b: Tensor  # (out, sum of ranks)
    slices: list[list[object]]


def sliced(where: str, pairs: Mapping[str, Pair], rows: Rows, scaling: float) -> Sliced:
    """The product of the pairs of some parts, whose `rows` are those of the fused output.

    Raises:
        ValueError: a part without rows, or factors that do not fit its rows or each other.
    """
    if unknown := [name for name in pairs if name not in rows]:
        raise ValueError(f"{where}: factors for {unknown}; the slices are {list(rows)}")
    for name, (a, b) in pairs.items():
        size = len(rows[name])
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or len(b) != size:
            raise ValueError(
                f"{where}: factors {tuple(a.shape)} and {tuple(b.shape)} for slice {name!r}; "
                f"expected (rank, in) and ({size}, rank): is the slice of this size in the model "
                "that the file is for?"
            )
    out, ranks = sum(map(len, rows.values())), {name: len(a) for name, (a, _) in pairs.items()}
    whole = torch.zeros(out, sum(ranks.values()), dtype=next(iter(pairs.values()))[1].dtype)
    start, parts = 0, []
    for name in (n for n in rows if n in pairs):  # in the order of the rows, as LoRAFusedLinear
        a, b = pairs[name]
        whole[rows[name], start : start + len(a)] = b
        parts.append(a)
        start += len(a)
    described = [
        [name, ranks.get(name, 0), float(scaling) if name in ranks else 1.0, runs(own.tolist())]
        for name, own in rows.items()
    ]
    return Sliced(torch.cat(parts), whole, described)


def merged_parts(
    where: str, a: Tensor, b: Tensor, enabled: Sequence[bool]
) -> tuple[dict[str, Pair], Rows]:
    """The pairs of a MergedLinear by the names of its blocks, and the blocks' rows.

    Raises:
        ValueError: factors that are not of so many parts.
    """
    b = b.squeeze(2) if b.dim() == 3 and b.shape[2] == 1 else b  # a convolution's, in PEFT 0.2
    n = sum(enabled)
    names = ("q", "k", "v") if len(enabled) == 3 else [f"block_{i}" for i in range(len(enabled))]
    if a.dim() != 2 or b.dim() != 2 or not n or len(b) % n or len(a) != n * b.shape[1]:
        raise ValueError(
            f"{where}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} with enable_lora = "
            f"{list(enabled)}; expected ({n} rank, in) and ({n} blocks of rows, rank)"
        )
    on = [name for name, wanted in zip(names, enabled, strict=True) if wanted]
    pairs = zip(a.chunk(n), b.chunk(n), strict=True)
    return dict(zip(on, pairs, strict=True)), blocks(dict.fromkeys(names, len(b) // n))


def from_peft_02(
    content: Mapping[str, object], tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, object], dict[str, Tensor], dict[str, Any]]:
    """Configuration, tensors and slices of an adapter of PEFT 0.2 with `enable_lora`.

    Raises:
        ValueError: an enable_lora that is no list of true and false; a rank or alpha that is no
            number; factors that do not fit it.
    """
    enabled, rank, alpha = (content.get(key) for key in ("enable_lora", "r", "lora_alpha"))
    if not isinstance(enabled, list) or any(type(e) is not bool for e in enabled):
        raise ValueError(f"{where}: enable_lora = {enabled!r:.80}; expected a list of true, false")
    if type(rank) is not int or not isinstance(alpha, int | float) or rank < 1:
        raise ValueError(f"{where}: r = {rank!r:.40}, lora_alpha = {alpha!r:.40}; expected numbers")
    if newer := [key for key in _NEWER if content.get(key)]:
        raise ValueError(
            f"{where}: enable_lora beside {newer}, which PEFT 0.2 did not have; which of them "
            "holds is not known"
        )
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}
    result = dict(tensors)
    for key, value in tensors.items():
        if parsed := _FACTOR.fullmatch(key):
            found.setdefault(parsed["module"], {})[parsed["letter"]] = key, value
    layers: dict[str, object] = {}
    for module, factors in found.items():
        if factors.keys() != {"A", "B"}:
            raise ValueError(f"{where}: {module:.80} has lora_{next(iter(factors))} alone")
        (a_key, a), (b_key, b) = factors["A"], factors["B"]
        if len(a) != sum(enabled) * rank:
            raise ValueError(
                f"{where}: {module:.80}: lora_A is {tuple(a.shape)}; expected {sum(enabled)} parts "
                f"of r = {rank} rows; is the configuration of this file?"
            )
        pairs, rows = merged_parts(f"{where}: {module:.80}", a, b, enabled)
        made = sliced(f"{where}: {module:.80}", pairs, rows, alpha / rank)
        result[a_key], result[b_key] = made.a, made.b
        layers[module.removeprefix(PREFIX)] = {"slices": made.slices}
    n = sum(enabled)
    plain = {**content, "enable_lora": None, "r": n * rank, "lora_alpha": n * alpha}
    return plain, result, {"layers": layers}
