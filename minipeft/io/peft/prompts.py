"""PEFT's prompt-learning adapters: prefix and prompt tuning, P-tuning and cartridges, both ways.

Source: PEFT 0.21.  All store one tensor `prompt_embeddings`: prefix tuning and cartridges the flat
table (tokens, layers * 2 * token_dim), the others (tokens, token_dim).  PEFT folds networks (an
MLP, or P-tuning's LSTM) into it, so a P-tuning file is read as the table of a prompt.  A cartridge
is a prefix of which the first `num_frozen_tokens` positions do not train.
PEFT counts a prefix as tokens: it shifts positions, and a sliding window leaves it behind.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.integrations.transformers.attach import attach
from minipeft.integrations.transformers.prefixes import NAME, Prefix
from minipeft.integrations.transformers.prompt_runs import RunPrompt
from minipeft.io.fields import NAMES, ORIGIN, Kind, check, is_off, one_of, optional, whole
from minipeft.io.heads import (
    Heads,
    by_module,
    check_heads,
    fill_heads,
    head_tensors,
    task_heads,
)
from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME
from minipeft.io.peft.folder import read_weights
from minipeft.io.peft.keys import PREFIX
from minipeft.io.prefixes.load import check_prompt_size, encoder_of_table
from minipeft.io.prefixes.save import has_more_than_prefix, prefix_of
from minipeft.layers.prompt import PromptEmbedding, PromptEncoder
from minipeft.prefix import PrefixEncoder

_KEY, _HEAD = "prompt_embeddings", "base_model."
_SIZE = whole(1, 2**24)
# Fields that are known.  Only those in _FIELDS are used: the tensor holds what the rest produced.
_OF_ALL = ORIGIN | {
    "peft_type", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers",
    "num_transformer_submodules", "modules_to_save",
}  # fmt: skip
_KNOWN = _OF_ALL | {
    "encoder_hidden_size", "prefix_projection", "init_weights",
    "encoder_dropout", "encoder_num_layers", "encoder_reparameterization_type",
    "prompt_tuning_init", "prompt_tuning_init_text", "prompt_tuning_init_state_dict_path",
    "tokenizer_name_or_path", "tokenizer_kwargs",
}  # fmt: skip
_CARTRIDGE, _FROZEN = "CARTRIDGE", "num_frozen_tokens"
_KNOWN_OF_CARTRIDGES = _OF_ALL | {_FROZEN}
_FROZEN_UNLESS_SAID = 1  # PEFT's default

_FIELDS = {
    "num_virtual_tokens": _SIZE,
    "num_layers": optional(_SIZE),
    "num_attention_heads": optional(_SIZE),
    "num_transformer_submodules": optional(one_of(1, 2)),
    "modules_to_save": optional(NAMES),
    _FROZEN: whole(0),
}
_TRAINING = {"dropout": Kind("a fraction", lambda v: type(v) is float), "frozen": whole(0)}


def load_prompts(
    model: Any, directory: Path, content: Mapping[str, Any], name: str, *, strict: bool
) -> tuple[list[str], list[str]]:
    """Attach the adapter of a directory; `content` is its configuration's, of a prompt's kind.

    Returns the names of the modules that it is in, and the keys that belong to no module.

    Raises:
        ValueError: a file missing or damaged, an adapter of another model, an encoder-decoder.
            The model is then as it was.
    """
    known = _KNOWN_OF_CARTRIDGES if content["peft_type"] == _CARTRIDGE else _KNOWN
    for key, value in content.items():
        if key not in known and not is_off(value):
            raise ValueError(f"{CONFIG_NAME}: {key:.40} = {value!r:.40} is no field known here")
    check(CONFIG_NAME, content, _FIELDS, needed=("num_virtual_tokens",))
    config = {"modules_to_save": None, **content}
    length = config["num_virtual_tokens"]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"load_peft: PEFT counts a prefix of an encoder-decoder as tokens of the decoder; on "
            f"{type(model).__name__} that cannot be said by attach_prefix"
        )
    where = directory / WEIGHTS_NAME
    tensors, training = read_weights(directory, config)
    settings = _how_it_trains(config, training.get("prefix", {}), where)
    table = tensors.pop(_KEY, None)
    if table is None or table.dim() != 2 or not table.is_floating_point():
        raise ValueError(f"{where}: no floating-point {_KEY!r} of two dimensions")
    if len(table) != length:
        raise ValueError(f"{where}: {len(table)} rows; {CONFIG_NAME} says {length}")
    heads, unexpected = _heads_in(model, tensors, config["modules_to_save"] or [], where)
    if strict and unexpected:
        raise ValueError(f"{where}: unexpected {unexpected[0]!r:.80} ({len(unexpected)} in all)")
    modules = check_heads("load_peft", model, heads)
    deep = config["peft_type"] in ("PREFIX_TUNING", _CARTRIDGE)

    def make(prefix: Prefix) -> nn.Module:
        if prefix.has_windows and prefix.causal and prefix.window != "like_token":
            raise ValueError(
                "load_peft: PEFT's prefix is left behind by a sliding window; the model's "
                "first prefix is not (window='always')"
            )
        if deep:
            _check_layers(config, prefix, model)
            return encoder_of_table(where, prefix, table, **settings)
        check_prompt_size(where, prefix, table.shape[1])
        source = PromptEmbedding(length, table.shape[1])
        source.load_table(table.float())
        return RunPrompt(source)

    attach(
        model, length, make, caller="load_peft", name=name, position="shift",
        window_if_sliding="like_token", train_head=modules,
    )  # fmt: skip
    fill_heads(model, name, heads)
    return [f"{NAME}.encoders.{name}", *modules], unexpected


def _how_it_trains(config: Mapping[str, Any], settings: Any, where: Path) -> dict[str, Any]:
    """Dropout and frozen positions, as arguments of PrefixEncoder.

    `settings` are of a file of ours; of a cartridge the configuration says how many are frozen.
    """
    kinds = dict(_TRAINING)
    if config["peft_type"] == _CARTRIDGE:
        del kinds["frozen"]
    if not isinstance(settings, dict) or not settings.keys() <= kinds.keys():
        raise ValueError(f"{where}: {settings!r:.80} is not how a prefix trains")
    check(f"{where}: prefix", settings, kinds)
    if config["peft_type"] != _CARTRIDGE:
        return settings
    frozen, length = config.get(_FROZEN, _FROZEN_UNLESS_SAID), config["num_virtual_tokens"]
    if frozen >= length:
        raise ValueError(
            f"{CONFIG_NAME}: {_FROZEN} is {frozen} of num_virtual_tokens {length}; expected fewer, "
            "so that something trains: lower it, it changes no output"
        )
    return {**settings, "frozen": frozen}


def _check_layers(config: Mapping[str, Any], prefix: Prefix, model: nn.Module) -> None:
    """Raise ValueError if the table is of a model of other layers, which may have its width."""
    layers, heads = config.get("num_layers"), config.get("num_attention_heads")
    own = {shape.kv_heads for shape in prefix.kv_shapes}
    if layers not in (None, len(prefix.kv_shapes)) or (heads is not None and {heads} != own):
        raise ValueError(
            f"{CONFIG_NAME}: a prefix of {layers} layers with {heads} key/value heads; "
            f"{type(model).__name__} has {len(prefix.kv_shapes)} with {sorted(own)}"
        )


def _heads_in(
    model: nn.Module, tensors: Mapping[str, Tensor], wanted: list[str], where: Path
) -> tuple[Heads, list[str]]:
    """The tensors of modules by the modules' names, and the names of what the model lacks."""
    modules = dict(model.named_modules())
    plain: dict[str, Tensor] = {}
    for key, value in tensors.items():
        names = (key.removeprefix(prefix) for prefix in (_HEAD, PREFIX, ""))
        bare = key.removeprefix(PREFIX).removeprefix(_HEAD)
        found = next((name for name in names if name.split(".")[0] in modules), bare)
        if found in plain:
            raise ValueError(f"{where}: two keys for {found!r:.80}")
        plain[found] = value
    saved = [m for m in modules if any(m == e or m.endswith(f".{e}") for e in wanted)]
    loose = [name for name in plain if "." not in name]  # of no module
    heads = by_module({n: value for n, value in plain.items() if n not in loose}, saved)
    unknown = [place for place in heads if place not in modules]
    if missing := [m for m in saved if m not in heads and "." not in m and m in wanted]:
        raise ValueError(f"{where}: {CONFIG_NAME} asks for {missing[0]!r}, which has no tensors")
    return {p: own for p, own in heads.items() if p not in unknown}, [*loose, *unknown]


class CannotExpress(ValueError):
    """PEFT's format cannot express this adapter."""


def describe_prompts(
    model: Any, name: str
) -> tuple[dict[str, object], dict[str, Tensor], dict[str, object]]:
    """The configuration, tensors and training settings to write of the prompt called `name`.

    Raises:
        CannotExpress: positions that are not shifted, a prefix that a sliding window does not
            hide, gates, layers of different shapes, an encoder-decoder; LoRA of the same name.
    """
    if has_more_than_prefix(model, name):
        raise CannotExpress(
            f"save_peft: the adapter {name!r} is a prefix and other layers, and PEFT's format "
            "holds one kind: attach the prefix under a name of its own, or write both by "
            "model.save_pretrained, which load_peft and load_prefix read"
        )
    prefix, encoder = prefix_of("save_peft", model, name)

    def refuse(why: str) -> CannotExpress:
        return CannotExpress(
            f"save_peft: {why}, which PEFT's format cannot say; use minipeft.save_prefix"
        )

    if set(prefix.locations) != {"self"}:
        raise refuse(f"a prefix in {sorted(set(prefix.locations))}")
    if prefix.layers is not None:
        raise refuse(f"a prefix in layers {prefix.layers} alone")
    if prefix.position != "shift":
        raise refuse(
            "tokens are not numbered behind the prefix (position='none'; attached with "
            "position='shift' they would be)"
        )
    if prefix.has_windows and prefix.window != "like_token":
        raise refuse("the prefix is seen from outside the sliding window (window='always')")
    task = _task_type(model)
    states = head_tensors(model, name)
    if task in _TASK_HEADS:  # PEFT asks for them whether they train or not
        states = task_heads(model, _TASK_HEADS[task]) | states
    heads = {f"{_HEAD}{place}.{key}": value
             for place, state in states.items() for key, value in state.items()}  # fmt: skip
    text = model.config.get_text_config()
    config: dict[str, object] = {
        "inference_mode": True, "num_layers": len(prefix.kv_shapes),
        "num_transformer_submodules": 1, "num_virtual_tokens": encoder.prefix_length,
        "base_model_name_or_path": getattr(model.config, "name_or_path", None) or None,
        "modules_to_save": sorted(states) or None, "task_type": task,
    }  # fmt: skip
    if isinstance(encoder, PrefixEncoder):
        if encoder.gated:
            raise refuse("a gated prefix")
        if len(set(prefix.kv_shapes)) != 1 or prefix.kv_shapes[0][1] != prefix.kv_shapes[0][2]:
            raise refuse("layers of different shapes")
        kv_heads, size, _ = prefix.kv_shapes[0]
        config |= {"token_dim": kv_heads * size, "num_attention_heads": kv_heads}
        if encoder.frozen:
            config |= {"peft_type": _CARTRIDGE, _FROZEN: encoder.frozen}
        else:
            config |= {
                "peft_type": "PREFIX_TUNING", "encoder_hidden_size": kv_heads * size,
                "prefix_projection": False,
            }  # fmt: skip
        training: dict[str, object] = {}
        if encoder.dropout:
            training = {"prefix": {"dropout": float(encoder.dropout)}}
        return config, {_KEY: encoder.flat().detach(), **heads}, training
    source = encoder.source
    config |= {
        "token_dim": source.embedding_dim, "num_attention_heads": text.num_attention_heads,
    }  # fmt: skip
    if isinstance(source, PromptEncoder):
        config |= {
            "peft_type": "P_TUNING", "encoder_hidden_size": source.hidden,
            "encoder_reparameterization_type": "MLP",
            "encoder_num_layers": 2, "encoder_dropout": 0.0,
        }  # fmt: skip
        source = source.bake()
    else:
        config |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    return config, {_KEY: source.table.detach(), **heads}, {}


_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip


def _task_type(model: nn.Module) -> str:
    """PEFT's name for what the model's class does, by which PEFT chooses how to call it."""
    name = type(model).__name__
    for ending, task in (
        ("SequenceClassification", "SEQ_CLS"), ("TokenClassification", "TOKEN_CLS"),
        ("QuestionAnswering", "QUESTION_ANS"), ("ForCausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
    ):  # fmt: skip
        if name.endswith(ending):
            return task
    return "FEATURE_EXTRACTION"
