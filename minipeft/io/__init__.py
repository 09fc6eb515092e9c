"""Other people's files, read and written without their packages."""

from minipeft.io import bitsandbytes, delta, peft, pickled, prefixes, save_pretrained

__all__ = ["bitsandbytes", "delta", "peft", "pickled", "prefixes", "save_pretrained"]
