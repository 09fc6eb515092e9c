"""The fields of adapter_config.json by what they mean for a reader: computed, passed over, refused.

Source: PEFT 0.21, `LoraConfig`; what other trainers add, from files that people have.
"""

# peft_type: what is read here, LoRA and the prompt-learning kinds
READ_KINDS = ("LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")

COMPUTED = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias", "modules_to_save",
    "target_parameters", "trainable_token_indices", "ensure_weight_tying", "layers_to_transform",
    "layers_pattern", "lora_bias",
}  # fmt: skip
# Fields that change what is computed or saved in ways that no layer here has.  They may be absent
# or hold a value that means "off" (None, False, empty).
MUST_BE_OFF = {
    "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "megatron_config", "monteclora_config", "velora_config", "enable_lora",
}  # fmt: skip
# Fields that say where the adapter comes from, or how it was initialised.
IGNORABLE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Fields of other trainers (Unsloth, ms-swift, PEFT before 0.3, LoRA+) that say how the adapter was
# made or kept, and nothing of what it computes.
HARMLESS = {
    "unsloth_fixed", "unsloth_version", "lora_dtype", "merge_weights", "lorap_lr_ratio",
    "lorap_emb_lr", "loraplus_lr_ratio", "loraplus_lr_embedding", "base_model_class",
    "parent_library", "torch_dtype", "transformers_version", "library_name",
}  # fmt: skip
# Initialisations that rewrite the base: the adapter alone is meaningless on the original base.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")


def is_off(value: object) -> bool:
    """Whether a field with this value is not used."""
    return value is None or value is False or value in ([], {}, "")


def check_fields(config: dict[str, object], where: str, *, strict: bool) -> dict[str, object]:
    """What is read past: other trainers' fields; with strict=False also fields that nobody knows.

    Raises:
        ValueError: another kind of adapter; a field that says what no layer here computes; an
            initialisation that changed the base; with `strict` a field that is not known here.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{where}: peft_type is {kind!r:.80}; read are {', '.join(READ_KINDS)} (other kinds: "
            "load them with PEFT, which can turn some into LoRA)"
        )
    ignored: dict[str, object] = {}
    for key, value in config.items():
        if is_off(value) or key in COMPUTED or key in IGNORABLE:
            continue
        if key in MUST_BE_OFF:
            raise ValueError(f"{where}: {key} = {value!r:.80} is not supported")
        if strict and key not in HARMLESS:
            raise ValueError(
                f"{where}: {key:.80} = {value!r:.80} is no field known here; strict=False reads "
                "past it"
            )
        ignored[key] = value
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        raise ValueError(
            f"{where}: init_lora_weights = {init!r:.80} changed the base weights; convert the "
            "adapter to a plain LoRA where it was made (PEFT: "
            "path_initial_model_for_weight_conversion)"
        )
    return ignored
