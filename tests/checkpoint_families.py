"""Small random models of transformers' families whose 4-bit checkpoints are read and written.

A family is a configuration class, a model class, sizes, and the inputs of one forward.  Sizes are
multiples of the block of 64 in most layers, and not in some (the MLP's 96).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WITHOUT_GROUPS = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
GPT = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = SIZES | {
    "moe_intermediate_size": 64, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "head_dim": 16,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2,
    "num_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip


class Family(NamedTuple):
    """How to build one: names of transformers' classes and what the config gets."""

    config: str
    model: str
    sizes: Mapping[str, Any]
    inputs: str = "text"


def text() -> dict[str, Tensor]:
    """Ids that are no special tokens."""
    return {"input_ids": torch.arange(10, 19).view(1, -1)}


def both() -> dict[str, Tensor]:
    """Ids for an encoder and for a decoder."""
    return {**text(), "decoder_input_ids": torch.arange(20, 25).view(1, -1)}


def image() -> dict[str, Tensor]:
    """One small image."""
    return {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)}


def clip() -> dict[str, Tensor]:
    """A text and an image."""
    return {**text(), **image()}


def mel() -> dict[str, Tensor]:
    """Spectrogram features and ids for a decoder."""
    return {
        "input_features": torch.linspace(-1, 1, 8 * 40).view(1, 8, 40),
        "decoder_input_ids": torch.arange(20, 25).view(1, -1),
    }


def wave() -> dict[str, Tensor]:
    """Samples of sound."""
    return {"input_values": torch.linspace(-1, 1, 800).view(1, -1)}


INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "text": text, "both": both, "image": image, "clip": clip, "mel": mel, "wave": wave,
}  # fmt: skip


def _causal(name: str, sizes: Mapping[str, Any] = SIZES, **more: Any) -> Family:
    return Family(f"{name}Config", f"{name}ForCausalLM", {**sizes, **more})


def _encoder(name: str, task: str = "TokenClassification", **more: Any) -> Family:
    return Family(f"{name}Config", f"{name}For{task}", {**WITHOUT_GROUPS, **more})


def _image(name: str, **more: Any) -> Family:
    return Family(f"{name}Config", f"{name}ForImageClassification", {**VISION, **more}, "image")


LLAMA = {"model_type": "llama", **SIZES}

FAMILIES = {
    # dense decoders
    "LLaMA": _causal("Llama"),
    "LLaMA, tied": _causal("Llama", tie_word_embeddings=True),
    "Mistral": _causal("Mistral"),
    "Qwen2": _causal("Qwen2"),
    "Qwen3": _causal("Qwen3", head_dim=16),
    "Gemma": _causal("Gemma", head_dim=16),
    "Gemma 2": _causal("Gemma2", head_dim=16),
    "Gemma 3, text": Family("Gemma3TextConfig", "Gemma3ForCausalLM", SIZES | {"head_dim": 16}),
    "Phi": _causal("Phi"),
    "Phi-3": _causal("Phi3"),
    "StableLM": _causal("StableLm"),
    "OLMo": _causal("Olmo"),
    "OLMo 2": _causal("Olmo2"),
    "Cohere": _causal("Cohere"),
    "Granite": _causal("Granite"),
    "GLM": _causal("Glm", head_dim=16),
    "GLM-4": _causal("Glm4", head_dim=16),
    "StarCoder 2": _causal("Starcoder2"),
    "Nemotron": _causal("Nemotron"),
    "SmolLM3": _causal("SmolLM3"),
    "GPT-2": Family("GPT2Config", "GPT2LMHeadModel", GPT),
    "GPT-Neo": _causal("GPTNeo", {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
        "window_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "GPT-NeoX": _causal("GPTNeoX", WITHOUT_GROUPS),
    "GPT-J": _causal("GPTJ", GPT, rotary_dim=8),
    "GPTBigCode": _causal("GPTBigCode", GPT),
    "CodeGen": _causal("CodeGen", GPT, rotary_dim=8, n_ctx=64),
    "OPT": _causal("OPT", {
        "vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "BLOOM": Family("BloomConfig", "BloomForCausalLM", {
        "vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "Falcon": _causal("Falcon", {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "MPT": _causal("Mpt", {
        "vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "XGLM": _causal("XGLM", {
        "vocab_size": VOCABULARY, "d_model": 64, "ffn_dim": 96, "num_layers": 2,
        "attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    # mixtures of experts
    "Mixtral": _causal("Mixtral", MOE),
    "Qwen2-MoE": _causal("Qwen2Moe", MOE, shared_expert_intermediate_size=64),
    "Qwen3-MoE": _causal("Qwen3Moe", MOE),
    "OLMoE": _causal("Olmoe", MOE),
    "GraniteMoE": _causal("GraniteMoe", MOE),
    "PhiMoE": _causal("Phimoe", MOE),
    "DeepSeek-V2": _causal("DeepseekV2", MOE | MLA, topk_method="greedy"),
    "DeepSeek-V3": _causal("DeepseekV3", MOE | MLA),
    "dots.llm1": _causal("Dots1", MOE | MLA),
    "GLM-4-MoE": _causal("Glm4Moe", MOE | MLA),
    "ERNIE-4.5-MoE": _causal("Ernie4_5_Moe", MOE, moe_num_experts=4, moe_k=2),
    "gpt-oss": _causal("GptOss", MOE),
    "Switch": Family("SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration",
                     T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1,
                           "num_sparse_decoder_layers": 1}, "both"),
    # hybrids
    "Jamba": _causal("Jamba", MOE, attn_layer_period=2, attn_layer_offset=1,
                     expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8,
                     use_mamba_kernels=False),
    "Bamba": _causal("Bamba", SIZES, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16,
                     mamba_d_state=8, mamba_n_groups=1),
    "Falcon-H1": _causal("FalconH1", SIZES, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16,
                         mamba_d_state=8, head_dim=16),
    "RecurrentGemma": _causal("RecurrentGemma", SIZES, lru_width=64, attention_window_size=16,
                              block_types=["recurrent", "attention"]),
    "LFM2": _causal("Lfm2", SIZES, layer_types=["conv", "full_attention"]),
    "Qwen3-Next": _causal("Qwen3Next", MOE, layer_types=["linear_attention", "full_attention"],
                          linear_num_key_heads=2, linear_num_value_heads=4,
                          linear_key_head_dim=16, linear_value_head_dim=16,
                          shared_expert_intermediate_size=64),
    # encoder-decoders
    "T5": Family("T5Config", "T5ForConditionalGeneration", T5, "both"),
    "mT5": Family("MT5Config", "MT5ForConditionalGeneration", T5, "both"),
    "UMT5": Family("UMT5Config", "UMT5ForConditionalGeneration", T5, "both"),
    "LongT5": Family("LongT5Config", "LongT5ForConditionalGeneration", T5, "both"),
    "BART": Family("BartConfig", "BartForConditionalGeneration", BART, "both"),
    "mBART": Family("MBartConfig", "MBartForConditionalGeneration", BART, "both"),
    "Pegasus": Family("PegasusConfig", "PegasusForConditionalGeneration", BART, "both"),
    "Marian": Family("MarianConfig", "MarianMTModel", BART, "both"),
    "M2M-100": Family("M2M100Config", "M2M100ForConditionalGeneration", BART, "both"),
    "Whisper": Family("WhisperConfig", "WhisperForConditionalGeneration",
                      BART | {"num_mel_bins": 8, "max_source_positions": 20,
                              "max_target_positions": 64}, "mel"),
    # encoders
    "BERT": _encoder("Bert"),
    "RoBERTa": _encoder("Roberta", max_position_embeddings=66),
    "XLM-RoBERTa": _encoder("XLMRoberta", max_position_embeddings=66),
    "ELECTRA": _encoder("Electra", embedding_size=64),
    "ALBERT": _encoder("Albert", embedding_size=32),
    "DistilBERT": Family("DistilBertConfig", "DistilBertForTokenClassification", {
        "vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4,
        "max_position_embeddings": 64,
    }),
    "DeBERTa-v2": _encoder("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "MPNet": _encoder("MPNet", max_position_embeddings=66),
    "ModernBERT": _encoder("ModernBert", cls_token_id=1, sep_token_id=2),
    "ESM": _encoder("Esm", position_embedding_type="rotary", mask_token_id=5),
    "ViT": _image("ViT"),
    "DeiT": _image("DeiT"),
    "BEiT": _image("Beit"),
    "DINOv2": _image("Dinov2"),
    "DINOv2, SwiGLU": _image("Dinov2", use_swiglu_ffn=True),
    "Swin": Family("SwinConfig", "SwinForImageClassification", {
        "image_size": 32, "patch_size": 4, "embed_dim": 64, "depths": [1, 1], "num_heads": [2, 4],
        "window_size": 4,
    }, "image"),
    "wav2vec2": Family("Wav2Vec2Config", "Wav2Vec2ForCTC", {
        **WITHOUT_GROUPS, "conv_dim": [64, 64], "conv_stride": [5, 2], "conv_kernel": [10, 3],
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }, "wave"),
    # several modalities
    "CLIP": Family("CLIPConfig", "CLIPModel", {
        "text_config": WITHOUT_GROUPS, "vision_config": VISION, "projection_dim": 64,
    }, "clip"),
    "SigLIP": Family("SiglipConfig", "SiglipModel", {
        "text_config": WITHOUT_GROUPS | {"projection_size": 64}, "vision_config": VISION,
    }, "clip"),
    "LLaVA": Family("LlavaConfig", "LlavaForConditionalGeneration", {
        "text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_id": 100,
    }),
    "LLaVA-NeXT": Family("LlavaNextConfig", "LlavaNextForConditionalGeneration", {
        "text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_id": 100,
    }),
    "PaliGemma": Family("PaliGemmaConfig", "PaliGemmaForConditionalGeneration", {
        "text_config": {"model_type": "gemma", **SIZES, "head_dim": 16},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "projection_dim": 64},
        "image_token_id": 100, "projection_dim": 64,
    }),
    "Gemma 3": Family("Gemma3Config", "Gemma3ForConditionalGeneration", {
        "text_config": {**SIZES, "head_dim": 16}, "vision_config": VISION,
        "mm_tokens_per_image": 4, "image_token_index": 100, "boi_token_index": 101,
        "eoi_token_index": 102,
    }),
    "Qwen2-VL": Family("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", {
        "text_config": {**SIZES, "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
        "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4,
                          "mlp_ratio": 2, "patch_size": 4},
        "image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102,
        "vision_end_token_id": 103,
    }),
    "Qwen2.5-VL": Family("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", {
        "text_config": {**SIZES, "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
        "vision_config": {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 4,
                          "intermediate_size": 96, "patch_size": 4, "window_size": 16,
                          "fullatt_block_indexes": [1]},
        "image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102,
        "vision_end_token_id": 103,
    }),
    "Qwen3-VL-MoE": Family("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration", {
        "text_config": {**MOE, "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
        "vision_config": {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 4,
                          "intermediate_size": 96, "patch_size": 4, "num_position_embeddings": 16,
                          "deepstack_visual_indexes": [0]},
        "image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102,
        "vision_end_token_id": 103,
    }),
    "InternVL": Family("InternVLConfig", "InternVLForConditionalGeneration", {
        "text_config": {"model_type": "qwen2", **SIZES},
        "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [16, 16]},
        "image_token_id": 100,
    }),
    "Idefics 3": Family("Idefics3Config", "Idefics3ForConditionalGeneration", {
        "text_config": LLAMA, "vision_config": VISION, "image_token_id": 100, "scale_factor": 2,
    }),
}  # fmt: skip


def build(family: str, *, seed: int = 0) -> nn.Module:
    """The model in eval mode, in float32, with values in every parameter that tell it from others.

    Mixtures of experts index their weights one expert at a time.
    """
    import transformers

    found = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, found.config)(**found.sizes)
    model: Any = getattr(transformers, found.model)(config).eval()
    with torch.no_grad():
        seen: set[int] = set()
        for parameter in model.parameters():
            if id(parameter) not in seen and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            seen.add(id(parameter))
    return eager(model)


def eager(model: nn.Module) -> nn.Module:
    """The model with experts that are indexed one at a time."""
    if callable(change := getattr(model, "set_experts_implementation", None)):
        change("eager")
    return model


def outputs(model: nn.Module, family: str) -> Tensor:
    """The logits (of CLIP and its kind: the similarities) of one forward."""
    with torch.no_grad():
        found: Any = model(**INPUTS[FAMILIES[family].inputs]())
    for name in ("logits", "logits_per_image"):
        if name in found:
            value: Tensor = found[name]
            return value
    raise ValueError(f"{family}: no logits among {list(found)}")
