"""The layers that a PEFT file asks for, made and filled; none is put into the model here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT
from minipeft.adapters.plain_names import PlainNames, Spellings
from minipeft.adapters.protocol import innermost, is_adapter, linear_shape
from minipeft.adapters.wrapper import Wrapper, stored_parameter
from minipeft.io.files import check_values
from minipeft.io.peft.config import CONFIG_NAME
from minipeft.io.peft.contents import Contents
from minipeft.io.peft.located import Located
from minipeft.io.peft.matched import MatchedConfig
from minipeft.io.peft.new_rows import behind, is_longer, tied_heads
from minipeft.io.peft.tensors import copy_into, reaches_across_groups, taken_bias
from minipeft.io.peft.training import PLAIN, Training, freeze_named, made_layer
from minipeft.layers.bias import LoRABias
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.layers.mixture import LoRAExperts
from minipeft.layers.tied import LoRATiedLinear
from minipeft.layers.trained import TrainedBias, TrainedLogits, TrainedModule, TrainedTokens
from minipeft.layers.trained_head import TrainedHeadRows
from minipeft.layers.vocabulary import LongerHead, LongerTable
from minipeft.model.inject_lora import layer_class, why_no_layer
from minipeft.quantized.experts import NF4Experts


class Builder:
    """The layers that a file asks for, over a model's modules, by the modules' names."""

    def __init__(
        self, model: nn.Module, found: Located, config: MatchedConfig, contents: Contents,
        where: Path, *, name: str, training: Mapping[str, Training], strict: bool,
    ) -> None:  # fmt: skip
        self.found, self.config, self.contents = found, config, contents
        self.model, self.where, self.name, self.stack = model, where, name, name != DEFAULT
        self.modules, self.strict = found.modules, strict
        places = Spellings([*found.modules, *found.experts])
        self.training = {places.find(name) or name: own for name, own in training.items()}
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

    def heads_of(self, name: str) -> list[str]:
        """Names of the linear layers that have an embedding's weight as theirs."""
        return [
            other for other in self.found.tied(name)
            if other != name and isinstance(innermost(self.modules[other]), nn.Linear)
        ]  # fmt: skip

    def build(self) -> dict[str, nn.Module]:
        """All layers, filled; embeddings come before the heads that follow them.

        A head's LoRA lies over the rows that it takes from an embedding.
        """
        inside = self.found.in_attention
        self._tables()
        tokens = sorted(self.contents.tokens.items(), key=lambda item: self._is_linear(item[0]))
        for name, (ids, rows) in tokens:  # embeddings first: heads may follow them
            if name not in self.contents.low_rank:
                self._tokens(name, ids, rows)
        for name, found in self.contents.low_rank.items():
            module = self.top(name)
            if name in inside:
                raise ValueError(f"load_peft: {name!r} is {inside[name]}")
            if is_adapter(self.modules[name]) and not self.stack:
                raise ValueError(
                    f"load_peft: {name!r} already has an adapter; take that off first "
                    "(minipeft.remove), or give this one a name= of its own"
                )
            kind = layer_class(module, dora=self.config.config.dora)
            if kind is None:
                why = why_no_layer(name, module, dora=self.config.config.dora)
                raise ValueError(f"load_peft: {name!r} {why}")
            if self.config.config.dora and isinstance(module, TrainedLogits):
                raise ValueError(
                    f"load_peft: {name!r} has DoRA and rows of trained tokens, which PEFT cannot "
                    "compute either"
                )
            settings = self.settings(name)
            if reaches_across_groups(module, found):
                settings["across_groups"] = True
            training = self.training.get(name, PLAIN)
            where = f"{self.where}: {name}"
            bias = taken_bias(where, found, wanted=self.config.config.lora_bias)
            self.made[name] = made_layer(where, kind, module, found, settings, training)
            if bias is not None:
                self.made[name] = LoRABias(self.made[name])
                copy_into(where, self.made[name], {"lora_bias": bias})
        for name, levels in self.contents.experts.items():
            self._experts(name, levels)
        if self.config.config.tied:
            self._tied_heads()
        for name, value in self.contents.biases.items():
            self._bias(name, value)
        memo: dict[int, Any] = {}
        for name, values in self.contents.saved.items():
            own: dict[int, Any] = memo if self.config.config.tied else {}
            if is_longer(self.top(name)):
                raise ValueError(
                    f"load_peft: {name!r} is in the file as a whole, and has new rows in the "
                    "model; take these off (minipeft.remove), and let "
                    "model.resize_token_embeddings make a table of the file's size"
                )
            self._saved(name, values, TrainedModule(self.top(name), memo=own))
        for name, (ids, rows) in tokens:
            if name in self.contents.low_rank:
                self._tokens(name, ids, rows)
        for name, training in self.training.items():
            where = f"{self.where}: {name:.80}"
            if name not in self.made:
                if self.strict and (training.slices or training.start or training.scale):
                    raise ValueError(
                        f"{where}: the file says how it trains, and holds no layer of it"
                    )
                continue  # the model lacks the module, or the file holds the base's own values
            freeze_named(where, new_layers({name: self.made[name]}, self.modules),
                         training.frozen)  # fmt: skip
        return self.made

    def _tables(self) -> None:
        """Frozen copies of base tables with new tokens, one for each module with that weight."""
        memo: dict[int, Any] = {}
        for name, value in self.contents.tables.items():
            for place in self.found.tied(name):
                if place in self.contents.saved:
                    continue
                if place in self.made:
                    copied = self.made[place].adapter_parameters()["copy.weight"]  # type: ignore[operator]
                    if not torch.equal(copied.cpu().to(value.dtype), value):
                        raise ValueError(
                            f"{self.where}: the weights of {place!r} are one, and differ"
                        )
                    continue
                layer = TrainedModule(self.modules[place], memo=memo)
                copy_into(f"{self.where}: {place}", layer, {"copy.weight": value})
                self.made[place] = layer.requires_grad_(False)

    def _experts(self, name: str, levels: Sequence[Mapping[Any, Tensor]]) -> None:
        packed = {n: m for n, m in self.modules.items() if isinstance(innermost(m), NF4Experts)}
        weights: dict[str, Any] = {
            n: w for n, w in {**self.found.experts, **packed}.items()
            if n.rpartition(".")[0] == name
        }  # fmt: skip
        wanted = [n for n in weights if self.config.fits(self.config.config.target_parameters, n)]
        if len(wanted) != len(levels):
            raise ValueError(
                f"{self.where}: {name} has {len(levels)} expert weights; the model and "
                f"{CONFIG_NAME} have {wanted}"
            )
        for full, found in zip(wanted, levels, strict=True):
            where, training = f"{self.where}: {full}", self.training.get(full, PLAIN)
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
            for head in self.heads_of(name):
                below, factors = self.top(head), ()
                if head in self.made and not isinstance(below, TrainedModule):  # no new tokens
                    factors, below = below.factors(), below.base  # type: ignore[operator, assignment]
                self.made[head] = tied = LoRATiedLinear(below, layer)
                if factors and not all(map(torch.equal, factors, tied.factors())):
                    raise ValueError(
                        f"{self.where}: {head} is tied to {name}, but their factors differ"
                    )

    def _bias(self, name: str, value: Tensor) -> None:
        if name in self.found.in_attention:
            raise ValueError(f"load_peft: the bias of {name!r} lies inside nn.MultiheadAttention")
        layer = TrainedBias(self.top(name))
        where = f"{self.where}: {name}"
        bias = stored_parameter("load_peft", innermost(layer), "bias")
        check_values(where, {"bias": value}, {"bias": bias})
        delta = value.to(bias.device, torch.float32) - bias.float()
        copy_into(where, layer, {"bias_delta": delta})
        self.made[name] = layer

    def _saved(self, name: str, values: Mapping[str, Tensor], layer: TrainedModule) -> None:
        where, names = f"{self.where}: {name}", PlainNames(layer.copy)
        state = layer.copy.state_dict(keep_vars=True)
        inner = {names.plain(key): f"copy.{key}" for key in state}
        inner |= {names.plain(key): f"copy.{key}" for key, _ in layer.copy.named_parameters()}
        own = {inner.get(key, f"copy.{key}"): value for key, value in values.items()}
        buffers = {f"copy.{key}": value for key, value in layer.copy.named_buffers()}
        given = {key: own.pop(key) for key in list(own) if key in buffers}
        # buffers are running means, which older files lack
        check_values(where, given, {key: buffers[key] for key in given})
        check_values(where, own, layer.adapter_parameters())
        copy_into(where, layer, own)
        for key, value in given.items():
            buffers[key].copy_(value)
        self.made[name] = layer

    def _is_linear(self, name: str) -> bool:
        return linear_shape(innermost(self.modules[name])) is not None

    def _tokens(self, name: str, ids: list[int], rows: Tensor) -> None:
        if name in self.made and isinstance(self.made[name], TrainedLogits | LongerHead):
            return  # follows the embedding
        module, where = self.top(name), f"{self.where}: {name}"
        head = self._is_linear(name)
        before = self.training.get(name, PLAIN).rows_before
        if (base := behind(where, self.model, module, before, ids, self.name)) is not None:
            self._new_rows(name, base, rows, head=head)
            return
        layer: Any = TrainedHeadRows(module, ids) if head else TrainedTokens(module, ids)
        copy_into(where, layer, {"token_rows": rows})
        self.made[name] = layer
        for other in [] if head else self.heads_of(name):
            own_ids, own_rows = self.contents.tokens.get(other, (ids, rows))
            if own_ids == ids and not torch.equal(own_rows, rows):
                raise ValueError(f"{where} and {other} are tied, but their token rows differ")
            if own_ids == ids:
                self.made[other] = TrainedLogits(self.top(other), layer)

    def _new_rows(self, name: str, base: nn.Module, rows: Tensor, *, head: bool) -> None:
        """Put rows behind a table, and behind the head that shares its weight."""
        if head:
            self.made[name] = LongerHead(base, rows)
            return
        self.made[name] = table = LongerTable(base, rows)
        for other in tied_heads(self.modules, name):
            top = self.top(other)
            self.made[other] = LongerHead(top.base if is_longer(top) else top, table)  # type: ignore[arg-type]


def new_layers(made: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """All layers that were made: each stack from its top down to what was there before."""
    layers: list[nn.Module] = []
    for name, layer in made.items():
        while isinstance(layer, Wrapper) and layer is not modules.get(name):
            layers.append(layer)
            layer = layer.base
    return layers
