"""Other people's files, read and written without their packages."""

from minipeft.io import peft

__all__ = ["peft"]
