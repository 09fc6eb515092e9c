"""Small random models of transformers' real classes: one for each architecture of the matrix."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
WITHOUT_GROUPS = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
ENCODER = {name: size for name, size in WITHOUT_GROUPS.items() if "token_id" not in name}
GPT = {
    "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
FALCON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
DROPOUT = {
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0, "dropout": 0.0,
    "attention_probs_dropout_prob": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "activation_dropout": 0.0, "dropout_rate": 0.0, "layerdrop": 0.0, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "classifier_dropout": 0.0, "embedding_dropout": 0.0,
    "mlp_dropout": 0.0, "resid_dropout": 0.0,
}  # fmt: skip


class Family(NamedTuple):
    """How to build one: names of transformers' classes and what the config gets."""

    kind: str  # "decoder", "encoder" or "encoder-decoder"
    config: str
    model: str
    sizes: Mapping[str, Any]
    window: int | None = None  # of layers with sliding-window attention


def _causal(name: str, sizes: Mapping[str, Any], window: int | None = None) -> Family:
    return Family("decoder", f"{name}Config", f"{name}ForCausalLM", sizes, window)


FAMILIES = {
    "LLaMA": _causal("Llama", SIZES),
    "Mistral": _causal("Mistral", SIZES | {"sliding_window": None}),
    "Mistral, window": _causal("Mistral", SIZES | {"sliding_window": 8}, 8),
    "Qwen2": _causal("Qwen2", SIZES),
    "Qwen3": _causal("Qwen3", SIZES | {"head_dim": 16}),
    "Gemma": _causal("Gemma", SIZES | {"head_dim": 16}),
    "Gemma2, window": _causal("Gemma2", SIZES | {"head_dim": 16, "sliding_window": 8}, 8),
    "Gemma3, window": Family(
        "decoder", "Gemma3TextConfig", "Gemma3ForCausalLM",
        SIZES | {"head_dim": 16, "sliding_window": 8,
                 "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, 8,
    ),
    "Llama4, chunks": Family(
        "decoder", "Llama4TextConfig", "Llama4ForCausalLM",
        SIZES | {"head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 2,
                 "num_experts_per_tok": 1, "moe_layers": [], "attention_chunk_size": 8,
                 "no_rope_layers": [1, 0, 1]}, 8,
    ),
    "GLM": _causal("Glm", SIZES | {"head_dim": 16}),
    "GLM-4": _causal("Glm4", SIZES | {"head_dim": 16}),
    "GPT-2": Family("decoder", "GPT2Config", "GPT2LMHeadModel", GPT),
    "GPT-NeoX": _causal("GPTNeoX", WITHOUT_GROUPS),
    "OPT": _causal("OPT", {
        "vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }),
    "GPT-J": _causal("GPTJ", GPT | {"rotary_dim": 4}),
    "CodeGen": _causal("CodeGen", GPT | {"rotary_dim": 4, "n_ctx": 64}),
    "Falcon, 7B kind": _causal("Falcon", FALCON | {"multi_query": True}),
    "Falcon, 40B kind": _causal("Falcon", FALCON | {
        "new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False,
    }),
    "Falcon, ALiBi": _causal("Falcon", FALCON | {
        "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True,
    }),
    "BLOOM": Family("decoder", "BloomConfig", "BloomForCausalLM", {
        "vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }),
    "MPT": Family("decoder", "MptConfig", "MptForCausalLM", {
        "vocab_size": 97, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }),
    "BERT": Family("encoder", "BertConfig", "BertForTokenClassification", ENCODER),
    "RoBERTa": Family("encoder", "RobertaConfig", "RobertaForTokenClassification",
                      ENCODER | {"pad_token_id": 0, "max_position_embeddings": 65}),
    "ELECTRA": Family("encoder", "ElectraConfig", "ElectraForTokenClassification",
                      ENCODER | {"embedding_size": 32}),
    "DistilBERT": Family("encoder", "DistilBertConfig", "DistilBertForTokenClassification", {
        "vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4,
        "max_position_embeddings": 64,
    }),
    "ModernBERT, window": Family(
        "encoder", "ModernBertConfig", "ModernBertForTokenClassification",
        ENCODER | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
                   "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 8}, 4,
    ),
    "T5": Family("encoder-decoder", "T5Config", "T5ForConditionalGeneration", {
        "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
        "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None,
    }),
    "BART": Family("encoder-decoder", "BartConfig", "BartForConditionalGeneration", {
        "vocab_size": 97, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    }),
}  # fmt: skip


def build(family: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """The model, in eval mode, without dropout, its weights far enough from 0 to tell texts apart.

    T5's relative bias and BART's positions are set to 0: a prefix has neither, and without them it
    can be compared with tokens.
    """
    import transformers

    found = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, found.config)(**{**found.sizes, **changes})
    for name, value in DROPOUT.items():
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, value)
    model: nn.Module = getattr(transformers, found.model)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            if "relative_attention_bias" in name or (
                found.kind == "encoder-decoder" and "embed_positions" in name
            ):
                parameter.zero_()
    return model
