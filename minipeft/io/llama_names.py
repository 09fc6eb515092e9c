"""Names of the parts of LLaMA: Hugging Face's by Meta's, and by torchtune's.

`{}` stands for the number of the layer.
"""

import re
from collections.abc import Mapping

_PARTS = {  # Hugging Face's name below its layer: Meta's, torchtune's
    "self_attn.q_proj": ("attention.wq", "attn.q_proj"),
    "self_attn.k_proj": ("attention.wk", "attn.k_proj"),
    "self_attn.v_proj": ("attention.wv", "attn.v_proj"),
    "self_attn.o_proj": ("attention.wo", "attn.output_proj"),
    "mlp.gate_proj": ("feed_forward.w1", "mlp.w1"),
    "mlp.down_proj": ("feed_forward.w2", "mlp.w2"),
    "mlp.up_proj": ("feed_forward.w3", "mlp.w3"),
}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
_ENDS = {"model.embed_tokens": "tok_embeddings", "lm_head": "output"}
META = {f"layers.{{}}.{meta}": f"model.layers.{{}}.{own}" for own, (meta, _) in _PARTS.items()}
META |= {f"layers.{{}}.{meta}": f"model.layers.{{}}.{own}" for own, meta in _NORMS.items()}
META |= {meta: own for own, meta in _ENDS.items()} | {"norm": "model.norm"}
TORCHTUNE = {f"layers.{{}}.{tune}": f"model.layers.{{}}.{own}" for own, (_, tune) in _PARTS.items()}
TORCHTUNE |= {tune: own for own, tune in _ENDS.items()}
ROTATED = ("q_proj", "k_proj")  # whose rows rotary positions turn


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """The name of the same part in the other naming; None if the table has none."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    found = table.get(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name))
    return found.format(*numbers) if found is not None else None


def is_rotated(name: str) -> bool:
    """Whether a projection of Hugging Face's LLaMA is a query's or a key's."""
    return name.rpartition(".")[2] in ROTATED
