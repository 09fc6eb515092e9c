"""Hugging Face models: deep prefixes, saving, and models without weights."""

from minipeft.integrations.transformers import saving
from minipeft.integrations.transformers.attached import Prefix
from minipeft.integrations.transformers.deep_prefix import attach_prefix
from minipeft.integrations.transformers.meta import meta_model
from minipeft.integrations.transformers.prompts import attach_prompt, attach_zero_gated

__all__ = [
    "Prefix",
    "attach_prefix",
    "attach_prompt",
    "attach_zero_gated",
    "meta_model",
    "saving",
]
