"""Other people's files, read and written without their packages."""

from minipeft.io import bitsandbytes, peft, prefixes, save_pretrained

__all__ = ["bitsandbytes", "peft", "prefixes", "save_pretrained"]
