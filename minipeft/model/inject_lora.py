"""Wrap layers of a model in LoRA: which adapter layer goes over which kind of module.

    nn.Linear, Conv1D, NF4Linear, linear-like    LoRALinear             DoRALinear
    nn.Embedding, NF4Embedding                   LoRAEmbedding          DoRAEmbedding
    nn.Conv1d, Conv2d, Conv3d                    LoRAConv               DoRAConv
    nn.MultiheadAttention                        LoRAMultiheadAttention
    3-D weights of experts, NF4Experts           LoRAExperts

LoRAFusedLinear, whose slices only you know, is put in with `minipeft.inject`.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

from torch import nn

from minipeft.adapters.names import DEFAULT, check_new_name, give_name
from minipeft.adapters.protocol import innermost, linear_shape
from minipeft.adapters.ready import check_model
from minipeft.adapters.state import named_adapters, refuse_merged
from minipeft.adapters.targets import (
    Chosen,
    Head,
    HeadWarning,
    Names,
    Survey,
    Target,
    Targets,
    adapter_targets,
    frozen_heads,
    per_name,
    settled,
    survey,
)
from minipeft.inject import build, freeze, restoring, swap
from minipeft.layers.attention import LoRAMultiheadAttention
from minipeft.layers.conv import LoRAConv
from minipeft.layers.dora import DoRAConv, DoRAEmbedding, DoRALinear
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.layers.mixture import LoRAExperts
from minipeft.lora import LoRALinear
from minipeft.model.peft_words import LayerOptions, in_our_words
from minipeft.model.rows import refuse_rows
from minipeft.model.start_later import noted
from minipeft.quantized.embedding import NF4Embedding
from minipeft.quantized.experts import NF4Experts

LayerClass = Callable[..., Any]


def layer_class(module: nn.Module | nn.Parameter, *, dora: bool = False) -> LayerClass | None:
    """The class of adapter layer for this module or 3-D parameter; None where there is none."""
    if isinstance(module, nn.Parameter):
        return LoRAExperts if module.dim() == 3 and not dora else None
    plain = innermost(module)
    if isinstance(plain, nn.MultiheadAttention):
        return None if dora else LoRAMultiheadAttention
    if isinstance(plain, NF4Experts) or hasattr(plain, "original"):
        return None if dora else LoRAExperts
    if isinstance(plain, nn.Embedding | NF4Embedding):
        return DoRAEmbedding if dora else LoRAEmbedding
    if isinstance(plain, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return DoRAConv if dora else LoRAConv
    if linear_shape(plain) is not None:
        return DoRALinear if dora else LoRALinear
    return None


def why_no_layer(place: str, module: nn.Module | nn.Parameter, *, dora: bool) -> str:
    """What to say of a module without a `layer_class`: what it is, and what to name instead."""
    what, own = f"is a {type(module).__name__}", place.rpartition(".")[2]
    if isinstance(module, nn.Module) and layer_class(module) is None:
        parts = survey(module)
        inside = [f"{own}.{n}" for n, part in parts.everything.items()
                  if n not in parts.in_attention and layer_class(part, dora=dora)]  # fmt: skip
        if inside:
            return f"{what}, which holds layers to wrap: name {inside[:6]} ({len(inside)} in all)"
    kinds = "linear layers, embeddings and convolutions (nn.Conv1d to Conv3d)"
    if dora:
        return f"{what}; DoRA wraps {kinds}"
    return f"{what}; LoRA wraps {kinds}, nn.MultiheadAttention and 3-D weights of experts"


@in_our_words
def inject_lora(
    model: nn.Module,
    target: Target,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float] | None = None,
    *,
    name: str = DEFAULT,
    exclude: Target | None = None,
    head: Head = None,
    **lora: Unpack[LayerOptions],
) -> Names:
    """Wrap the layers that `target` names in LoRA layers, in place.

    Linear layers get LoRALinear, embeddings LoRAEmbedding, and so on (the table is at the top of
    this file).  `rank` and `alpha` are numbers, or dicts from patterns to numbers (the first that
    fits a name counts).  Further keywords go to the layers: dropout, rank_stabilized, init, dtype;
    `dora=True` makes them DoRA layers.  Every parameter that no adapter owns is frozen.  `head`
    names the output head of a model of your own, which "all-linear" leaves out.  A new head of a
    Hugging Face model (a classifier) stays frozen, and a HeadWarning says so, unless `head` names
    it or an adapter trains it already (`train_modules`).  Returns the names of the layers;
    `.report()` of the result says what each became, and what "all-linear" left out and why.

    Another `name` makes one more adapter, over layers that may have others: layers stack, and each
    adds to what those below compute.  The new adapter is on and trainable; others stay as they are.
    "default" may be injected more than once, each time over layers that have no adapter.

    Raises:
        ValueError: nothing matches, or something that LoRA cannot wrap; a layer is wrapped already
            and no name is given, or the name is taken; rank or alpha are out of range; another
            adapter is merged, or rows use adapters of their own.  The model is then as it was.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> inject_lora(model, ["0"], rank=2)
    ['0']
    """
    check_model("inject_lora", model)
    places = survey(model, head)
    plan = plan_lora("inject_lora", model, places, target, rank, alpha, exclude, name, lora)
    return wrap_in_lora(model, plan, {})


class LoRAPlan(NamedTuple):
    """Which module gets which layer, of which rank and alpha; nothing is built yet."""

    found: Targets
    kinds: dict[str, LayerClass]
    ranks: dict[str, Chosen]
    alphas: dict[str, Chosen]
    settings: dict[str, Any]  # further keywords of the layers
    name: str
    heads: dict[str, str]  # new ones that stay frozen, and a note on each


def plan_lora(
    caller: str,
    model: nn.Module,
    places: Survey,
    target: Target,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float] | None,
    exclude: Target | None,
    name: str,
    lora: Mapping[str, object],
) -> LoRAPlan:
    """Choose the layers of `inject_lora`.

    Raises:
        ValueError: as `inject_lora`, but for what the layers themselves refuse.
    """
    further = name != DEFAULT  # it may lie over others
    if further:
        check_new_name(caller, model, name)
        refuse_rows(caller, model)
        refuse_merged(caller, named_adapters(model))
    settings = dict(lora)
    dora = bool(settings.pop("dora", False))
    found = adapter_targets(places, target, exclude, stack=further)
    kinds: dict[int, LayerClass] = {}
    for place, module in found.chosen.items():
        if (kind := layer_class(module, dora=dora)) is None:
            raise ValueError(f"target: {place!r} {why_no_layer(place, module, dora=dora)}")
        kinds[id(module)] = kind
    modules = settled(caller, places, found.chosen)
    ranks, alphas = per_name("rank", rank, modules), per_name("alpha", alpha, modules)
    kind_of = {place: kinds[id(module)] for place, module in modules.items()}
    heads = frozen_heads(places, modules.keys())
    found = found._replace(chosen=modules, notes=found.notes | heads)
    return LoRAPlan(found, kind_of, ranks, alphas, settings, name, heads)


def wrap_in_lora(model: nn.Module, plan: LoRAPlan, quantized: Mapping[str, nn.Module]) -> Names:
    """Build the layers of a plan, and put them in; or leave the model as it was.

    `quantized` modules take the places of their names with them, below the layers or alone.
    """
    ranks, alphas = plan.ranks, plan.alphas
    made_of: dict[str, str] = {}

    def make(name: str, module: nn.Module | nn.Parameter) -> nn.Module:
        base, kind = quantized.get(name, module), plan.kinds[name]
        own = dict(plan.settings)
        if (for_weight := getattr(own.get("init"), "for_weight", None)) and base is not module:
            own["init"] = for_weight(module)  # it wants the weight from before quantisation
        parent = model.get_submodule(name.rpartition(".")[0])
        if kind is LoRAExperts:
            own["transposed"] = bool(getattr(parent, "is_transposed", False))
        layer = noted(kind(base, ranks[name].value, alphas[name].value, **own), own.get("init"))
        if isinstance(module, nn.Parameter):  # it has no mode to take over
            layer.train(parent.training)
        patterns = [
            f"{what} {chosen.value:g} by {chosen.pattern!r}"
            for what, chosen in (("rank", ranks[name]), ("alpha", alphas[name]))
            if chosen.pattern is not None
        ]
        made_of[name] = ", ".join([f"{kind.__name__}({layer.extra_repr()})", *patterns])
        return layer

    for head, note in plan.heads.items():
        warnings.warn(f"{head} {note}", HeadWarning, stacklevel=4)
    with restoring(model):
        wrapped = build(plan.found.chosen, make)
        swap(model, {**quantized, **wrapped})
        freeze(model)
        if plan.name != DEFAULT:
            give_name(plan.name, wrapped.values())
    return Names(wrapped, plan.found.left_out, made_of, plan.found.notes)
