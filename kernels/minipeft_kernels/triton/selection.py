"""Which tiles a product takes: a fixed table by number of rows, or plans measured on this machine.

`python -m benchmarks gpu --tune` measures plans and writes them into a file; the environment
variable MINIPEFT_TRITON_PLANS names such a file.  Nothing is measured while a model runs.
"""

import functools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

# Matrix instructions of a staged card read a factor from shared memory (Hopper and data-centre
# Blackwell), so that all warps share what one of them decoded.  On other cards of NVIDIA each warp
# decodes what it reads, and only slices avoid it.  AMD's plans have run on no card.
# Cards before sm_80 multiply 16-bit numbers without tensor cores here, and have none of bfloat16:
# weights are decoded for them, and the library multiplies.
Card = Literal["staged", "nvidia", "amd", "old"]
# Rows, by bytes of a number.  Above, decoding the weight once and the vendor's product are as fast;
# float32 is multiplied outside of tensor cores, which keep it exact, and takes more registers.
MOST_ROWS: dict[Card, dict[int, int]] = {
    "staged": {2: 64, 4: 16}, "nvidia": {2: 64, 4: 16}, "amd": {2: 16},
    "old": {},
}  # fmt: skip
VERSION = 1  # of the file of plans
Key = tuple[str, int, int, int]  # operator, n, k, rows of the tile


class Plan(NamedTuple):
    """Tile sizes of `product_kernel` or `gradient_kernel`, and how it is launched.

    `rows` is BM, `tile` BN; a step of the loop has `slices` tiles, one for each of `warps` (or one
    tile for all warps), and the loop is divided among `parts` programs.
    """

    rows: int
    tile: int
    slices: int
    warps: int
    stages: int
    parts: int


def rows_of(m: int) -> int:
    """The tile's rows for m rows."""
    return 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64


def plan_for(
    operator: str, m: int, n: int, k: int, itemsize: int = 2, card: Card = "staged"
) -> Plan:
    """The plan of `nf4_linear` or `nf4_linear_input_gradient` for m rows and a weight (n, k)."""
    rows = rows_of(m)
    if itemsize == 4 and operator != "nf4_linear":
        return Plan(16, 32, 1, 4, 3, 2 if k >= 8192 else 4)
    if itemsize == 4:
        return Plan(rows, 32, 4, 4, 3, 1 if n >= 8192 else 2)
    if (measured := measured_plans().get((operator, n, k, rows))) is not None:
        return measured
    if card == "amd":
        return Plan(16, 16 if operator == "nf4_linear" else 32, 4, 4, 1, 2)
    if operator == "nf4_linear":
        long = n < 8192 <= k  # few programs, and much to do for each
        if card == "staged" and rows == 64:
            return Plan(64, 128, 1, 4, 3, 8) if long else Plan(64, 64, 1, 4, 4, 4)
        if card == "staged" and rows == 32 and n < 8192:
            return Plan(32, 64, 1, 4, 4, 4)
        parts = (4 if rows == 8 else 2) if long else 1
        return Plan(rows, 32, 4, 4, 4 if rows <= 16 else 3, parts)
    if rows <= 16:
        return Plan(16, 128, 1, 4, 2, 8)
    return Plan(rows, 128, 1, 4, 3 if rows == 64 else 2, 4)


@functools.cache
def measured_plans() -> Mapping[Key, Plan]:
    """What the file of plans holds; nothing, with a warning, if it cannot be used."""
    name = os.environ.get("MINIPEFT_TRITON_PLANS")
    if not name:
        return {}
    try:
        return read_plans(Path(name))
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(
            f"MINIPEFT_TRITON_PLANS={name!r} is ignored: {type(error).__name__}: {error}; "
            "`python -m benchmarks gpu --tune` writes such a file",
            stacklevel=2,
        )
        return {}


def read_plans(path: Path) -> dict[Key, Plan]:
    """The plans of a file.

    Raises:
        OSError, ValueError, TypeError, KeyError: there is no such file, it has another version, or
            a plan that no kernel takes.
    """
    data = json.loads(path.read_text())
    if data["version"] != VERSION:
        raise ValueError(f"version {data['version']!r}; expected {VERSION}")
    plans = {}
    for entry in data["plans"]:
        operator, n, k, rows = entry["operator"], entry["n"], entry["k"], entry["rows"]
        plans[operator, int(n), int(k), int(rows)] = checked(Plan(*entry["plan"]), operator)
    return plans


def checked(plan: Plan, operator: str) -> Plan:
    """The plan, if the operator's kernel takes it; raises ValueError otherwise."""
    rows, tile, slices, warps, stages, parts = plan
    # a gradient sums over the tile: of fewer than 32 terms Triton makes wrong numbers
    tiles = {"nf4_linear": (16, 32, 64, 128), "nf4_linear_input_gradient": (32, 64, 128)}
    if (
        rows not in (8, 16, 32, 64) or tile not in tiles.get(operator, ())
        or slices not in (1, warps) or warps not in (1, 2, 4, 8)
        or stages not in range(1, 9) or parts not in range(1, 65)
    ):  # fmt: skip
        raise ValueError(f"{plan} is no plan of {operator}")
    return plan


def save_plans(path: Path, plans: Mapping[Key, Plan]) -> None:
    """Write a file of plans."""
    entries = [
        {"operator": operator, "n": n, "k": k, "rows": rows, "plan": list(plan)}
        for (operator, n, k, rows), plan in plans.items()
    ]
    path.write_text(json.dumps({"version": VERSION, "plans": entries}, indent=1) + "\n")
