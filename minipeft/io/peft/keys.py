"""Names of tensors in PEFT's files, by the module that they belong to.

    base_model.model.<module>.lora_A.weight                       <module>: its name in the model
    base_model.model.<module>.lora_B.bias                         lora_bias
    base_model.model.<module>.lora_embedding_A
    base_model.model.<module>.lora_magnitude_vector               DoRA
    base_model.model.<module>.base_layer.bias                     a trained bias under LoRA
    base_model.model.<module>.base_layer.out_proj.lora_A.weight   nn.MultiheadAttention
    base_model.model.<module>.base_layer.lora_A.weight            the first of two expert weights
    base_model.model.<module>.token_adapter.trainable_tokens_delta
    base_model.model.<module>.token_adapter.base_layer.weight     the base's own, below that
    base_model.model.<module>.<parameter>                         a module saved whole, other biases
    base_model.model.<module>.modules_to_save.<parameter>         the same
    base_model.model.<module>.original_module.<parameter>         the base's own, beside that

Files may lack "base_model.model.", keys may hold the adapter's name (lora_A.default.weight), and
names of modules may hold what torch wraps around them (adapters/plain_names.py).
"""

import re
from collections.abc import Container, Iterable
from typing import NamedTuple

from minipeft.adapters.plain_names import without_outer_wrappers

PREFIX = "base_model.model."
_ADAPTER = r"(\.[^.]+)?"  # the adapter's name, which holds no dot
_ROLES = re.compile(
    r"(?P<module>.+?)(?P<depth>(\.base_layer)*)\.(?P<inner>out_proj\.)?"
    rf"((?P<factor>lora_[AB]){_ADAPTER}\.weight"
    rf"|(?P<bias>lora_B){_ADAPTER}\.bias"
    rf"|(?P<other>lora_embedding_[AB]|lora_magnitude_vector){_ADAPTER}?(\.weight)?)"
)
_TOKENS = re.compile(rf"(?P<module>.+?)\.token_adapter\.trainable_tokens_delta{_ADAPTER}")
_ASIDE = re.compile(r"(?P<module>.+?)\.(?P<kind>modules_to_save|original_module)(\.(?P<rest>.+))?")


class Key(NamedTuple):
    """What a key says: the module, the part of it, and which tensor."""

    module: str
    role: str  # "lora_A", "lora_embedding_B", "lora_magnitude_vector", "tokens", "plain", "base"
    part: str = ""  # "out_proj" of attention; the parameter's name of a plain key
    depth: int = 0  # how many "base_layer" lie between


def parse(key: str) -> Key:
    """What this key, without the prefix, says."""
    if found := _TOKENS.fullmatch(key):
        return Key(found["module"], "tokens")
    found = _ROLES.fullmatch(key)
    if found:
        depth = found["depth"].count(".base_layer")
        role = found["factor"] or found["other"] or "lora_bias"
        part = "out_proj" if found["inner"] else ""
        if part and depth == 0:  # a layer that is called out_proj, not attention's
            return Key(f"{found['module']}.{part}", role)
        return Key(found["module"], role, part, depth)
    module, _, own = key.rpartition(".")
    if module.endswith(".base_layer"):
        place = module.removesuffix(".base_layer").removesuffix(".base_layer.token_adapter")
        return Key(place.removesuffix(".token_adapter"), "plain", own, 1)
    return Key(module, "plain", own)


def beside(key: Key) -> list[Key]:
    """What a plain key says if a part of its name is PEFT's for a module saved whole.

    Several, where the adapter's name may stand between; the first whose module exists counts.
    """
    found = _ASIDE.fullmatch(key.module) if key.role == "plain" and key.depth == 0 else None
    if found is None:
        return []
    role = "base" if found["kind"] == "original_module" else "plain"
    parts = found["rest"].split(".") if found["rest"] else []
    rests = [parts] if role == "base" else [parts, parts[1:]][: 1 + bool(parts)]
    return [Key(".".join([found["module"], *rest]), role, key.part) for rest in rests]


def without_prefix(keys: Iterable[str], names: Container[str]) -> dict[str, str]:
    """{key as the model would have it: key in the file}.

    The prefix is taken off where it is, unless the model itself has a module "base_model.model".
    """
    prefix = "" if PREFIX[:-1] in names else PREFIX
    return {without_outer_wrappers(key, prefix).removeprefix(prefix): key for key in keys}
