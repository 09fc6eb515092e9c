"""Optimisers for adapters: parameter groups of LoRA+, and LoRA-FA."""

from minipeft.optim.lora_fa import LoRAFA
from minipeft.optim.lora_plus import lora_plus_groups

__all__ = ["LoRAFA", "lora_plus_groups"]
