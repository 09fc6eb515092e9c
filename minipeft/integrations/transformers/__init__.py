"""Hugging Face models: saving."""

from minipeft.integrations.transformers import saving

__all__ = ["saving"]
