"""The keys of LoRA factors in the files of other programs: one table.

    program      A                              B                           layout of A, B
    PEFT         .lora_A[.<adapter>].weight     .lora_B[.<adapter>].weight  (rank, in), (out, rank)
    diffusers    .lora.down.weight              .lora.up.weight             the same
                 .to_q_lora.down.weight         .to_q_lora.up.weight        (before 0.15)
                 .lora_linear_layer.down.weight .lora_linear_layer.up.weight
    kohya        .lora_down.weight              .lora_up.weight             the same
    torchtune    .lora_a.weight                 .lora_b.weight              the same
    MLX          .lora_a                        .lora_b                     (in, rank), (rank, out)
    loralib      .lora_A                        .lora_B                     MergedLinear: merged.py
    SAT          .matrix_A[.<part>]             .matrix_B[.<part>]          (rank, in), (out, rank)

Beside them may be `.alpha` (kohya, diffusers), a number whose quotient by the rank is the scaling,
and a magnitude (DoRA): `.lora_magnitude_vector`, torchtune `.magnitude`, MLX `.m`.
"""

import re
from typing import NamedTuple

from minipeft.io.llama_names import META, renamed


class Key(NamedTuple):
    """What a key says."""

    program: str
    module: str  # as the file spells it
    role: str  # "a", "b", "alpha", "magnitude"
    part: int | None = None  # of several pairs of one module


_TABLE = (  # program, A, B, magnitude
    ("PEFT", r"\.lora_A(?:\.[^.]+)?\.weight", r"\.lora_B(?:\.[^.]+)?\.weight",
     r"\.lora_magnitude_vector(?:\.[^.]+)?"),
    ("diffusers", r"\.lora\.down\.weight", r"\.lora\.up\.weight", None),
    ("diffusers", r"\.lora_linear_layer\.down\.weight", r"\.lora_linear_layer\.up\.weight", None),
    ("diffusers", r"(?P<old>\.to_(?:q|k|v|out))_lora\.down\.weight",
     r"(?P<old>\.to_(?:q|k|v|out))_lora\.up\.weight", None),
    ("kohya", r"\.lora_down\.weight", r"\.lora_up\.weight", None),
    ("torchtune", r"\.lora_a\.weight", r"\.lora_b\.weight", r"\.magnitude"),
    ("MLX", r"\.lora_a", r"\.lora_b", r"\.m"),
    ("loralib", r"\.lora_A", r"\.lora_B", None),
    ("SAT", r"\.matrix_A(?:\.(?P<part>\d{1,3}))?", r"\.matrix_B(?:\.(?P<part>\d{1,3}))?", None),
)  # fmt: skip
_SUFFIXES = [
    (program, role, re.compile(f"(?P<module>.+?){suffix}"))
    for program, *suffixes in _TABLE
    for role, suffix in zip(("a", "b", "magnitude"), suffixes, strict=True)
    if suffix is not None
]
_ALPHA = re.compile(r"(?P<module>.+?)(?P<old>\.to_(?:q|k|v|out)(?=_lora))?"
                    r"(?:_lora|\.lora|\.lora_linear_layer)?\.alpha")  # fmt: skip
LONGEST = 1000  # characters; real names have some hundred
PROGRAMS = tuple(dict.fromkeys(program for program, *_ in _TABLE))


def parse(key: str) -> Key | None:
    """What a key says; None if it is none of the table's."""
    if len(key) > LONGEST:
        return None
    for program, role, pattern in _SUFFIXES:
        if found := pattern.fullmatch(key):
            names = found.groupdict()
            part = names.get("part")
            module = names["module"] + (names.get("old") or "")
            return Key(program, module, role, None if part is None else int(part))
    if found := _ALPHA.fullmatch(key):
        return Key("", found["module"] + (found["old"] or ""), "alpha")
    return None


def program_of(key: str) -> str | None:
    """The program, other than PEFT, whose files have such keys; None if none is known."""
    found = parse(key.removeprefix("base_model.model."))
    if found is None or found.program == "":
        return None
    if found.program == "PEFT":
        return "FlagAI (Meta's names)" if renamed(found.module, META) else None
    return found.program
