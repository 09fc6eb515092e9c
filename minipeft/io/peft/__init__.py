"""PEFT's adapter directories: adapter_config.json and adapter_model.safetensors."""

from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME
from minipeft.io.peft.load import load_peft
from minipeft.io.peft.merge_order import MergeReport, merge_in_order
from minipeft.io.peft.prompts import CannotExpress
from minipeft.io.peft.save import save_peft

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "CannotExpress",
    "MergeReport",
    "load_peft",
    "merge_in_order",
    "save_peft",
]
