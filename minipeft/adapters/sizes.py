"""The check of a size or setting that a caller gives: one message for all layers."""


def expect(owner: str, name: str, value: object, fits: object, expected: str) -> None:
    """Raise a ValueError that names the owner, the value and what was expected, unless it fits."""
    if not fits:
        raise ValueError(f"{owner}: {name}={value!r}; expected {expected}")


def whole(owner: str, name: str, value: object, *, least: int = 1) -> int:
    """The value, if it is a whole number of at least `least`; True and False are not.

    Raises:
        ValueError: it is something else.
    """
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    expect(owner, name, value, fits, f"a whole number of at least {least}")
    return value  # type: ignore[return-value]
