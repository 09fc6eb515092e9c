"""A small random model of any transformers class, by making its configuration small.

Every size that a configuration names is set by its name, and everything else stays at the class's
default.  So a class is one line here, where tests/prefix_families.py spells out each of its sizes.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WINDOW = 97, 8
NAMED = {
    32: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size word_embed_proj_dim",
    48: "intermediate_size ffn_dim d_ff n_inner hidden_dim encoder_ffn_dim decoder_ffn_dim",
    3: "num_hidden_layers n_layer n_layers",
    2: "encoder_layers decoder_layers num_decoder_layers num_layers num_key_value_heads "
    "num_experts_per_tok type_vocab_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads num_experts "
    "decoder_attention_heads rotary_dim num_local_experts n_routed_experts",
    8: "head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim num_mel_bins",
    16: "q_lora_rank kv_lora_rank max_source_positions",
    24: "moe_intermediate_size shared_expert_intermediate_size",
    1: "n_group topk_group first_k_dense_replace n_shared_experts",
    128: "max_position_embeddings n_positions n_ctx max_sequence_length max_target_positions",
    VOCABULARY: "vocab_size",
}  # fmt: skip
SMALL: dict[str, Any] = {name: size for size, names in NAMED.items() for name in names.split()}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SMALL |= {"image_size": 32, "patch_size": 8}
SMALL |= {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
LARGEST = 300_000_000  # parameters: 1.2 GB, seconds to fill
# settings that belong together, or that no default makes small
SETTINGS: dict[str, dict[str, Any]] = {
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "XmodConfig": {"default_language": "en_XX"},
    "ReformerConfig": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "EsmcConfig": {"num_key_value_heads": 4},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "Mamba2Config": {"head_dim": 16, "n_groups": 1},
    "BambaConfig": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "GraniteMoeHybridConfig": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention", "mamba"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv"]},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 1},
    # the last layer takes the keys and values of the one before
    "Gemma4TextConfig": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "LongcatFlashConfig": {"head_dim": 8, "moe_topk": 2, "zero_expert_num": 2},
    "Llama4TextConfig": {"attention_chunk_size": 7},
    "Zamba2Config": {"layers_block_type": ["mamba", "hybrid", "mamba"]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
ROLES = ("is_decoder", "add_cross_attention")  # that a part has in its model
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")


class TooLarge(ValueError):
    """A model that cannot be made small by the names of its sizes."""


def small_config(config: Any, **settings: Any) -> Any:
    """A small configuration of this class (or of the class of this name), with all its parts."""
    import transformers

    kind = getattr(transformers, config) if isinstance(config, str) else config
    usual = kind()
    takes = {*usual.to_dict(), *inspect.signature(kind.__init__).parameters}
    sizes = {name: size for name, size in SMALL.items() if name in takes}
    sizes |= {n: WINDOW for n in WINDOWS if n in takes and type(getattr(usual, n, None)) is int}
    if "qk_rope_head_dim" in takes:  # the size of a head is a sum of two, and heads have own keys
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    kinds = list(dict.fromkeys(getattr(usual, "layer_types", None) or ()))
    if kinds and {"layer_types", "num_hidden_layers"} <= takes:
        layers = sizes["num_hidden_layers"] = max(sizes["num_hidden_layers"], len(kinds))
        sizes["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    for part in kind.sub_configs:  # of a text, of images, of sounds
        if (own := getattr(usual, part, None)) is not None:
            roles = {name: True for name in ROLES if getattr(own, name, False)}
            sizes[part] = small_config(type(own), **roles)
    return kind(**sizes | SETTINGS.get(kind.__name__, {}) | settings)


def build(config: str, model: str, **settings: Any) -> nn.Module:
    """A model whose outputs depend on everything: initial weights, and noise over them.

    Raises:
        TooLarge: it has sizes that no name here makes small.
    """
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, model)
    small = small_config(getattr(kind, "config_class", None) or config, **settings)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(small)).parameters())
    if size > LARGEST:
        raise TooLarge(f"{size / 1e6:,.0f} million parameters are left")
    built: nn.Module = kind(small)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.02))
    return built.eval()


def image() -> dict[str, Tensor]:
    """Two images."""
    draw = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=draw)}


def mel() -> dict[str, Tensor]:
    """Two spectra, and ids of a decoder."""
    draw = torch.Generator().manual_seed(2)
    return {
        "input_features": torch.randn(2, 8, 32, generator=draw),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 5), generator=draw),
    }


def wave() -> dict[str, Tensor]:
    """Two sounds."""
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(2))}
