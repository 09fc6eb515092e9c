"""What callers write in the words of other libraries: the error says which to use here.

A keyword that a function does not take; a dtype as a string; for `init=` the name of a start, or
its maker that was not called.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, get_args

import torch

from minipeft import starts
from minipeft.lora import Options

P = ParamSpec("P")
R = TypeVar("R")

# Several answers: the first whose keyword the function takes, or that is no keyword.
OURS: dict[str, str | tuple[str, ...]] = {
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
    "layers_to_transform": ("target, a regular expression with the layers' numbers", "layers"),
    "layers_pattern": "target, a regular expression with the layers' names",
    "adapter_name": ("name", "new_name", "minipeft.use_adapters(model, name) beforehand"),
    "adapter_names": ("names", "minipeft.use_adapters(model, names) beforehand"),
    "bias": "minipeft.train_biases(model, mode) afterwards",
    "modules_to_save": "minipeft.train_modules(model, names) afterwards",
    "trainable_token_indices": "minipeft.train_tokens(model, ids) afterwards",
    "ensure_weight_tying": "minipeft.tie_heads(model) afterwards",
    "peft_config": "the keywords themselves (target, rank, alpha, ...)",
    "task_type": "nothing: it is not needed",
    "inference_mode": "nothing: call model.eval()",
    "fan_in_fan_out": "nothing: Conv1D is known by its class",
    "is_trainable": "nothing: what is loaded or put in is trainable",
    "num_virtual_tokens": (
        "prefix_length", "prompt_length", "minipeft.attach_prefix(model, prefix_length)"
    ),
    "encoder_hidden_size": "hidden",
    "prefix_projection": "hidden, the size of the MLP",
    "encoder_reparameterization_type": "kind",
    "prompt_tuning_init": "init",
    "prompt_tuning_init_text": "init, the token ids of the text",
    "model_id": "path",
    "save_directory": "path",
    "selected_adapters": "name",
    "adapters": "names",
    "combination_type": "method",
}  # fmt: skip
BITSANDBYTES = {
    "blocksize": "block_size",
    "load_in_4bit": "nothing: layers become 4-bit by this call",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_use_double_quant": "double_quant",
    "compress_statistics": "double_quant",
    "bnb_4bit_quant_type": "nothing: it is NF4",
    "quant_type": "nothing: it is NF4",
    "llm_int8_skip_modules": "skip",
}
# a word of ours, where a function does not take it
_OWN = {"name": "minipeft.use_adapters(model, name) beforehand"}
_LIBRARIES: dict[str, Mapping[str, str | tuple[str, ...]]] = {
    "PEFT's ": OURS,
    "bitsandbytes' ": BITSANDBYTES,
    "": _OWN,
}


class LayerOptions(Options, total=False):
    """Keywords that `inject_lora` and `inject_qlora` pass on to the layers that they make."""

    init: Callable[[Any], None] | None
    dora: bool  # chooses DoRA layers
    across_groups: bool  # of LoRAConv


def in_our_words(function: Callable[P, R], caller: str = "") -> Callable[P, R]:
    """Decorator: a keyword that the function does not take raises a TypeError that names ours.

    So do a dtype that is a string, and an `init=` of LoRA layers that is no function of a layer.
    What the function takes are its arguments, and the keys of a TypedDict that `**keywords` unpack.
    """
    caller = caller or function.__name__
    known: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            known += [
                key for kind in get_args(parameter.annotation) for key in kind.__annotations__
            ]
        elif parameter.name != "self":
            known.append(parameter.name)
    starts_factors = {"rank", "init"} <= set(known)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for word, value in kwargs.items():
            if word not in known:
                raise TypeError(f"{caller}: no keyword {word!r}; {_hint(word, known)}")
            if word.endswith("dtype") and not isinstance(value, torch.dtype | None):
                raise TypeError(f"{caller}: {word}={value!r}; expected a torch.dtype")
        if starts_factors:
            _check_start(caller, kwargs.get("init"))
        return function(*args, **kwargs)

    return checked


def teach(*kinds: type) -> None:
    """Let the constructors of these classes answer as `in_our_words` does."""
    for kind in kinds:
        kind.__init__ = in_our_words(kind.__init__, kind.__name__)  # type: ignore[misc]


def _hint(word: str, known: list[str]) -> str:
    for library, words in _LIBRARIES.items():
        answers = words.get(word, ())
        for ours in (answers,) if isinstance(answers, str) else answers:
            keyword = ours.partition(",")[0]
            if keyword in known or not keyword.isidentifier():
                return f"{library}{word} is here {ours}"
    theirs = [key for key in OURS if OURS[key] in known]
    close = difflib.get_close_matches(word, [*known, *theirs], n=1)
    guess = f"did you mean {OURS.get(close[0], close[0])}? " if close else ""
    return f"{guess}it takes {', '.join(known)}"


def _check_start(caller: str, init: object) -> None:
    """Raise TypeError unless this is a function of a layer, and none that makes such functions."""
    said = init if isinstance(init, str) else getattr(init, "__name__", "")
    name = next((start for start in starts.__all__ if said.startswith(start)), None)
    is_maker = name is not None and init is getattr(starts, name)
    if init is None or (callable(init) and not is_maker):
        return
    how = f"call it: init=minipeft.starts.{name}()"
    if name is None:
        how = f"starts are made by a call, of {starts.__all__}: init=minipeft.starts.pissa()"
    elif name == starts.eva.__name__:
        how = "it runs after injecting: minipeft.starts.eva(model, batches)"
    raise TypeError(f"{caller}: init={init!r:.60}; expected a function of the layer; {how}")
