"""Variants of LoRA: DoRA, and other initialisations."""
