"""A PEFT LoRA directory onto a model: every layer is made and filled before the first is put in."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters import freeze, named_adapters, refuse_merged
from minipeft.atomic import restoring
from minipeft.bank import refuse_rows
from minipeft.inject import check_model, swap
from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME, MatchedConfig, read_config
from minipeft.io.peft.contents import Contents, sort_out
from minipeft.io.peft.prompts import kind_in, load_prompts
from minipeft.io.peft.tensors import copy_into, reaches_across_groups
from minipeft.io.peft.training import PLAIN, Training, freeze_named, made_layer, parsed
from minipeft.io.replace import current, read_whole
from minipeft.io.seal import read_sealed
from minipeft.kinds import layer_class
from minipeft.layers.experts import NF4Experts
from minipeft.layers.lora_embedding import LoRAEmbedding
from minipeft.layers.lora_experts import LoRAExperts
from minipeft.layers.lora_tied import LoRATiedLinear
from minipeft.layers.trained import TrainedBias, TrainedLogits, TrainedModule, TrainedTokens
from minipeft.protocol import is_adapter
from minipeft.registry import DEFAULT, check_new_name, give_name
from minipeft.targets import Names, expert_weights, in_attention, visible_modules
from minipeft.wrapper import Wrapper, innermost, stored_parameter


class Loaded(Names):
    """Names of the modules that got a layer; with strict=False what the file lacked or had more."""

    missing: list[str]
    unexpected: list[str]


class _Builder:
    """The layers that a file asks for, over a model's modules, by the modules' names."""

    def __init__(
        self, model: nn.Module, config: MatchedConfig, contents: Contents, *, stack: bool,
        training: Mapping[str, Training],
    ) -> None:  # fmt: skip
        self.model, self.config, self.contents, self.stack = model, config, contents, stack
        self.training = training
        self.modules = visible_modules(model)
        self.made: dict[str, nn.Module] = {}

    def top(self, name: str) -> nn.Module:
        """The outermost layer made for a module so far, or the module."""
        return self.made.get(name, self.modules[name])

    def settings(self, name: str) -> dict[str, Any]:
        """What a layer's constructor takes."""
        return {
            "rank": self.config.rank_of(name), "alpha": self.config.alpha_of(name),
            "dropout": self.config.config.dropout,
            "rank_stabilized": self.config.config.rank_stabilized,
        }  # fmt: skip

    def sharing(self, weight: Tensor, *, but: str) -> list[str]:
        """Names of other linear layers that hold this parameter: heads tied to an embedding."""
        return [
            name for name, module in self.modules.items()
            if name != but and isinstance(innermost(module), nn.Linear)
            and innermost(module)._parameters.get("weight") is weight
        ]  # fmt: skip

    def build(self) -> dict[str, nn.Module]:
        """All layers, filled; embeddings come before the heads that follow them."""
        inside = in_attention(self.model)
        for name, found in self.contents.low_rank.items():
            module = self.modules[name]
            if name in inside:
                raise ValueError(f"load_peft: {name!r} is {inside[name]}")
            if is_adapter(module) and not self.stack:
                raise ValueError(
                    f"load_peft: {name!r} already has an adapter; load onto the plain model, or "
                    "give this one a name"
                )
            kind = layer_class(module, dora=self.config.config.dora)
            if kind is None:
                raise ValueError(
                    f"load_peft: {name!r} is a {type(module).__name__}, for which there is no "
                    f"{'DoRA' if self.config.config.dora else 'LoRA'} layer"
                )
            settings = self.settings(name)
            if reaches_across_groups(module, found):
                settings["across_groups"] = True
            training = self.training.get(name, PLAIN)
            where = f"{WEIGHTS_NAME}: {name}"
            self.made[name] = made_layer(where, kind, module, found, settings, training)
        for name, levels in self.contents.experts.items():
            self._experts(name, levels)
        if self.config.config.tied:
            self._tied_heads()
        for name, value in self.contents.biases.items():
            self._bias(name, value)
        memo: dict[int, Any] = {}
        for name, values in self.contents.saved.items():
            own: dict[int, Any] = memo if self.config.config.tied else {}
            self._saved(name, values, TrainedModule(self.top(name), memo=own))
        for name, (ids, rows) in self.contents.tokens.items():
            self._tokens(name, ids, rows)
        for name, training in self.training.items():
            where = f"{WEIGHTS_NAME}: {name:.80}"
            if name not in self.made:
                raise ValueError(f"{where}: the file says how it trains, and holds no layer of it")
            freeze_named(where, _new_layers({name: self.made[name]}, self.modules),
                         training.frozen)  # fmt: skip
        return self.made

    def _experts(self, name: str, levels: Sequence[Mapping[Any, Tensor]]) -> None:
        weights: dict[str, Any] = {
            n: w for n, w in expert_weights(self.model).items() if n.rpartition(".")[0] == name
        }
        weights |= {
            n: m for n, m in self.modules.items()
            if n.rpartition(".")[0] == name and isinstance(innermost(m), NF4Experts)
        }  # fmt: skip
        wanted = [n for n in weights if self.config.targets_parameter(n)]
        if len(wanted) != len(levels):
            raise ValueError(
                f"{WEIGHTS_NAME}: {name} has {len(levels)} expert weights; the model and "
                f"{CONFIG_NAME} have {wanted}"
            )
        for full, found in zip(wanted, levels, strict=True):
            where, training = f"{WEIGHTS_NAME}: {full}", self.training.get(full, PLAIN)
            parent: Any = self.modules[name]
            settings = {
                **self.settings(full), "transposed": bool(getattr(parent, "is_transposed", False)),
            }  # fmt: skip
            layer = made_layer(where, LoRAExperts, weights[full], found, settings, training)
            self.made[full] = layer.train(parent.training)

    def _tied_heads(self) -> None:
        for name, layer in list(self.made.items()):
            if not isinstance(layer, LoRAEmbedding):
                continue
            for head in self.sharing(innermost(layer)._parameters["weight"], but=name):  # type: ignore[arg-type]
                before = self.made.pop(head, None)
                tied = LoRATiedLinear(self.modules[head], layer)
                if before is not None:
                    pairs = zip(before.factors(), tied.factors(), strict=True)  # type: ignore[operator]
                    if not all(torch.equal(a, b) for a, b in pairs):
                        raise ValueError(
                            f"{WEIGHTS_NAME}: {head} is tied to {name}, but their factors differ"
                        )
                self.made[head] = tied

    def _bias(self, name: str, value: Tensor) -> None:
        if name in in_attention(self.model):
            raise ValueError(f"load_peft: the bias of {name!r} lies inside nn.MultiheadAttention")
        layer = TrainedBias(self.top(name))
        where, bias = f"{WEIGHTS_NAME}: {name}.bias", stored_parameter(
            "load_peft", innermost(layer), "bias"
        )  # fmt: skip
        if value.shape != bias.shape or not value.is_floating_point():
            raise ValueError(
                f"{where}: {value.dtype} {tuple(value.shape)}; expected {tuple(bias.shape)}"
            )
        delta = value.to(bias.device, torch.float32) - bias.float()
        copy_into(where, layer, {"bias_delta": delta})
        self.made[name] = layer

    def _saved(self, name: str, values: Mapping[str, Tensor], layer: TrainedModule) -> None:
        where = f"{WEIGHTS_NAME}: {name}"
        own = {f"copy.{key}": value for key, value in values.items()}
        buffers = {f"copy.{key}": value for key, value in layer.copy.named_buffers()}
        given = {key: own.pop(key) for key in list(own) if key in buffers}
        for key, value in given.items():  # running means: older files lack them
            if value.shape != buffers[key].shape or not bool(value.isfinite().all()):
                raise ValueError(
                    f"{where}: {key} has shape {tuple(value.shape)}, expected "
                    f"{tuple(buffers[key].shape)} and finite numbers"
                )
        if unknown := own.keys() - layer.adapter_parameters().keys():
            raise ValueError(f"{where}: {sorted(unknown)[0]} is no parameter of the module")
        if lost := layer.adapter_parameters().keys() - own.keys():
            raise ValueError(f"{where}: {sorted(lost)[0].removeprefix('copy.')} is missing")
        copy_into(where, layer, own)
        for key, value in given.items():
            buffers[key].copy_(value)
        self.made[name] = layer

    def _tokens(self, name: str, ids: list[int], rows: Tensor) -> None:
        layer = TrainedTokens(self.top(name), ids)
        copy_into(f"{WEIGHTS_NAME}: {name}", layer, {"token_rows": rows})
        self.made[name] = layer
        weight = innermost(layer)._parameters["weight"]
        for head in self.sharing(weight, but=name):  # type: ignore[arg-type]
            self.made[head] = TrainedLogits(self.top(head), layer)


def load_peft(
    model: nn.Module, path: str | os.PathLike[str], *, name: str = DEFAULT, strict: bool = True
) -> Loaded:
    """Inject and load the adapter that PEFT or minipeft saved in directory `path`; trainable.

    LoRA and DoRA on linear layers, embeddings, convolutions, attention and expert weights; trained
    biases, modules saved whole, trained tokens; on transformers models prefix tuning, prompt tuning
    and P-tuning with their heads.  Every key must belong to a module of the model,
    with or without PEFT's "base_model.model." before it, and every module that the configuration
    targets must have its keys.  Values take the dtype of the layers, float32.  With a `name` it is
    one more adapter, over those that are there.  Freezes every parameter that no adapter owns.
    Returns the names; with `strict=False` what is missing or unexpected is in the result's
    `.missing` and `.unexpected`, and the rest is loaded.

    Raises:
        ValueError: a file missing or damaged, another kind of adapter, a key missing, extra or of
            another shape, an adapter of another model.  The model is then as it was.
    """
    directory = Path(path)
    return read_whole(directory, lambda: _load(model, directory, name, strict=strict))


def _load(model: nn.Module, directory: Path, name: str, *, strict: bool) -> Loaded:
    check_model("load_peft", model)
    if name != DEFAULT:
        check_new_name("load_peft", model, name)
    refuse_merged("load_peft", named_adapters(model))
    refuse_rows("load_peft", model)
    if kind_in(directory) is not None:
        return _prompts(model, directory, name, strict=strict)
    plain = read_config(directory / CONFIG_NAME)
    modules = visible_modules(model)
    config = plain.of_model([*modules, *expert_weights(model)], CONFIG_NAME)
    if strict and (unused := config.unused_patterns()):
        raise ValueError(f"{CONFIG_NAME}: the patterns {unused} fit no module of the model")
    where = directory / WEIGHTS_NAME
    _refuse_pickle(directory)
    tensors, training = read_sealed(where, plain.content, CONFIG_NAME)
    contents = sort_out(where, tensors, model, config)
    if strict and (contents.missing or contents.unexpected):
        raise ValueError(contents.complaint(where))
    with restoring(model):
        made = _Builder(
            model, config, contents, stack=name != DEFAULT, training=parsed(training, str(where))
        ).build()
        if not made:
            raise ValueError(f"{where}: holds no adapter")
        of_module = {id(modules[n]): layer for n, layer in made.items() if n in modules}
        shared = {n: of_module[id(m)] for n, m in modules.items() if id(m) in of_module}
        swap(model, {**made, **shared})
        give_name(model, name, _new_layers(made, modules))
        freeze(model)
    order = {name: number for number, name in enumerate(modules)}
    result = Loaded(sorted(made, key=lambda name: order.get(name, len(order))))
    result.missing, result.unexpected = contents.missing, contents.unexpected
    return result


def _prompts(model: nn.Module, directory: Path, name: str, *, strict: bool) -> Loaded:
    _refuse_pickle(directory)
    names, unexpected = load_prompts(model, directory, name, strict=strict)
    result = Loaded(names)
    result.missing, result.unexpected = [], unexpected
    return result


def _refuse_pickle(directory: Path) -> None:
    if (
        not current(directory / WEIGHTS_NAME).is_file()
        and (directory / "adapter_model.bin").is_file()
    ):
        raise ValueError(
            f"{directory}: adapter_model.bin is a pickle and can run code, so it is not read; "
            "load it with PEFT where you trust it and save it with safe_serialization=True"
        )


def _new_layers(made: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Every layer of the stacks that were made, down to what was there before."""
    layers: list[nn.Module] = []
    for name, layer in made.items():
        while isinstance(layer, Wrapper) and layer is not modules.get(name):
            layers.append(layer)
            layer = layer.base
    return layers
