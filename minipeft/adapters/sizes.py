"""The check of a size that a caller gives: one message for all layers."""


def whole(owner: str, name: str, value: object, *, least: int = 1) -> int:
    """The value, if it is a whole number of at least `least`; True and False are none.

    Raises:
        ValueError: it is something else; the message names the owner and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner}: {name}={value!r}; expected a whole number of at least {least}")
    return value
