"""What other libraries' models need beyond the layers; nothing of theirs is imported here."""

from minipeft.integrations import transformers

__all__ = ["transformers"]
