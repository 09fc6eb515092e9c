"""Other people's files, read and written without their packages."""

from minipeft.io import bitsandbytes, delta, lora, meta, peft, pickled, prefixes, save_pretrained

__all__ = [
    "bitsandbytes",
    "delta",
    "lora",
    "meta",
    "peft",
    "pickled",
    "prefixes",
    "save_pretrained",
]
