"""Other people's files, read and written without their packages."""

from minipeft.io import bitsandbytes, peft, ptuning

__all__ = ["bitsandbytes", "peft", "ptuning"]
