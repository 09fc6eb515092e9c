"""Hugging Face models: deep prefixes, prompts, and models without weights."""

from minipeft.integrations.transformers.attach_prefix import attach_prefix
from minipeft.integrations.transformers.attach_prompt import attach_prompt
from minipeft.integrations.transformers.meta import meta_model
from minipeft.integrations.transformers.prefixes import NotProvedWarning, Prefix

__all__ = [
    "NotProvedWarning",
    "Prefix",
    "attach_prefix",
    "attach_prompt",
    "meta_model",
]
