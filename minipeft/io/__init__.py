"""Other people's files, read and written without their packages."""

from minipeft.io import bitsandbytes, peft, save_pretrained
from minipeft.io import prefixes as ptuning

__all__ = ["bitsandbytes", "peft", "ptuning", "save_pretrained"]
