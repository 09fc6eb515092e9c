"""Hugging Face models: deep prefixes, and saving."""

from minipeft.integrations.transformers import saving
from minipeft.integrations.transformers.deep_prefix import Prefix, attach_prefix

__all__ = ["Prefix", "attach_prefix", "saving"]
