"""Other people's files, read and written without their packages."""

from minipeft.io import bitsandbytes, lora, meta, peft, prefixes, save_pretrained

__all__ = ["bitsandbytes", "lora", "meta", "peft", "prefixes", "save_pretrained"]
