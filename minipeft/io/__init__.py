"""Other people's files, read and written without their packages."""

from minipeft.io import bitsandbytes, peft

__all__ = ["bitsandbytes", "peft"]
