"""Optimisers for adapters: parameter groups of LoRA+, and LoRA-FA."""
