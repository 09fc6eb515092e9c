"""Wrap layers of a model in LoRA: which adapter layer goes over which kind of module.

    nn.Linear, Conv1D, NF4Linear, linear-like    LoRALinear             DoRALinear
    nn.Embedding, NF4Embedding                   LoRAEmbedding          DoRAEmbedding
    nn.Conv1d, Conv2d, Conv3d                    LoRAConv               DoRAConv
    nn.MultiheadAttention                        LoRAMultiheadAttention
    3-D weights of experts, NF4Experts           LoRAExperts

LoRAFusedLinear, whose slices only you know, is put in with `minipeft.inject`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from minipeft.adapters.protocol import innermost, linear_shape
from minipeft.adapters.targets import Head, Names, Target, adapter_targets, per_name
from minipeft.inject import build, check_model, freeze, restoring, settled, swap
from minipeft.layers.attention import LoRAMultiheadAttention
from minipeft.layers.conv import LoRAConv
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.layers.mixture import LoRAExperts
from minipeft.lora import LoRALinear
from minipeft.model.peft_words import in_our_words
from minipeft.quantized.embedding import NF4Embedding
from minipeft.quantized.experts import NF4Experts
from minipeft.variants.dora import DoRALinear
from minipeft.variants.dora_layers import DoRAConv, DoRAEmbedding

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


@in_our_words
def inject_lora(
    model: nn.Module,
    target: Target,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float] | None = None,
    *,
    exclude: Target | None = None,
    head: Head = None,
    **lora: object,
) -> Names:
    """Wrap the layers that `target` names in LoRA layers, in place.

    Each kind of layer gets the layer of the table above: linear ones LoRALinear, embeddings
    LoRAEmbedding, and so on.  `rank` and `alpha` are numbers, or dicts from patterns to numbers
    (the first that fits a name counts).  Further keywords go to the layers: dropout,
    rank_stabilized, init, dtype; `dora=True` makes them DoRA layers.  Freezes every parameter that
    no adapter owns.  `head` names the output head of a model of your own, which "all-linear" leaves
    out.  Returns the names; `.report()` of the result says what was made of each, and what
    "all-linear" left out and why.

    Raises:
        ValueError: nothing matches, or something that LoRA cannot wrap; a layer is wrapped
            already (see add_adapter); rank or alpha are out of range.  The model is then as it
            was.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> inject_lora(model, ["0"], rank=2)
    ['0']
    """
    return inject_over(model, target, rank, alpha, exclude, lora, {}, head=head)


def inject_over(
    model: nn.Module,
    target: Target,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float] | None,
    exclude: Target | None,
    lora: Mapping[str, object],
    quantized: Mapping[str, nn.Module],
    *,
    stack: bool = False,
    head: Head = None,
) -> Names:
    """`inject_lora` on a model whose modules `quantized` take the places of their names too.

    `stack` wraps layers that have an adapter already once more.
    """
    check_model("inject_lora", model)
    settings = dict(lora)
    dora = bool(settings.pop("dora", False))
    target = target if isinstance(target, str) or callable(target) else list(target)
    found = adapter_targets(model, target, exclude, stack=stack, head=head)
    _check_kinds(found.chosen, dora)
    modules = settled("inject_lora", model, found.chosen)
    ranks, alphas = per_name("rank", rank, modules), per_name("alpha", alpha, modules)
    made_of: dict[str, str] = {}

    def make(name: str, module: nn.Module | nn.Parameter) -> nn.Module:
        base = quantized.get(name, module)
        kind = layer_class(base, dora=dora)
        assert kind is not None  # of every module, quantised or not
        own = dict(settings)
        if (for_weight := getattr(own.get("init"), "for_weight", None)) and base is not module:
            own["init"] = for_weight(module)  # it wants the weight from before quantisation
        parent = model.get_submodule(name.rpartition(".")[0])
        over_experts = kind is LoRAExperts
        if over_experts:
            own["transposed"] = bool(getattr(parent, "is_transposed", False))
        layer: nn.Module = kind(base, ranks[name].value, alphas[name].value, **own)
        if isinstance(module, nn.Parameter):  # it has no mode to take over
            layer.train(parent.training)
        patterns = [
            f"{what} {chosen.value:g} by {chosen.pattern!r}"
            for what, chosen in (("rank", ranks[name]), ("alpha", alphas[name]))
            if chosen.pattern is not None
        ]
        made_of[name] = ", ".join([f"{kind.__name__}({layer.extra_repr()})", *patterns])
        return layer

    with restoring(model):
        wrapped = build(modules, make)
        swap(model, {**quantized, **wrapped})
        freeze(model)
    return Names(wrapped, found.left_out, made_of, found.notes)


def _check_kinds(modules: Mapping[str, Any], dora: bool) -> None:
    for name, module in modules.items():
        if layer_class(module, dora=dora) is None:
            raise ValueError(
                f"target: {name!r} is a {type(module).__name__}, for which there is no "
                f"{'DoRA' if dora else 'LoRA'} layer (model/inject_lora.py lists those there are)"
            )
