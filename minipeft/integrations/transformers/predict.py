"""predict_memory: what a training step will need, without a weight and without the devices.

The model is copied to the meta device, put into the state that the method trains, and two training
steps run on it.  Nothing is computed there; what would be alive is counted (model/predict/live.py).
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapters.targets import Head, Target
from minipeft.fast.backend import tried_first
from minipeft.inject import freeze
from minipeft.integrations.transformers import attention, probe
from minipeft.integrations.transformers.meta import model_of
from minipeft.integrations.transformers.no_values import PlainText
from minipeft.integrations.transformers.prefixes import NAME, Prefix
from minipeft.model.peft_words import in_our_words
from minipeft.model.predict.devices import Device, per_device
from minipeft.model.predict.meta_copy import meta_copy
from minipeft.model.predict.methods import METHODS, cast, prepare
from minipeft.model.predict.prediction import MemoryPrediction
from minipeft.model.predict.step import PREFIX_ROW, MakeOptimizer, trace
from minipeft.prefix import PrefixEncoder

LLAMA = {  # hidden, intermediate, layers, heads: table 2 of the paper (Touvron et al. 2023)
    "llama-7b": (4096, 11008, 32, 32),
    "llama-13b": (5120, 13824, 40, 40),
    "llama-30b": (6656, 17920, 60, 52),
    "llama-65b": (8192, 22016, 80, 64),
}
OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
SHARDINGS = (None, "ddp", "fsdp2")
CHUNK = 256  # rows of logits at a time where the loss is computed in chunks


@in_our_words
def predict_memory(
    model: Any,
    method: str = "qlora",
    *,
    batch: int | None = None,
    length: int | None = None,
    rank: int = 16,
    target: Target = "all-linear",
    prefix_length: int = 16,
    dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    optimizer: str | MakeOptimizer = "adamw",
    checkpointing: bool = False,
    chunked_loss: bool = False,
    device: str = "cpu",
    world_size: int = 1,
    sharding: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    head: Head = None,
    padded: bool = False,
    forward: Callable[[nn.Module], Tensor] | None = None,
) -> MemoryPrediction:
    """The memory of one training step, in bytes: weights, adapters, gradients, and so on.

    `model` is a module (on the meta device, or with weights, which are neither read nor changed), a
    transformers config, or one of "llama-7b", "llama-13b", "llama-30b", "llama-65b".  `method` is
    "full", "lora", "dora", "qlora", "qdora", "prefix", or "as_it_is" for a model that is ready to
    train.  `batch` and `length` are the tokens of a step on one device.  `dtype` is that of the
    dense weights; None: the model's own, bfloat16 for a name.  `optimizer` is "adamw", "sgd", or a
    function from parameters to an optimiser.  `device` "cuda" counts the buffers that kernels take
    on a GPU, and AdamW's foreach.  `chunked_loss`: torch's linear_cross_entropy, 256 rows at once.

    `sharding` "ddp" counts the buckets of gradients; "fsdp2" divides weights, gradients and
    moments, and adds what a device has whole: two blocks, their gradients in backward, and the same
    of what is in no block (model/predict/devices.py).  These two are counted, not run.

    A transformers model computes its own loss from `batch` texts of `length` tokens, without a
    cache.  `padded`: it is given an attention mask, (batch, length), that hides some tokens; then
    attention keeps a mask of (batch, 1, length, length) numbers in each layer.  `forward` is a
    function from the model to its loss on tensors of the meta device, and takes the place of
    `batch`, `length` and `chunked_loss`; `padded` says what the masks hide that it may pass.

    Within the tensors' sizes the prediction is exact; see `MemoryPrediction` for what it leaves
    out.  Autocast, offloading and paged optimisers are not predicted.

    Raises:
        ImportError: a config or a name, and transformers is not installed.
        TypeError: `model` is none of these.
        ValueError: an unknown word, a number below 1, a module with parameters that have no shape
            yet, `forward` beside what it replaces, and what the method refuses.  The model given is
            never changed.
    """
    where = "predict_memory"
    numbers: dict[str, int | None] = {
        "rank": rank,
        "world_size": world_size,
        "prefix_length": prefix_length,
    }
    if forward is None:
        numbers = {"batch": batch, "length": length, **numbers}
    else:
        _check_alone(batch=batch, length=length, chunked_loss=chunked_loss)
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{where}: {name}={number!r}; expected a whole number of at least 1")
    for name, value, known in (
        ("method", method, METHODS), ("sharding", sharding, SHARDINGS),
        ("device", device, ("cpu", "cuda")),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{where}: {name}={value!r}; choose one of {known}")
    if (sharding is None) != (world_size == 1):
        raise ValueError(
            f"{where}: world_size={world_size} and sharding={sharding!r}; several devices share "
            "the work by 'ddp' or 'fsdp2', one device by None"
        )
    make_optimizer = _optimizer(optimizer, device)
    copied = _on_meta(model)
    cast(copied, dtype or (torch.bfloat16 if isinstance(model, str) else None))
    copied.train()
    if checkpointing:
        _enable_checkpointing(copied)
    prefixes = [module for module in copied.modules() if isinstance(module, Prefix)]
    try:
        options = {"dtype": adapter_dtype}
        prepare(
            copied, method, rank=rank, target=target, head=head, options=options,
            quantisation={"block_size": block_size, "double_quant": double_quant},
            attach=lambda m: prefixes.append(attach_without_values(m, prefix_length)),
        )  # fmt: skip
        scores = _head_of(copied)
        with tried_first(PREFIX_ROW) if device == "cpu" else nullcontext():
            if forward is None:
                compute = _loss(copied, scores, (batch, length), chunked_loss, padded)
            else:
                compute = _without_values(copied, forward, padded)
            one = Device(copied, world_size, sharding)
            traced = trace(
                copied, compute, make_optimizer, device_type=device, head=scores,
                cost=one.bytes_of,
            )  # fmt: skip
    finally:
        for prefix in prefixes:
            prefix.hooks.remove()
    settings = {
        "method": method, "batch": batch, "length": length, "checkpointing": checkpointing,
        "device": device, "world_size": world_size, "sharding": sharding,
    }  # fmt: skip
    return per_device(one, traced, settings)


def _check_alone(**beside: Any) -> None:
    """Raise ValueError if what `forward` replaces was given beside it."""
    given = [n for n, value in beside.items() if value is not None and value is not False]
    if given:
        raise ValueError(
            f"predict_memory: forward= makes its own inputs and its own loss; leave out "
            f"{', '.join(given)}, and make tensors of the sizes that you want in it"
        )


def _without_values(
    model: nn.Module, forward: Callable[[nn.Module], Tensor], padded: bool
) -> Callable[[nn.Module], Tensor]:
    """The caller's forward; a transformers model in it is told what its masks hide."""

    def compute(m: nn.Module) -> Tensor:
        with PlainText(padded=padded) if hasattr(model, "config") else nullcontext():
            return forward(m)

    return compute


def _optimizer(optimizer: str | MakeOptimizer, device: str) -> MakeOptimizer:
    if not isinstance(optimizer, str):
        if not callable(optimizer):
            raise TypeError(
                f"predict_memory: optimizer={optimizer!r}; expected a name or a function from "
                "parameters to an optimiser"
            )
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"predict_memory: optimizer={optimizer!r}; choose one of {tuple(OPTIMIZERS)}, or "
            "pass a function from parameters to an optimiser"
        )
    kind = OPTIMIZERS[optimizer]
    return lambda parameters: kind(parameters, lr=1e-3, foreach=device == "cuda")


def _on_meta(model: Any) -> nn.Module:
    """A model on the meta device that is nobody else's."""
    if isinstance(model, nn.Module):
        copied = meta_copy("predict_memory", model)
        for module in copied.modules():
            if type(module) is Prefix:  # of a model that has one
                module.__class__ = _Unproved
                if module.route == "attention":
                    module.hooks.name_attention()  # the copy's own: the name given is the model's
        return copied
    if isinstance(model, str):
        if model not in LLAMA:
            raise ValueError(
                f"predict_memory: model={model!r}; choose one of {tuple(LLAMA)}, or pass a config "
                "or minipeft.meta_model(folder)"
            )
        return model_of(llama_config(model))
    if hasattr(model, "to_dict") and hasattr(model, "model_type"):
        return model_of(copy.deepcopy(model))
    raise TypeError(
        f"predict_memory: expected a module, a transformers config or one of {tuple(LLAMA)}; got "
        f"{type(model).__name__}"
    )


def llama_config(name: str) -> Any:
    """The config of a LLaMA by its name, one of `LLAMA`; made without a network."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads = LLAMA[name]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=32000,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def _enable_checkpointing(model: Any) -> None:
    """Activation checkpointing, under the name that this transformers has for it."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if (enable := getattr(model, name, None)) is not None:
            enable({"use_reentrant": False})
            return
    raise ValueError(
        f"predict_memory: checkpointing=True, but {type(model).__name__} has no method that turns "
        "it on; checkpoint in the model's own forward, and leave it out"
    )


def _head_of(model: Any) -> nn.Module | None:
    """The module that makes scores of tokens."""
    get = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = None if get is None else get()
    return found


def _loss(
    model: nn.Module, head: nn.Module | None, shape: tuple[Any, Any], chunked: bool, padded: bool
) -> Callable[[nn.Module], Tensor]:
    """A function that computes the model's loss on made-up texts, (batch, length)."""
    if not hasattr(model, "config"):
        raise ValueError(
            f"predict_memory: {type(model).__name__} is no transformers model; pass forward=, a "
            "function from the model to its loss on tensors of the meta device"
        )
    ids = torch.zeros(*shape, dtype=torch.long, device="meta")
    text: dict[str, Any] = {"input_ids": ids}
    if padded:
        text["attention_mask"] = torch.ones_like(ids)
    if not getattr(model.config, "is_encoder_decoder", False):
        text["use_cache"] = False
    if not chunked:
        return lambda m: _asked(m, lambda: m(labels=ids, **text).loss, padded)
    if head is None or not hasattr(nn, "LinearCrossEntropyOptions"):
        raise ValueError(
            "predict_memory: chunked_loss=True needs torch 2.13 and a model with an output head"
        )

    def chunked_loss(m: Any) -> Tensor:
        hidden = m.base_model(**text).last_hidden_state
        rows: Tensor = hidden[:, :-1].flatten(0, 1)
        weight: Any = head.weight
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None)
        found: Tensor = F.linear_cross_entropy(rows, weight, ids[:, 1:].flatten(), options=options)
        return found

    return lambda m: _asked(m, lambda: chunked_loss(m), padded)


def _asked(model: nn.Module, compute: Callable[[], Tensor], padded: bool) -> Tensor:
    """The loss of a text without values; a ValueError where the model must know them."""
    try:
        with PlainText(padded=padded):
            return compute()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"predict_memory: {type(model).__name__} does not run on the meta device "
            f"({type(error).__name__}: {error}); pass forward=, a function from it to its loss"
        ) from error


class _Unproved(Prefix):
    """A prefix whose keys and values have shapes alone."""

    def _part(self, encoder: Any, layer: int) -> attention.Part:
        if not isinstance(encoder, PrefixEncoder):
            return super()._part(encoder, layer)
        k, v = encoder.layer(layer)
        return attention.Part(k, v, encoder.gate(layer), encoder.prefix_length)


def attach_without_values(model: nn.Module, prefix_length: int) -> Prefix:
    """attach_prefix for a model on the meta device, where no trial can prove anything.

    Tokens keep their numbers, which takes the same memory as shifted ones.

    Raises:
        ValueError: attention is not reached in every layer.
    """
    with probe.errors_of("predict_memory"), PlainText():
        one = torch.zeros(1, 1, dtype=torch.long, device="meta")
        reach = probe.look(model, input_ids=one)
    prefix = _Unproved(model, reach, position="none", window="always")
    with torch.device("meta"):
        prefix.encoders["default"] = PrefixEncoder(prefix.kv_shapes, prefix_length)
    model.add_module(NAME, prefix)
    freeze(model)
    prefix.hooks.name_attention()
    return prefix
