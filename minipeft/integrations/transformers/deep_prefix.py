"""attach_prefix: P-tuning v2 on a Hugging Face model whose attention can be replaced.

One token is sent through the model to see which modules call attention, in which order, and which
keys and values they hand over; no name in the config is trusted for that.  Each of these modules
gets its layer of a PrefixEncoder.  Every forward then begins by setting which attention the config
names: the one with the prefix or, switched off, the one that was there.
"""

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters import freeze
from minipeft.integrations.transformers import attention, positions, saving
from minipeft.integrations.transformers.arguments import Arguments, names_of
from minipeft.prefix import PrefixEncoder

NAME = "minipeft_prefix"  # of the submodule in the model


class Prefix(nn.Module):
    """A prefix attached to a model, registered in it as the submodule `minipeft_prefix`.

    `encoder` is the PrefixEncoder; `position` says how tokens are numbered; `enabled` switches
    the prefix on and off, as minipeft.disable_adapters does.
    """

    encoder: PrefixEncoder
    _model: nn.Module
    _base: Any  # the transformers model that makes the masks
    _attentions: list[Any]

    def __init__(
        self, encoder: PrefixEncoder, position: str, model: nn.Module, base: Any,
        attentions: list[nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.position = encoder, position
        self._argument_names = names_of(base)
        self._table_rows = positions.table_rows(base)
        # in __dict__: as submodules, the model would contain itself
        self.__dict__.update(_model=model, _base=base, _attentions=attentions)
        for layer, module in enumerate(attentions):
            attention.bind(module, self, layer)
        self._hooks = [
            base.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            base.get_input_embeddings().register_forward_hook(self._after_embedding),
        ]

    @property
    def enabled(self) -> bool:
        """Whether the model sees the prefix."""
        return self.encoder.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.encoder.enabled = value

    def load_kv(self, pairs: Any) -> None:
        """Start from keys and values: pairs per layer, or the cache of a run over real tokens.

        Raises:
            ValueError: shapes of another model or length, or an encoder with an MLP.
        """
        layers: Iterable[Any] | None = getattr(pairs, "layers", None)
        if pairs is None:
            raise ValueError("load_kv: got None; was the model run with use_cache=True?")
        self.encoder.load_kv(pairs if layers is None else [(c.keys, c.values) for c in layers])

    def bake(self) -> None:
        """Replace an MLP by the tables it produces, for good; optimisers must be built anew."""
        self.encoder = self.encoder.bake()

    def remove(self) -> None:
        """Take the prefix off: the model computes as before, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        for module in self._attentions:
            attention.unbind(module)
        for config in self._configs():
            name = attention.own_implementation(config._attn_implementation)
            config._attn_implementation_internal = name
        delattr(self._model, NAME)
        saving.adopt(self._model)

    def extra_repr(self) -> str:
        return f"position={self.position!r}"

    def _configs(self) -> list[Any]:
        configs = [self._base.config, *(module.config for module in self._attentions)]
        return list({id(config): config for config in configs}.values())

    def _before_forward(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Name the attention to be used, and number the tokens from prefix_length on."""
        for config in self._configs():  # whoever changed the implementation since is respected
            name = attention.own_implementation(config._attn_implementation)
            config._attn_implementation_internal = (
                attention.register(name) if self.enabled else name
            )
        if not self.enabled:
            return None
        given = Arguments(self._argument_names, args, kwargs)
        positions.check_mask(given)
        if self.position == "shift":
            positions.shift(given, self.encoder.prefix_length)
        positions.check_table(given, self._table_rows)
        embeddings = given["inputs_embeds"]
        if embeddings is not None and self._needs_input_gradient(embeddings):
            given["inputs_embeds"] = embeddings.detach().requires_grad_(True)
        return given.args, given.kwargs

    def _after_embedding(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.enabled and self._needs_input_gradient(output):
            output.requires_grad_(True)

    def _needs_input_gradient(self, x: Tensor) -> bool:
        """Re-entrant checkpointing passes gradients on only where an input asks for one."""
        if not self._base.training or not torch.is_grad_enabled() or x.requires_grad:
            return False
        return any(getattr(m, "gradient_checkpointing", False) for m in self._base.modules())


def attach_prefix(
    model: nn.Module,
    prefix_length: int,
    *,
    hidden: int | None = None,
    embedding_dim: int | None = None,
    dropout: float = 0.0,
    init_std: float = 0.02,
    position: str = "shift",
) -> Prefix:
    """Put a trainable prefix before the keys and values of every attention layer of `model`.

    For transformers models that call attention through AttentionInterface, with `sdpa` or
    `eager`: the LLaMA, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX and GLM families and more.  Caches
    hold real tokens only and masks cover real tokens only: use the model as before.

    `position` "shift" numbers tokens from prefix_length on, as if the prefix were tokens (the
    convention of P-tuning v2 and PEFT); "none" leaves them at 0.  Layers with a sliding window
    see the prefix from everywhere.  Other arguments as of PrefixEncoder.  Freezes every parameter
    that no adapter owns.  The model gets a copy of its config, so that others that share the
    object are unaffected.

    Raises:
        TypeError: no transformers model.
        ValueError: a model whose attention cannot be reached in every layer (it says what was
            tried), an encoder-decoder, another attention implementation, a prefix that is there
            already, a length below 1 or beyond the position table.  The model is then as it was.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"attach_prefix: expected a transformers model, got {type(model).__name__}; for "
            "attention of your own use PrefixEncoder and prefix_attention"
        )
    if position not in ("shift", "none"):
        raise ValueError(f"attach_prefix: position={position!r}; choose 'shift' or 'none'")
    if any(isinstance(module, Prefix) for module in model.modules()):
        raise ValueError("attach_prefix: the model has a prefix already; call its remove() first")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError("attach_prefix: encoder-decoder models are not supported yet")
    with ExitStack() as undo:
        calls = _probe(model, _own_configs(model, undo))
        base = _holder(model, [call.module for call in calls])
        if position == "shift":
            positions.check_rule(base)
        encoder = PrefixEncoder(
            [call.shape for call in calls], prefix_length,
            hidden=hidden, embedding_dim=embedding_dim, dropout=dropout, init_std=init_std,
        )  # fmt: skip
        table = positions.table_rows(base)
        if table is not None and position == "shift" and prefix_length >= table:
            raise ValueError(
                f"attach_prefix: prefix_length={prefix_length} leaves no room in the position "
                f"table of {table} rows"
            )
        undo.pop_all()
    encoder.to(calls[0].device).train(model.training)
    prefix = Prefix(encoder, position, model, base, [call.module for call in calls])
    model.add_module(NAME, prefix)
    saving.adopt(model)
    freeze(model)
    return prefix


def _own_configs(model: nn.Module, undo: ExitStack) -> list[Any]:
    """Give the model's modules copies of their configs, shared among them as before."""
    from transformers import PreTrainedConfig

    memo: dict[int, Any] = {}
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            undo.callback(setattr, module, "config", config)
            copied: Any = copy.deepcopy(config, memo)
            module.config = copied
            configs[id(copied)] = copied
    return list(configs.values())


def _probe(model: Any, configs: list[Any]) -> list[attention.Call]:
    """Send one token through; the attention calls, one per layer."""
    text = model.config.get_text_config()
    own = text._attn_implementation
    with_prefix = attention.register(own)  # raises if it cannot take a prefix
    changed = [config for config in configs if config._attn_implementation == own]
    try:
        for config in changed:
            config._attn_implementation_internal = with_prefix
        with attention.recording() as calls:
            positions.run_tokens(model, 1)
    finally:
        for config in changed:
            config._attn_implementation_internal = own
    layers = getattr(text, "num_hidden_layers", None)
    modules = {id(call.module) for call in calls}
    if not calls or len(modules) != len(calls) or (layers is not None and len(calls) != layers):
        raise ValueError(
            f"attach_prefix: {type(model).__name__} called attention through AttentionInterface "
            f"{len(calls)} times from {len(modules)} modules on one token; expected one module "
            f"for each of its {layers} layers.  Its attention cannot be reached this way"
        )
    return calls


def _holder(model: nn.Module, attentions: list[nn.Module]) -> nn.Module:
    """The innermost transformers model that holds all these modules: it makes the masks."""
    from transformers import PreTrainedModel

    wanted = {id(module) for module in attentions}
    holders = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and wanted <= {id(m) for m in module.modules()}
    ]
    return min(holders, key=lambda module: sum(1 for _ in module.modules()))
