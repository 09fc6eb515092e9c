"""The states of the random generators that training draws from: read, checked, set.

Python's, numpy's global one, torch's on the CPU and those of the accelerators in use.  Generators
that a program made for itself (a DataLoader's `generator=`) are its own to keep.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PYTHON, _NUMPY = 625, 624  # whole numbers in a state of their Mersenne twisters


def random_states() -> dict[str, Any]:
    """All states, as numbers and tensors: what `check_random_states` takes."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  (the global one)
    device, found = _accelerator()
    return {
        "python": (version, torch.tensor(numbers, dtype=torch.int64, device="cpu"), gauss),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position),
                  int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "accelerator": (device, [_of_device("get_rng_state", device, i) for i in range(found)]),
    }  # fmt: skip


def check_random_states(states: Any) -> None:
    """Try states on generators that nobody uses.

    Raises:
        ValueError: they are damaged, or of accelerators that are not here.
    """
    here, count = _accelerator(always=True)
    try:
        device, kept = states["accelerator"]
        number = len(kept)
        random.Random().setstate(_python(states))
        np.random.RandomState().set_state(_numpy(states))
        torch.Generator().set_state(states["torch"])
        if (device, number) == (here, count):
            for index, state in enumerate(kept):
                torch.Generator(f"{device}:{index}").set_state(state)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
            RuntimeError) as error:  # fmt: skip
        raise ValueError(f"the states of random generators are damaged ({error})") from error
    if kept and (device, number) != (here, count):
        raise ValueError(
            f"generators of {number} devices of kind {device!r}; here "
            f"are {count} of {here!r}; generators=False leaves all random generators as they are"
        )


def set_random_states(states: Any) -> None:
    """Let all generators go on from these states, which were checked."""
    random.setstate(_python(states))
    np.random.set_state(_numpy(states))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    device, kept = states["accelerator"]
    for index, state in enumerate(kept):
        _of_device("set_rng_state", device, index, state)


def _python(states: Any) -> Any:
    version, numbers, gauss = states["python"]
    if numbers.shape != (_PYTHON,):
        raise ValueError(f"Python's has {tuple(numbers.shape)} numbers")
    if gauss is not None and type(gauss) is not float:
        raise ValueError(f"Python's keeps {gauss!r:.60}, expected a float or None")
    return version, tuple(numbers.tolist()), gauss


def _numpy(states: Any) -> Any:
    kind, keys, position, has_gauss, cached = states["numpy"]
    if keys.shape != (_NUMPY,):
        raise ValueError(f"numpy's has {tuple(keys.shape)} numbers")
    if type(position) is not int or not 0 <= position <= _NUMPY:  # numpy would read beyond its end
        raise ValueError(f"numpy's is at {position!r:.60}, expected 0 to {_NUMPY}")
    return kind, keys.numpy().astype(np.uint32), position, has_gauss, cached


def _accelerator(*, always: bool = False) -> tuple[str, int]:
    """Kind and number of accelerators; none where nothing was put on one yet, unless `always`."""
    if not torch.accelerator.is_available():
        return "none", 0
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    started = getattr(torch.get_device_module(kind.type), "is_initialized", None)
    if not always and started is not None and not started():
        return kind.type, 0
    return kind.type, torch.accelerator.device_count()


def _of_device(function: str, kind: str, index: int, *state: Tensor) -> Any:
    found = getattr(torch.get_device_module(kind), function)
    return found(*state) if kind == "mps" else found(*state, index)  # mps has one device
