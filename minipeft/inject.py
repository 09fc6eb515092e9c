"""Put a layer into any model, and leave the model as it was if that fails.

The part that matters is `swap`: find the parent, set the attribute.  All new modules are built
before the first is put in, so an error changes nothing; a module that the model holds under
several names is wrapped once and put back under each.

    names = inject_lora(model, ["q_proj", "v_proj"], rank=8)       LoRA over the layers' own weights
    names = inject(model, target, wrap)                            any module of your own

model/quantize.py does the same with 4-bit layers.  Read next: nf4.py.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from minipeft.adapters.atomic import check_ready, restoring
from minipeft.adapters.buffers import release
from minipeft.adapters.state import freeze
from minipeft.adapters.targets import (
    Head,
    Names,
    Target,
    Targets,
    adapter_targets,
    expert_weights,
    find,
    names_of_ends,
    per_name,
    visible_modules,
)
from minipeft.layers.mixture import LoRAExperts
from minipeft.model.kinds import layer_class
from minipeft.model.peft_words import in_our_words

# called with the model after modules were swapped (io makes `save_pretrained` write adapters)
after_swap: list[Callable[[nn.Module], None]] = [release]
Modules = dict[str, Any]  # modules, and 3-D parameters of experts


def tell(model: nn.Module) -> None:
    """Say to those who listen that modules were swapped; each looks at the whole model."""
    for listener in after_swap:
        listener(model)


def swap(
    model: nn.Module, replacements: Mapping[str, nn.Module | nn.Parameter], *, telling: bool = True
) -> None:
    """Put each module (or parameter) in the place of its name; if one cannot be, put all back.

    `telling` False: the caller has more to swap, and calls `tell` at the end.
    """
    places = {name: model.get_submodule(name.rpartition(".")[0]) for name in replacements}
    before = {name: getattr(places[name], name.rpartition(".")[2]) for name in replacements}

    def put(name: str, value: nn.Module | nn.Parameter) -> None:
        own = name.rpartition(".")[2]
        places[name]._parameters.pop(own, None)  # torch puts no module where a parameter is
        setattr(places[name], own, value)

    try:
        for name, value in replacements.items():
            put(name, value)
        if telling:
            tell(model)
    except BaseException:
        for name, value in before.items():
            put(name, value)
        for listener in after_swap:
            with suppress(Exception):
                listener(model)
        raise


def settled(caller: str, model: nn.Module, modules: Mapping[str, Any]) -> Modules:
    """The modules under every name that the model has for them; none lies inside another."""
    nested = [n for n in modules if any(n[:i] in modules for i, c in enumerate(n) if c == ".")]
    if nested:
        raise ValueError(
            f"{caller}: {nested} lie inside other targets; name one or the other (exclude=, skip=)"
        )
    chosen = {id(module) for module in modules.values()}
    everything: dict[str, Any] = {**visible_modules(model), **expert_weights(model)}
    return {n: m for n, m in everything.items() if id(m) in chosen}


def build(
    modules: Mapping[str, Any], make: Callable[[str, Any], nn.Module]
) -> dict[str, nn.Module]:
    """make(name, module) for each; a module under several names is made once."""
    made: dict[int, nn.Module] = {}
    result = {}
    for name, module in modules.items():
        if id(module) not in made:
            try:
                made[id(module)] = make(name, module)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from error
        result[name] = made[id(module)]
    return result


def check_model(caller: str, model: object) -> None:
    """Raise unless this is a module with submodules to replace, all there and whole."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a module, got {type(model).__name__}")
    if not any(True for _ in model.children()) and not expert_weights(model):
        raise ValueError(
            f"{caller}: {type(model).__name__} has no submodules to replace; wrap it yourself"
        )
    check_ready(caller, model)


def inject(
    model: nn.Module,
    target: Target,
    wrap: Callable[[nn.Module], nn.Module],
    *,
    head: Head = None,
) -> Names:
    """Replace every module that `target` names by `wrap(module)`; any kind of module will do.

    Freezes every parameter that no adapter owns.  Returns the names; see adapters/targets.py for
    what a target may be ("all-linear" means linear layers here too).

    Raises:
        ValueError: nothing matches; `wrap` refused.  The model is then as it was.
        TypeError: `wrap` returned no module.
    """
    check_model("inject", model)
    if isinstance(target, str) and target.lower() == "all-linear":
        found = adapter_targets(model, target, head=head)
    else:
        target = target if isinstance(target, str) or callable(target) else list(target)
        found = Targets(find(model, target), {}, names_of_ends(model, target))
    modules = settled("inject", model, found.chosen)

    def make(name: str, module: nn.Module) -> nn.Module:
        made = wrap(module)
        if not isinstance(made, nn.Module):
            raise TypeError(f"wrap returned {type(made).__name__}, expected a module")
        return made

    with restoring(model):
        swap(model, build(modules, make))
        freeze(model)
    return Names(modules, found.left_out, notes=found.notes)


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

    Each kind of layer gets the layer of model/kinds.py: linear ones LoRALinear, embeddings
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
                f"{'DoRA' if dora else 'LoRA'} layer (model/kinds.py lists those there are)"
            )
