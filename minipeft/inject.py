"""Put a layer into any model, and leave the model as it was if that fails.

The part that matters is `swap`: find the parent, set the attribute.  All new modules are built
before the first is put in, so an error changes nothing; a module that the model holds under
several names is wrapped once and put back under each.

    names = inject_lora(model, ["q_proj", "v_proj"], rank=8)       LoRA over dense layers
    names = quantize_model(model)                                  NF4, frozen
    names = inject_qlora(model, "all-linear", rank=8)              both: QLoRA

Read next: nf4.py.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from minipeft.adapters import freeze
from minipeft.lora import LoRALinear
from minipeft.protocol import has_stored_weight, is_packed, linear_shape
from minipeft.qlora import NF4Linear, has_own_forward
from minipeft.targets import (
    Names,
    Target,
    find,
    head_reasons,
    in_attention,
    linear_targets,
    per_name,
    visible_modules,
)

# called with the model after modules were swapped (io makes `save_pretrained` write adapters)
after_swap: list[Callable[[nn.Module], None]] = []
Modules = dict[str, nn.Module]


def swap(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of its name; if one cannot be, put all back."""
    places = {name: model.get_submodule(name.rpartition(".")[0]) for name in replacements}
    before = {name: model.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            setattr(places[name], name.rpartition(".")[2], module)
    except BaseException:
        for name, module in before.items():
            setattr(places[name], name.rpartition(".")[2], module)
        raise
    for listener in after_swap:
        listener(model)


def _settled(caller: str, model: nn.Module, modules: Mapping[str, nn.Module]) -> Modules:
    """The modules under every name that the model has for them; none lies inside another."""
    nested = [n for n in modules for outer in modules if n.startswith(f"{outer}.")]
    if nested:
        raise ValueError(
            f"{caller}: {nested} lie inside other targets; name one or the other (exclude=, skip=)"
        )
    chosen = {id(module) for module in modules.values()}
    return {n: m for n, m in visible_modules(model).items() if id(m) in chosen}


@contextmanager
def _restoring(model: nn.Module) -> Iterator[None]:
    """On an error, give every parameter its `requires_grad` back: wrapping freezes bases."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        raise


def build(
    modules: Mapping[str, nn.Module], make: Callable[[str, nn.Module], nn.Module]
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


def _check_model(caller: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a module, got {type(model).__name__}")
    if not any(True for _ in model.children()):
        raise ValueError(
            f"{caller}: {type(model).__name__} has no submodules to replace; wrap it yourself"
        )


def inject(model: nn.Module, target: Target, wrap: Callable[[nn.Module], nn.Module]) -> Names:
    """Replace every module that `target` names by `wrap(module)`; any kind of module will do.

    Freezes every parameter that no adapter owns.  Returns the names; see targets.py for what a
    target may be ("all-linear" means linear layers here too).

    Raises:
        ValueError: nothing matches; `wrap` refused.  The model is then as it was.
        TypeError: `wrap` returned no module.
    """
    _check_model("inject", model)
    left_out: dict[str, str] = {}
    if isinstance(target, str) and target.lower() == "all-linear":
        modules, left_out = linear_targets(model, target)
    else:
        modules = find(model, target)
    modules = _settled("inject", model, modules)

    def make(name: str, module: nn.Module) -> nn.Module:
        made = wrap(module)
        if not isinstance(made, nn.Module):
            raise TypeError(f"wrap returned {type(made).__name__}, expected a module")
        return made

    with _restoring(model):
        swap(model, build(modules, make))
    freeze(model)
    return Names(modules, left_out)


def inject_lora(
    model: nn.Module,
    target: Target,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float] | None = None,
    *,
    exclude: Target | None = None,
    **lora: object,
) -> Names:
    """Wrap the linear layers that `target` names in LoRALinear, in place.

    `rank` and `alpha` are numbers, or dicts from patterns to numbers (the first that fits a name
    counts).  Further keywords go to LoRALinear: dropout, rank_stabilized, init, dtype.  Freezes
    every parameter that no adapter owns.  Returns the names; `.left_out` of the result says what
    "all-linear" passed over and why.

    Raises:
        ValueError: nothing or something else than a linear layer matches, a layer is wrapped
            already, rank or alpha are out of range.  The model is then as it was.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> inject_lora(model, ["0"], rank=2)
    ['0']
    """
    return _inject(model, target, rank, alpha, exclude, lora, {})


def _inject(
    model: nn.Module,
    target: Target,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float] | None,
    exclude: Target | None,
    lora: Mapping[str, object],
    quantized: Mapping[str, nn.Module],
) -> Names:
    _check_model("inject_lora", model)
    modules, left_out = linear_targets(model, target, exclude)
    modules = _settled("inject_lora", model, modules)
    ranks, alphas = per_name("rank", rank, modules), per_name("alpha", alpha, modules)

    def make(name: str, module: nn.Module) -> nn.Module:
        base = quantized.get(name, module)
        return LoRALinear(base, ranks[name], alphas[name], **lora)  # type: ignore[arg-type]

    with _restoring(model):
        wrapped = build(modules, make)
        swap(model, {**quantized, **wrapped})
    freeze(model)
    if skipped := [name for name, why in left_out.items() if "MultiheadAttention" in why]:
        warnings.warn(
            f"all-linear left out {skipped}: LoRA cannot reach into nn.MultiheadAttention yet",
            stacklevel=3,
        )
    return Names(wrapped, left_out)


def _take_hooks(layer: nn.Module, module: nn.Module) -> None:
    """Let the layer run the module's hooks; their handles still remove them."""
    for name, hooks in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and (
            "state_dict" not in name
        ):
            vars(layer)[name] = hooks


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of parameters that two different modules hold (tied embeddings)."""
    owner: dict[int, int] = {}
    shared = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if owner.setdefault(id(parameter), id(module)) != id(module):
                shared.add(id(parameter))
    return shared


def quantizable(
    model: nn.Module, *, skip: Target | tuple[()] = (), also: tuple[type[nn.Module], ...] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The linear layers that `quantize_model` would quantise, and why it leaves out the others."""
    skipped = {} if skip == () else find(model, skip, caller="skip")
    left_out = {**in_attention(model), **head_reasons(model)}
    float32 = {
        part
        for module in model.modules()
        for part in getattr(module, "_keep_in_fp32_modules", None) or ()
    }
    shared = _shared_weights(model)
    chosen: dict[str, nn.Module] = {}
    for name, module in visible_modules(model).items():
        if linear_shape(module) is None or is_packed(module):
            continue
        if name in skipped or any(name.startswith(f"{outer}.") for outer in skipped):
            left_out[name] = "skipped"
        elif any(part in float32 for part in name.split(".")):
            left_out[name] = "kept in float32 (_keep_in_fp32_modules)"
        elif not isinstance(module, nn.Linear):
            left_out[name] = f"{type(module).__name__} is no nn.Linear"
        elif not has_stored_weight(module):
            left_out[name] = "its weight is computed (weight norm, a parametrisation)"
        elif "forward" in vars(module):
            left_out[name] = "its forward was replaced on the instance (offloading?)"
        elif id(module.weight) in shared:
            left_out[name] = "its weight is tied to another module's"
        elif has_own_forward(module) and type(module) not in also:
            left_out[name] = f"{type(module).__name__} has a forward of its own"
        elif name not in left_out:
            chosen[name] = module
    return chosen, {name: why for name, why in left_out.items() if name not in chosen}


def _quantized(
    model: nn.Module,
    skip: Target | tuple[()],
    also: tuple[type[nn.Module], ...],
    nf4: Mapping[str, object],
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    _check_model("quantize_model", model)
    chosen, left_out = quantizable(model, skip=skip, also=also)
    if not chosen:
        raise ValueError(f"quantize_model: no layer to quantise; left out: {left_out}")
    chosen = _settled("quantize_model", model, chosen)
    settings = {"block_size": 64, "double_quant": True, "compute_dtype": None} | dict(nf4)
    if unknown := set(settings) - {"block_size", "double_quant", "compute_dtype"}:
        raise TypeError(f"quantize_model: unknown arguments {sorted(unknown)}")

    def make(name: str, module: nn.Module) -> nn.Module:
        layer = NF4Linear.from_weight(module.weight, module.bias, **settings)  # type: ignore[arg-type]
        _take_hooks(layer, module)
        return layer.train(module.training)

    layers = build(chosen, make)
    for name, why in left_out.items():
        if "forward of its own" in why:
            warnings.warn(f"quantize_model left {name} dense: {why}; see also=", stacklevel=3)
    return layers, left_out


def quantize_model(
    model: nn.Module,
    *,
    skip: Target | tuple[()] = (),
    also: tuple[type[nn.Module], ...] = (),
    **nf4: object,
) -> Names:
    """Replace every nn.Linear it may by NF4Linear, in place; all codes first, then the swap.

    Left dense: the output head, tied weights, `_keep_in_fp32_modules`, new heads, what `skip`
    names, and, with a warning, subclasses of nn.Linear with a forward of their own; `also` admits
    such classes if you know that they compute x W^T + b.  Keywords: block_size, double_quant,
    compute_dtype.  Returns the names; `.left_out` says what stayed dense and why.

    Raises:
        ValueError: nothing to quantise, or weights that are not finite; the model is as it was.
    """
    layers, left_out = _quantized(model, skip, also, nf4)
    swap(model, layers)
    return Names(layers, left_out)


def inject_qlora(
    model: nn.Module,
    target: Target,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float] | None = None,
    *,
    exclude: Target | None = None,
    skip: Target | tuple[()] = (),
    also: tuple[type[nn.Module], ...] = (),
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: object = None,
    **lora: object,
) -> Names:
    """QLoRA in place: quantise every layer that `quantize_model` would, wrap the targets in LoRA.

    Arguments as of `quantize_model` and `inject_lora`.  A target that stays dense is wrapped all
    the same.  Returns the wrapped names; `.left_out` says what stayed dense, and why.

    Raises:
        ValueError: as either; the model is then as it was.
    """
    nf4 = {
        "block_size": block_size, "double_quant": double_quant, "compute_dtype": compute_dtype
    }  # fmt: skip
    target = target if isinstance(target, str) or callable(target) else list(target)
    linear_targets(model, target, exclude)  # a wrong target should not cost the quantisation
    layers, left_out = _quantized(model, skip, also, nf4)
    names = _inject(model, target, rank, alpha, exclude, lora, layers)
    names.left_out = left_out | names.left_out
    return names
