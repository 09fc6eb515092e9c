"""Names of tensors in PEFT's files, by the module that they belong to.

    base_model.model.<module>.lora_A.weight                       <module>: its name in the model
    base_model.model.<module>.lora_embedding_A
    base_model.model.<module>.lora_magnitude_vector               DoRA
    base_model.model.<module>.base_layer.bias                     a trained bias under LoRA
    base_model.model.<module>.base_layer.out_proj.lora_A.weight   nn.MultiheadAttention
    base_model.model.<module>.base_layer.lora_A.weight            the first of two expert weights
    base_model.model.<module>.token_adapter.trainable_tokens_delta
    base_model.model.<module>.<parameter>                         a module saved whole, other biases

Files may lack "base_model.model.", and keys may hold the adapter's name: lora_A.default.weight.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

PREFIX = "base_model.model."
_ROLES = re.compile(
    r"(?P<module>.+?)(?P<depth>(\.base_layer)*)\.(?P<inner>out_proj\.)?"
    r"((?P<factor>lora_[AB])(\.[\w-]+)?\.weight"
    r"|(?P<other>lora_embedding_[AB]|lora_magnitude_vector)(\.[\w-]+?)??(\.weight)?)"
)
_TOKENS = re.compile(r"(?P<module>.+?)\.token_adapter\.trainable_tokens_delta(\.[\w-]+)?")


class Key(NamedTuple):
    """What a key says: the module, the part of it, and which tensor."""

    module: str
    role: str  # "lora_A", "lora_embedding_B", "lora_magnitude_vector", "tokens", "plain"
    part: str = ""  # "out_proj" of attention; the parameter's name of a plain key
    depth: int = 0  # how many "base_layer" lie between


def parse(key: str) -> Key:
    """What this key, without the prefix, says."""
    if found := _TOKENS.fullmatch(key):
        return Key(found["module"], "tokens")
    found = _ROLES.fullmatch(key)
    if found:
        depth, role = found["depth"].count(".base_layer"), found["factor"] or found["other"]
        if found["inner"] and depth == 0:  # a layer that is called out_proj, not attention's
            return Key(f"{found['module']}.out_proj", role)
        if found["inner"]:
            return Key(found["module"], role, "out_proj", depth)
        return Key(found["module"], role, "", depth)
    module, _, own = key.rpartition(".")
    if module.endswith(".base_layer"):
        return Key(module.removesuffix(".base_layer"), "plain", own, 1)
    return Key(module, "plain", own)


def without_prefix(keys: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """{key as the model would have it: key in the file}.

    The prefix is taken off where it is, unless the model itself has a module "base_model.model".
    """
    prefix = "" if PREFIX[:-1] in set(names) else PREFIX
    return {key.removeprefix(prefix): key for key in keys}
