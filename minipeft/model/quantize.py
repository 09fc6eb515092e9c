"""4-bit layers in any model, and dense ones again; QLoRA in one call.

    names = quantize_model(model)                        NF4, frozen; .left_out: what stays dense
    names = inject_qlora(model, "all-linear", rank=8)    the same, with LoRA on top
    names = dequantize_model(model)                      plain layers with the rounded weights

All codes are made before the first layer is put in, so an error changes nothing.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import nn

from minipeft.adapters.linearity import why_no_float, why_not_replaceable
from minipeft.adapters.names import DEFAULT
from minipeft.adapters.protocol import (
    has_stored_weight,
    innermost,
    is_adapter,
    is_conv1d,
    is_packed,
)
from minipeft.adapters.ready import check_model
from minipeft.adapters.state import named_adapters
from minipeft.adapters.targets import (
    Head,
    HeadWarning,
    Names,
    Survey,
    Target,
    find,
    is_within,
    likely_head,
    settled,
    survey,
)
from minipeft.adapters.wrapper import take_hooks
from minipeft.inject import Modules, build, restoring, swap
from minipeft.model.dense_again import forget_codes
from minipeft.model.inject_lora import plan_lora, wrap_in_lora
from minipeft.model.peft_words import LayerOptions, in_our_words
from minipeft.qlora import NF4Linear
from minipeft.quantized.conv1d import NF4Conv1D
from minipeft.quantized.embedding import NF4Embedding
from minipeft.quantized.experts import NF4Experts

Skip = Target | tuple[()]


class Rounding(TypedDict, total=False):
    """How weights are rounded to 4 bits, and multiplied by; see NF4Linear."""

    block_size: int
    double_quant: bool
    compute_dtype: torch.dtype | None


def _keeps_dense(
    module: nn.Module | nn.Parameter,
    also: tuple[type[nn.Module], ...],
    embeddings: bool,
    experts: bool,
) -> str | None:
    """Why a layer, or a weight of experts, cannot be replaced by a 4-bit one; None if it can."""
    if isinstance(module, nn.Parameter):
        return None if experts else "a 3-D weight of experts (experts=True quantises it)"
    if isinstance(module, nn.Embedding):
        if not embeddings:
            return "an embedding (embeddings=True quantises it)"
        if module.max_norm is not None:
            return "max_norm rescales its rows in forward"
    elif is_adapter(module):
        return f"under an adapter ({type(module).__name__}); quantise first, then inject"
    elif not isinstance(module, nn.Linear) and not is_conv1d(module):
        return f"{type(module).__name__} is no nn.Linear"
    vouched = type(module) in also and has_stored_weight(module) and "forward" not in vars(module)
    if vouched:
        return why_no_float(module.weight)  # type: ignore[arg-type]
    return why_not_replaceable(module)


def quantizable(
    places: Survey,
    *,
    skip: Skip = (),
    also: tuple[type[nn.Module], ...] = (),
    embeddings: bool = False,
    experts: bool = False,
) -> tuple[dict[str, nn.Module | nn.Parameter], dict[str, str]]:
    """What `quantize_model` would quantise, and why it leaves out the others, by name.

    Every weight of two or more axes is in one of the two, a 3-D one under its own name.
    """
    others, skipped = other_weights(places), set()
    if skip != ():
        named = find(places, skip, caller="skip").chosen
        skipped = {n for n in (*places.everything, *others) if is_within(n, named)}
    model, outside = places.model, {**places.in_attention, **places.heads}
    float32 = {
        part
        for module in model.modules()
        for part in getattr(module, "_keep_in_fp32_modules", None) or ()
    }
    chosen: dict[str, nn.Module | nn.Parameter] = {}
    left_out: dict[str, str] = {}

    def why_dense(name: str, layer: nn.Module | nn.Parameter) -> str | None:
        if name in skipped:
            return "skipped"
        if not float32.isdisjoint(name.split(".")):
            return "kept in float32 (_keep_in_fp32_modules)"
        if reason := outside.get(name) or _keeps_dense(layer, also, embeddings, experts):
            return reason
        weight = layer if isinstance(layer, nn.Parameter) else layer._parameters.get("weight")
        return "its weight is tied to another module's" if id(weight) in places.shared else None

    for name, layer in places.everything.items():
        known = name in places.shapes or isinstance(layer, nn.Parameter | nn.Embedding)
        if not known or (isinstance(layer, nn.Module) and is_packed(innermost(layer))):
            continue
        if reason := why_dense(name, layer):
            left_out[name] = reason
        else:
            chosen[name] = layer
    told = {*chosen, *left_out, *outside}
    for name, reason in others.items():
        if not is_within(name, told):
            left_out[name] = "skipped" if name in skipped else reason
    return chosen, {**{n: w for n, w in outside.items() if n not in chosen}, **left_out}


def other_weights(places: Survey) -> dict[str, str]:
    """Weights of two or more axes that no kind of 4-bit layer can hold, and why.

    A module of torch's own comes under its name; parameters of an attention, or of a module of your
    own, come under theirs.
    """
    found: dict[str, str] = {}
    for name, module in {"": places.model, **places.modules}.items():
        if is_packed(module) or is_adapter(module):
            continue
        kind = type(module).__name__
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or not parameter.is_floating_point():
                continue
            path = f"{name}.{own}" if name else own
            if isinstance(module, nn.MultiheadAttention):
                found[path] = f"{kind} multiplies by it itself"
            elif type(module).__module__.startswith("torch.nn") and not isinstance(
                module, nn.ParameterList | nn.ParameterDict
            ):
                found[name or own] = f"{kind} is no linear layer"
            else:
                found[path] = f"a bare parameter of a {kind}, which is no linear layer"
    return found


def check_experts(caller: str, model: nn.Module, names: Iterable[str]) -> None:
    """Raise unless the modules that hold these 3-D weights index them one expert at a time."""
    for name in names:
        holder = model.get_submodule(name.rpartition(".")[0])
        how = getattr(getattr(holder, "config", None), "_experts_implementation", None)
        if how not in (None, "eager"):
            raise ValueError(
                f"{caller}: {name} is read whole by the {how!r} implementation of experts; "
                "call model.set_experts_implementation('eager') first"
            )


class CodesPlan(NamedTuple):
    """What becomes 4-bit, and what stays dense and why; no code is made yet."""

    modules: Modules  # and weights of experts
    left_out: dict[str, str]
    notes: dict[str, str]  # of what looks like the head
    settings: dict[str, Any]


def _plan_codes(
    caller: str,
    places: Survey,
    skip: Skip,
    also: tuple[type[nn.Module], ...],
    embeddings: bool,
    experts: bool,
    nf4: Rounding,
) -> CodesPlan:
    chosen, left_out = quantizable(
        places, skip=skip, also=also, embeddings=embeddings, experts=experts
    )
    if not chosen:
        raise ValueError(_nothing_to_quantise(caller, places, left_out))
    if embeddings and not any(isinstance(module, nn.Embedding) for module in chosen.values()):
        reasons = {n: left_out[n] for n, m in places.modules.items()
                   if isinstance(m, nn.Embedding)}  # fmt: skip
        raise ValueError(f"{caller}: embeddings=True, but none may be quantised: {reasons}")
    weights = [n for n, layer in chosen.items() if isinstance(layer, nn.Parameter)]
    if experts and not weights:
        raise ValueError(f"{caller}: experts=True, but no 3-D weight may be quantised")
    check_experts(caller, places.model, weights)
    settings = {"block_size": 64, "double_quant": True, "compute_dtype": None, **nf4}
    modules = settled(caller, places, chosen)
    return CodesPlan(modules, left_out, likely_head(places, modules), settings)


def _nothing_to_quantise(caller: str, places: Survey, left_out: Mapping[str, str]) -> str:
    packed = [n for n, m in places.model.named_modules() if is_packed(m)]
    wrapped = [n for n, m in places.modules.items() if is_adapter(m) and n in places.shapes]
    if packed:
        return (
            f"{caller}: the layers are 4-bit already ({packed[0]}, {len(packed)} in all); "
            "call inject_lora, which over them makes QLoRA"
        )
    if wrapped:
        return (
            f"{caller}: {wrapped[0]} ({len(wrapped)} in all) has an adapter, and layers "
            "under adapters are not quantised: quantise first, then inject or load the adapter"
        )
    return f"{caller}: no layer to quantise; left out: {left_out}"


def _make_codes(model: nn.Module, plan: CodesPlan) -> dict[str, nn.Module]:
    """The 4-bit layers by name."""
    settings = plan.settings

    def make(name: str, module: Any) -> nn.Module:
        layer: nn.Module
        if isinstance(module, nn.Parameter):
            return NF4Experts.from_weight(module, **settings)
        if isinstance(module, nn.Embedding):
            table = {k: v for k, v in settings.items() if k != "compute_dtype"}
            layer = NF4Embedding.from_embedding(module, **table)
        elif isinstance(module, nn.Linear):  # not from_linear: it refuses what `also` admits
            layer = NF4Linear.from_weight(module.weight, module.bias, **settings)
        else:
            layer = NF4Conv1D.from_linear(module, **settings)
        take_hooks(layer, module)
        return layer.train(module.training)

    layers = build(plan.modules, make)
    for name, why in plan.left_out.items():
        if "forward of its own" in why:
            hint = f"also=({type(model.get_submodule(name)).__name__},) makes it 4-bit all the same"
            warnings.warn(f"quantize_model left {name} dense: {why}; {hint}", stacklevel=4)
    for name, note in plan.notes.items():
        warnings.warn(f"{name} is made 4-bit, and {note}", HeadWarning, stacklevel=4)
    return layers


@in_our_words
def quantize_model(
    model: nn.Module,
    *,
    skip: Skip = (),
    also: tuple[type[nn.Module], ...] = (),
    embeddings: bool = False,
    experts: bool = False,
    head: Head = None,
    **nf4: Unpack[Rounding],
) -> Names:
    """Replace linear layers by 4-bit ones, in place.

    nn.Linear becomes NF4Linear, transformers' Conv1D becomes NF4Conv1D.  With `embeddings`,
    nn.Embedding becomes NF4Embedding; with `experts`, 3-D weights of mixtures of experts become
    NF4Experts, for models that index one expert at a time.  These stay dense: the output head, tied
    weights, `_keep_in_fp32_modules`, new heads, what `skip` names, and, with a warning, subclasses
    that compute something else than nn.Linear (nn.Embedding) for a small batch; `also` admits such
    classes.  `head` names the output head of a model of your own (a name, a module, a list of them;
    () if there is none); without it, a layer that looks like a head gives a HeadWarning.  Keywords:
    block_size, double_quant, compute_dtype.  Returns the names; `.left_out` says of every other
    weight of two or more axes why it stayed dense.

    Raises:
        ValueError: nothing to quantise, weights that are not finite, `embeddings` of a model
            whose embeddings are all tied; the model is as it was.
    """
    check_model("quantize_model", model)
    plan = _plan_codes("quantize_model", survey(model, head), skip, also, embeddings, experts, nf4)
    layers = _make_codes(model, plan)
    with restoring(model):
        swap(model, layers)
    return Names(layers, plan.left_out, notes=plan.notes)


def dequantize_model(model: nn.Module) -> list[str]:
    """Replace every 4-bit layer by the dense one it stands for, in place, under adapters too.

    The weights are the rounded ones, in the dtype that the dense layers had, and frozen; outputs
    change by the order of sums only.  A Hugging Face model no longer says that it is 4-bit, so that
    `from_pretrained` can load what `save_pretrained` writes.  Returns the names.

    Raises:
        ValueError: the model has no 4-bit layer.
    """
    check_model("dequantize_model", model)
    packed = {n: m for n, m in model.named_modules(remove_duplicate=False) if is_packed(m)}
    if not packed:
        raise ValueError("dequantize_model: the model has no 4-bit layer")

    def make(name: str, layer: Any) -> nn.Module | nn.Parameter:
        plain: nn.Module | nn.Parameter = layer.dense()
        if isinstance(plain, nn.Module):
            take_hooks(plain, layer)
        return plain

    with restoring(model):
        swap(model, build(packed, make))
    forget_codes(model)
    return list(packed)


@in_our_words
def inject_qlora(
    model: nn.Module,
    target: Target,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float] | None = None,
    *,
    name: str = DEFAULT,
    exclude: Target | None = None,
    skip: Skip = (),
    also: tuple[type[nn.Module], ...] = (),
    embeddings: bool = False,
    experts: bool = False,
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    head: Head = None,
    **lora: Unpack[LayerOptions],
) -> Names:
    """QLoRA in place: quantise every layer that `quantize_model` would, wrap the targets in LoRA.

    The arguments are those of `quantize_model` and `inject_lora`.  A target that stays dense is
    wrapped too.  Returns the wrapped names; `.left_out` says what stayed dense, and why.

    Raises:
        ValueError: as these two; the model is then as it was.
    """
    nf4 = Rounding(block_size=block_size, double_quant=double_quant, compute_dtype=compute_dtype)
    check_model("inject_qlora", model)
    if name != DEFAULT and named_adapters(model):
        raise ValueError(
            f"inject_qlora: {name!r} would be one more adapter, and layers under adapters are not "
            "quantised; call inject_lora(name=), and quantise before the first adapter"
        )
    places = survey(model, head)
    # first: a wrong target should not cost the quantisation
    lora_plan = plan_lora(
        "inject_qlora", model, places, target, rank, alpha, exclude, name, lora
    )  # fmt: skip
    plan = _plan_codes("inject_qlora", places, skip, also, embeddings, experts, nf4)
    names = wrap_in_lora(model, lora_plan, _make_codes(model, plan))
    names.left_out, names.notes = plan.left_out | names.left_out, plan.notes | names.notes
    return names
