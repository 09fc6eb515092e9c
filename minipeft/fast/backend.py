"""Which rows of the operators' table compute: asking, choosing, and trying one more."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minipeft.adapters.products import is_slow
from minipeft.ops import KERNELS, OPERATORS, Implementation, Kernels, Operator, allowed, load


@contextmanager
def tried_first(row: Implementation) -> Iterator[None]:
    """Within this context, a row more, before those that its operator has (a kernel on trial).

    Raises:
        ValueError: the operator does not exist.
    """
    if row.operator not in OPERATORS:
        raise ValueError(
            f"tried_first: no operator {row.operator!r}; there are {sorted(OPERATORS)}"
        )
    rows = OPERATORS[row.operator].rows
    rows.insert(0, row)
    try:
        yield
    finally:
        rows.remove(row)


@contextmanager
def use_kernels(which: Kernels) -> Iterator[None]:
    """Within this context, which rows of the table operators may use.

    True: all of them.  False: PyTorch's, no optional kernels.  "plain": the functions that are
    written to be read, which are slow and take more memory.  The environment variable
    MINIPEFT_KERNELS (1, 0 or plain) does the same for a whole process.  Called without `with` this
    function changes nothing.

    Raises:
        ValueError: none of the three.
    """
    if which not in (True, False, "plain"):
        raise ValueError(f'use_kernels: {which!r}; expected True, False or "plain"')
    token = KERNELS.set(which)
    try:
        yield
    finally:
        KERNELS.reset(token)


def backend(
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, ...] = (4096, 4096),
) -> dict[str, str]:
    """What each operator would use for such a first argument, and why not what comes before it.

    Says too where products of this dtype are computed in float32 (adapters/products.py).

    >>> backend(dtype=torch.float32)["nf4_experts"]
    'pytorch'
    """
    device, report = torch.device(device), {}
    for name, defined in OPERATORS.items():
        chosen, reasons = _chosen(defined, device, dtype, shape)
        report[name] = chosen + (f" (not {'; '.join(reasons)})" if reasons else "")
        multiplies = defined.gradients or name == "dense_linear"
        if multiplies and chosen != "plain" and is_slow(dtype, device):
            kind = str(dtype).removeprefix("torch.")
            report[name] += f", products in float32 (this CPU has none of {kind})"
    return report


def _chosen(
    defined: Operator, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[str, list[str]]:
    """The row that `Operator.choose` takes, and for each row before it why not that one."""
    setting = KERNELS.get()
    reasons: list[str] = []
    for row in defined.rows:
        if not allowed(row, setting):
            why = "only plain rows are on" if setting == "plain" else "kernels are off"
        elif not row.when(device, dtype, shape):
            why = f"not for {dtype} {shape} on {device.type}"
        elif isinstance(found := load(row), str):
            why = found
        else:
            return row.name, reasons
        reasons.append(f"{row.name}: {why}")
    return "plain", reasons
