"""Models with three adapters over every kind of layer: ranks 4, 8 and 2."""

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.adapters.names import give_name
from minipeft.adapters.wrapper import Wrapper

IDS = torch.arange(6 * 5).view(6, 5) * 7 % 40
WIDTHS = {1: (9,), 2: (9, 8), 3: (5, 6, 4)}


class Scaled(nn.Embedding):
    """A table that multiplies what it gives, as Gemma's do."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(3.7), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Tied(nn.Module):
    """A table, and a head with its weight."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids).relu())


def randomize(model):
    for adapter in model.modules():
        if isinstance(adapter, Wrapper):
            for parameter in adapter.adapter_parameters().values():
                with torch.no_grad():
                    parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def three(model, targets=("0",), **settings):
    """Adapters of ranks 4, 8 and 2; settings of one kind for all, or for each."""
    for name, rank, alpha in (("default", 4, 4), ("fr", 8, 24), ("de", 2, 5)):
        own = settings.get(name, {k: v for k, v in settings.items() if k not in ("fr", "de")})
        mp.inject_lora(model, list(targets), rank, alpha, **own, name=name)
    return randomize(model)


def by_hand(model, make, place="0"):
    """Three adapters whose layers `make(base, rank)` gives."""
    for name, rank in (("default", 4), ("fr", 8), ("de", 2)):
        layer = make(model.get_submodule(place), rank)
        setattr(model, place, layer)
        give_name(name, [layer])
    return randomize(model)


def starting_elsewhere(layer):
    """An initialisation whose product is subtracted, as PiSSA's is."""
    nn.init.normal_(layer.lora_b)
    layer.subtract_start()


def convolution(axes, **settings):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return nn.Sequential(kind(6, 4, 3, **settings)), torch.randn(6, 6, *WIDTHS[axes])


def embedding(table=nn.Embedding, **settings):
    return three(nn.Sequential(table(40, 16), nn.Tanh()), **settings), IDS


def linear(**settings):
    model = nn.Sequential(nn.Linear(24, 15), nn.ReLU(), nn.Linear(15, 9))
    return three(model, ("0", "2"), **settings), torch.randn(6, 3, 24)


def packed_linear():
    model = nn.Sequential(nn.Linear(64, 15), nn.ReLU(), nn.Linear(15, 9))
    mp.quantize_model(model, head=())
    return three(model, ("0", "2"), dora=True), torch.randn(6, 3, 64)


def packed_embedding(**settings):
    model = nn.Sequential(mp.layers.NF4Embedding.from_embedding(nn.Embedding(40, 64)), nn.Tanh())
    return three(model, **settings), IDS


def conv1d_of_transformers():
    made = pytest.importorskip("transformers.pytorch_utils").Conv1D(15, 24)
    nn.init.normal_(made.bias)
    return three(nn.Sequential(made), dora=True), torch.randn(6, 3, 24)


def mixed_kinds():
    """LoRA, DoRA over it, and LoRA over that: what is below differs by row."""
    model = nn.Sequential(nn.Linear(24, 15), nn.Conv1d(5, 4, 3), nn.Tanh())
    mp.inject_lora(model, ["0", "1"], 4, name="default")
    mp.inject_lora(model, ["0", "1"], 8, dora=True, name="fr")
    mp.inject_lora(model, ["0", "1"], 2, 7, dora=True, name="de")
    return randomize(model), torch.randn(6, 5, 24)


def fused():
    def make(base, rank):
        return mp.layers.LoRAFusedLinear(base, {"q": rank, "v": 1}, slices={"q": 5, "k": 3, "v": 7})

    return by_hand(nn.Sequential(nn.Linear(24, 15)), make), torch.randn(6, 3, 24)


def fused_under_dora():
    model = nn.Sequential(nn.Linear(24, 15))
    mp.inject(model, ["0"], lambda m: mp.layers.LoRAFusedLinear(m, 4, slices={"q": 8, "v": 7}))
    mp.inject_lora(model, ["0"], 2, dora=True, name="fr")
    mp.inject_lora(model, ["0"], 3, name="de")
    return randomize(model), torch.randn(6, 24)


def tied():
    model = Tied()
    for name, rank in (("default", 4), ("fr", 8), ("de", 2)):
        mp.inject_lora(model, ["table"], rank, 9, name=name)
        mp.tie_heads(model, name=name)
    return randomize(model), IDS


def trained(kind):
    def make():
        model = nn.Sequential(
            nn.Embedding(40, 24), nn.Linear(24, 15), nn.Conv1d(5, 4, 3), nn.Tanh()
        )
        for name, rank in (("default", 4), ("fr", 8), ("de", 2)):
            mp.inject_lora(model, ["1", "2"], rank, dora=name == "fr", name=name)
            if kind == "bias" and name == "default":
                mp.train_biases(model, name=name)
            elif kind == "tokens" and name != "fr":
                mp.train_tokens(model, [0, 7, 14], target=["0"], name=name)
                break
        if kind == "module":
            model = nn.Sequential(nn.Embedding(40, 24), nn.LayerNorm(24), nn.Linear(24, 15))
            for name in ("default", "fr", "de"):
                mp.inject_lora(model, ["0"], 2, name=name)
            modules = dict(zip(("default", "fr"), (["1"], ["2"]), strict=True))
            for name, target in modules.items():
                mp.train_modules(model, target, name=name)
        if kind == "tokens":
            for name in ("fr", "de"):
                mp.inject_lora(model, ["0", "1"], 3, name=name)
        return randomize(model), IDS

    return make


def on_a_convolution(axes, *, lora=None, **settings):
    def make():
        model, x = convolution(axes, **settings)
        return three(model, **(lora or {})), x

    return make


KINDS = {
    "embedding": embedding,
    "embedding, scaled": lambda: embedding(Scaled),
    "embedding, padding": lambda: embedding(lambda *s: nn.Embedding(*s, padding_idx=7)),
    "embedding, NF4": packed_embedding,
    "embedding, another start": lambda: embedding(init=starting_elsewhere),
    "convolution, 1": on_a_convolution(1, stride=2, padding=1),
    "convolution, 2": on_a_convolution(2, padding="same", dilation=2),
    "convolution, 3": on_a_convolution(3, padding=1, padding_mode="circular"),
    "convolution, 3, strided": on_a_convolution(3, stride=2, padding=1),
    "convolution, groups": on_a_convolution(1, groups=2, padding=1, padding_mode="reflect"),
    "convolution, across groups": on_a_convolution(2, groups=2, lora={"across_groups": True}),
    "convolution, another start": on_a_convolution(1, groups=2, lora={"init": starting_elsewhere}),
    "linear, DoRA": lambda: linear(dora=True),
    "linear, DoRA, PiSSA": lambda: linear(dora=True, init=mp.starts.pissa()),
    "linear, DoRA, NF4": packed_linear,
    "Conv1D, DoRA": conv1d_of_transformers,
    "embedding, DoRA": lambda: embedding(dora=True),
    "embedding, DoRA, scaled": lambda: embedding(Scaled, dora=True),
    "embedding, DoRA, NF4": lambda: packed_embedding(dora=True),
    "convolution, DoRA": on_a_convolution(2, lora={"dora": True}),
    "convolution, DoRA, groups": on_a_convolution(1, groups=2, lora={"dora": True}),
    "LoRA and DoRA": mixed_kinds,
    "fused": fused,
    "fused under DoRA": fused_under_dora,
    "tied head": tied,
    "biases": trained("bias"),
    "modules": trained("module"),
    "tokens": trained("tokens"),
}  # fmt: skip
