"""PEFT's keywords and ours: the error for an unknown keyword names the one to use."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from minipeft.lora import Options

P = ParamSpec("P")
R = TypeVar("R")

OURS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target",
    "exclude_modules": "exclude",
    "use_rslora": "rank_stabilized",
    "use_dora": "dora",
    "init_lora_weights": "init, a function such as minipeft.starts.gaussian()",
    "rank_pattern": "rank, a dict from patterns to numbers",
    "alpha_pattern": "alpha, a dict from patterns to numbers",
    "target_parameters": "target, which takes the names of 3-D weights too",
    "layers_to_transform": "target, a regular expression with the layers' numbers",
    "layers_pattern": "target, a regular expression with the layers' names",
    "adapter_name": "name",
    "bias": "minipeft.train_biases(model, mode) afterwards",
    "modules_to_save": "minipeft.train_modules(model, names) afterwards",
    "trainable_token_indices": "minipeft.train_tokens(model, ids) afterwards",
    "ensure_weight_tying": "minipeft.tie_heads(model) afterwards",
    "peft_config": "the keywords themselves (target, rank, alpha, ...)",
    "task_type": "nothing: it is not needed",
    "inference_mode": "nothing: call model.eval()",
    "fan_in_fan_out": "nothing: Conv1D is known by its class",
    "num_virtual_tokens": "prefix_length (minipeft.attach_prefix)",
}


class LayerOptions(Options, total=False):
    """Keywords that `inject_lora` and `inject_qlora` pass on to the layers that they make."""

    init: Callable[[Any], None] | None
    dora: bool  # chooses DoRA layers
    across_groups: bool  # of LoRAConv


def in_our_words(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: a keyword that the function does not take raises a TypeError that names ours.

    For functions that pass further keywords on to LoRA layers.
    """
    own = inspect.signature(function).parameters.values()
    named = [p.name for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [*named, *LayerOptions.__annotations__]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for word in kwargs:
            if word not in known:
                raise TypeError(f"{function.__name__}: no keyword {word!r}; {_hint(word, known)}")
        return function(*args, **kwargs)

    return checked


def _hint(word: str, known: list[str]) -> str:
    if word in OURS:
        return f"PEFT's {word} is here {OURS[word]}"
    close = difflib.get_close_matches(word, [*known, *OURS], n=1)
    guess = f"did you mean {OURS.get(close[0], close[0])}? " if close else ""
    return f"{guess}it takes {', '.join(known)}"
