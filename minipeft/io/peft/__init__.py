"""PEFT's adapter directories: adapter_config.json and adapter_model.safetensors."""

from minipeft.io.peft.load import load_peft
from minipeft.io.peft.save import save_peft

__all__ = ["load_peft", "save_peft"]
