"""What the claims job trains: the arms, each a method with its settings and its learning rates.

An arm trains once at each of its rates with seed 0.  The best rate on validation data is kept, and
two more seeds train at it.  Where the best is the first or the last rate, one more beyond it is
tried.  All arms of a task see the same number of examples.
"""

from dataclasses import dataclass, field
from typing import Any

SEEDS = (0, 1, 2)
STEP = 10**0.5  # the factor between neighbouring rates: 1e-4, 3e-4, 1e-3, ...
PARTS = {  # in the order in which they are run
    "types": "4-bit data types and block sizes",
    "ner": "named entities: every method",
    "ranks": "named entities: LoRA's rank",
    "layers": "named entities: which layers get LoRA",
    "batches": "named entities: LoRA and full fine-tuning by batch size",
    "chat": "replies in conversations: every method",
}
HIGHER_IS_BETTER = {"types": False, "ner": True, "chat": False}  # by task


@dataclass(frozen=True)
class Arm:
    """One row of the experiment.

    `method` is full, head, lora, qlora, prefix or prompt.  `settings` are the keywords of that
    method's function in `claims_methods.prepare`.  `rates` are learning rates; one alone is not
    tuned (the arms that train nothing).
    """

    name: str
    task: str
    part: str
    method: str
    rates: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    batch: int = 16  # sentences, or conversations


def rates(centre: float) -> tuple[float, ...]:
    """Three learning rates a factor of sqrt(10) apart around the centre.

    >>> rates(1e-3)
    (0.000316, 0.001, 0.00316)
    """
    return tuple(float(f"{centre * STEP**power:.3g}") for power in (-1, 0, 1))


FULL, LORA, PLUS, RAW, MLP = (rates(x) for x in (3.16e-4, 3.16e-3, 1e-3, 3.16e-2, 3.16e-3))
# centres by family, near what `python -m benchmarks ner --sweep` found with more data; few steps
# want high rates.  LoRA+: below LoRA's, as its B learns 16 times faster.  RAW: tables of keys or of
# embeddings.  MLP: a network that makes the prefix, which trains like a network.


def _family(task: str, batch: int, rank: int) -> list[Arm]:
    """LoRA and its relatives, of one rank, over all linear layers."""
    part = task
    lora: dict[str, Any] = {"rank": rank, "alpha": 16}

    def arm(name: str, method: str, grid: tuple[float, ...], **more: Any) -> Arm:
        return Arm(f"{task}: {name}", task, part, method, grid, {**lora, **more}, batch)

    return [
        Arm(f"{task}: full", task, part, "full", FULL, {}, batch),
        arm("LoRA", "lora", LORA),
        arm("rsLoRA", "lora", LORA, rank_stabilized=True),
        arm("LoRA+", "lora", PLUS, plus=16.0),
        arm("DoRA", "lora", LORA, dora=True),
        arm("PiSSA", "lora", LORA, start="pissa"),
        arm("QLoRA", "qlora", LORA),
        arm("LoftQ", "qlora", LORA, start="loftq"),
    ]


def _prefix(name: str, grid: tuple[float, ...], **settings: Any) -> Arm:
    return Arm(f"ner: {name}", "ner", "ner", "prefix", grid, settings)


def _lora(part: str, name: str, rank: int, **more: Any) -> Arm:
    settings = {"rank": rank, "alpha": 16, **more}
    return Arm(f"{part}: {name}", "ner", part, "lora", LORA, settings)


def _rounded(name: str, kind: str, block_size: int, nested: bool = False) -> Arm:
    settings = {"kind": kind, "block_size": block_size, "nested": nested}
    return Arm(f"types: {name}", "types", "types", "round", (0.0,), settings)


ARMS: list[Arm] = [
    _rounded("NF4", "NF4", 64),
    _rounded("NF4 + double quantisation", "NF4", 64, nested=True),
    _rounded("FP4", "FP4 E2M1", 64),
    _rounded("Int4", "Int4", 64),
    _rounded("Int8", "Int8", 64),
    _rounded("NF4, blocks of 32", "NF4", 32),
    _rounded("NF4, blocks of 256", "NF4", 256),
    _rounded("NF4, blocks of 1024", "NF4", 1024),
    *_family("ner", 16, 16),
    Arm("ner: head only", "ner", "ner", "head", rates(3.16e-2)),
    _prefix("P-tuning v2, 32", RAW, length=32, init_std=0.5),
    _prefix("P-tuning v2, 8", RAW, length=8, init_std=0.5),
    _prefix("P-tuning v2, 32, start 0.02", RAW, length=32, init_std=0.02),
    _prefix("P-tuning v2, 32, MLP", MLP, length=32, init_std=0.02, hidden=128),
    _prefix("prefix in the first layer only", RAW, length=32, init_std=0.5, layers=(0,)),
    *(_lora("ranks", f"LoRA, rank {rank}", rank) for rank in (1, 4, 64)),  # 16 is among the above
    _lora("ranks", "rsLoRA, rank 64", 64, rank_stabilized=True),
    # as many parameters as rank 16 over all layers: 110,592 in each of MiniLM's six layers
    _lora("layers", "LoRA, attention, rank 36", 36, where="attention"),
    _lora("layers", "LoRA, MLP, rank 29", 29, where="mlp"),  # 0.7 % more parameters
    *(
        Arm(f"batches: {name}, batch {batch}", "ner", "batches", method, grid, settings, batch)
        for batch in (64,)  # 16 is among the above
        for name, method, grid, settings in (
            ("full", "full", FULL, {}),
            ("LoRA", "lora", LORA, {"rank": 16, "alpha": 16}),
        )
    ),
    *_family("chat", 2, 16),
    Arm("chat: prefix", "chat", "chat", "prefix", RAW, {"length": 16, "init_std": 0.02}, 2),
    Arm("chat: prompt", "chat", "chat", "prompt", RAW, {"length": 16, "init": "vocabulary"}, 2),
]
BY_NAME = {arm.name: arm for arm in ARMS}
