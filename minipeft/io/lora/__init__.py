"""LoRA files of other programs: kohya, diffusers, torchtune, MLX, loralib, SAT, Meta's names."""

from minipeft.io.lora.load import load_lora
from minipeft.io.lora.save import save_meta_lora

__all__ = ["load_lora", "save_meta_lora"]
