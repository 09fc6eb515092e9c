"""bitsandbytes' 4-bit checkpoints, read and written without bitsandbytes."""

from minipeft.io.bitsandbytes.load import load_quantized
from minipeft.io.bitsandbytes.quantize import quantize_checkpoint
from minipeft.io.bitsandbytes.save import save_quantized

__all__ = ["load_quantized", "quantize_checkpoint", "save_quantized"]
