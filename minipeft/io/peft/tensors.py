"""Tensors of one adapter layer as PEFT's files hold them, and back.

    kind                     lora_A                    lora_B                     magnitude
    linear, Conv1D           (rank, in)                (out, rank)                (out,)
    embedding                (rank, tokens)            (dim, rank)                (dim,)
    convolution              (rank, in, *kernel)       (out, rank/groups, *1)     (1, out, *1)
    nn.MultiheadAttention    (rank, dim)               (3 dim, rank), and a pair for out_proj
    experts                  (rank * experts, in)      (out, rank * experts)

A convolution in groups has the whole of `in` in PEFT's files, a block of it here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import innermost, linear_shape
from minipeft.io.files import check_values
from minipeft.io.peft.keys import Key
from minipeft.layers.attention import LoRAMultiheadAttention
from minipeft.layers.conv import LoRAConv, full_from_grouped, grouped_from_full
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.layers.fused import LoRAFusedLinear
from minipeft.layers.mixture import LoRAExperts, experts_from_peft, peft_from_experts
from minipeft.layers.tied import LoRATiedLinear
from minipeft.lora import LoRALinear, LowRank

Tensors = dict[str, Tensor]


def written(place: str, layer: nn.Module) -> Tensors:
    """The tensors of a low-rank layer by their keys, without the prefix.

    Raises:
        ValueError: a layer that PEFT's format cannot express.
    """
    if isinstance(layer, LoRATiedLinear):
        a, b = layer.factors()
        return {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    if isinstance(layer, LoRAMultiheadAttention):
        return _written_attention(place, layer)
    if isinstance(layer, LoRAExperts):
        raise TypeError("experts are written by their module")
    magnitude = getattr(layer, "magnitude", None)
    extra = {} if magnitude is None else {f"{place}.lora_magnitude_vector": magnitude}
    if isinstance(layer, LoRAEmbedding):
        a, b = layer.factors()
        return {f"{place}.lora_embedding_A": a, f"{place}.lora_embedding_B": b, **extra}
    if isinstance(layer, LoRAConv):
        a, b = layer.factors()
        if not layer.across_groups:
            a, b = full_from_grouped(a, b, layer.groups)
        if magnitude is not None:
            extra = {k: m.view(1, -1, *(1,) * (b.dim() - 2)) for k, m in extra.items()}
        return {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b, **extra}
    if isinstance(layer, LowRank) and linear_shape(layer) is not None:
        a, b = _fused(layer) if isinstance(layer, LoRAFusedLinear) else layer.factors()
        return {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b, **extra}
    raise ValueError(
        f"save_peft: {place} is a {type(layer).__name__}, which PEFT's LoRA format cannot "
        "express; use adapter_state_dict with safetensors"
    )


def _written_attention(place: str, layer: Any) -> Tensors:
    own = layer.adapter_parameters()
    if set(own) != {"lora_a", "lora_b", "out_lora_a", "out_lora_b"}:
        raise ValueError(
            f"save_peft: {place} is an nn.MultiheadAttention whose keys or values have another "
            "size, which PEFT's format cannot express"
        )
    inner = f"{place}.base_layer.out_proj"
    return {
        f"{place}.lora_A.weight": own["lora_a"], f"{place}.lora_B.weight": own["lora_b"],
        f"{inner}.lora_A.weight": own["out_lora_a"], f"{inner}.lora_B.weight": own["out_lora_b"],
    }  # fmt: skip


def _fused(layer: LoRAFusedLinear) -> tuple[Tensor, Tensor]:
    """A and B of the whole output, from which each slice's can be had back to the bit.

    Where the slices have one scaling it is the whole's, and B holds their B as they are.  Where
    they differ B holds their products with them, in float64, whose quotient rounds to the B.
    """
    if len(set(layer.scalings.values())) == 1:
        b = layer.lora_a.new_zeros(layer.out_features, layer.rank)
    else:
        b = layer.lora_a.new_zeros(layer.out_features, layer.rank, dtype=torch.float64)
    start = 0
    for name, (_, own) in layer.slice_factors().items():
        columns = slice(start, start + layer.ranks[name])
        scaled = own if b.dtype == own.dtype else own.double() * layer.scalings[name]
        b[layer.rows[name].to(b.device), columns] = scaled.detach()
        start = columns.stop
    return layer.lora_a, b


def written_experts(place: str, layers: list[LoRAExperts]) -> Tensors:
    """The tensors of the expert weights of one module, in the order of its parameters.

    PEFT nests a wrapper for each: the last one is outermost.
    """
    made: Tensors = {}
    for depth, layer in enumerate(reversed(layers)):
        a, b = peft_from_experts(*layer.factors())
        path = f"{place}{'.base_layer' * depth}"
        made |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    return made


def reaches_across_groups(module: nn.Module, found: Mapping[Key, Tensor]) -> bool:
    """Whether this lora_A is one that only a LoRAConv with `across_groups` can hold."""
    groups = getattr(innermost(module), "groups", 1)
    roles = {key.role: value for key, value in found.items()}
    if groups == 1 or not {"lora_A", "lora_B"} <= roles.keys():
        return False
    axes = len(getattr(innermost(module), "kernel_size", ())) + 2
    if any(roles[role].dim() != axes for role in ("lora_A", "lora_B")):
        return False  # of another shape altogether, which is for `copy_into` to say
    try:
        grouped_from_full(roles["lora_A"], roles["lora_B"], groups)
    except ValueError:
        return True
    return False


def parameters(where: str, layer: nn.Module, found: Mapping[Key, Tensor]) -> Tensors:
    """What `layer.adapter_parameters()` get from a file's tensors of its module.

    Raises:
        ValueError: a tensor is missing, one too many, or cannot be expressed by the layer.
    """
    roles = {(key.role, key.part): value for key, value in found.items()}
    wanted: dict[str, tuple[str, str]]
    if isinstance(layer, LoRAMultiheadAttention):
        wanted = {
            "lora_a": ("lora_A", ""), "lora_b": ("lora_B", ""),
            "out_lora_a": ("lora_A", "out_proj"), "out_lora_b": ("lora_B", "out_proj"),
        }  # fmt: skip
    elif isinstance(layer, LoRAEmbedding):
        wanted = {"lora_a": ("lora_embedding_A", ""), "lora_b": ("lora_embedding_B", "")}
    else:
        wanted = {"lora_a": ("lora_A", ""), "lora_b": ("lora_B", "")}
    if hasattr(type(layer), "magnitude") or "magnitude" in layer._parameters:
        wanted["magnitude"] = ("lora_magnitude_vector", "")
    missing = [".".join(filter(None, role[::-1])) for role in wanted.values() if role not in roles]
    extra = [".".join(filter(None, role[::-1])) for role in roles if role not in wanted.values()]
    if missing or extra:
        raise ValueError(
            f"{where}: missing {missing or 'nothing'}, unexpected {extra or 'nothing'} for a "
            f"{type(layer).__name__}"
        )
    made = {own: roles[role] for own, role in wanted.items()}
    if isinstance(layer, LoRAConv):
        kernel = made["lora_a"].dim() - 2
        shapes = [tuple(made[own].shape) for own in ("lora_a", "lora_b")]
        if any(len(shape) != layer.lora_a.dim() for shape in shapes):
            raise ValueError(
                f"{where}: lora_A {shapes[0]}, lora_B {shapes[1]}; expected "
                f"{layer.lora_a.dim()} axes each"
            )
        if not layer.across_groups:
            made["lora_a"], made["lora_b"] = grouped_from_full(
                made["lora_a"], made["lora_b"], layer.groups
            )
        if "magnitude" in made and tuple(made["magnitude"].shape[2:]) == (1,) * kernel:
            made["magnitude"] = made["magnitude"].reshape(-1)
    return made


def lora_biases(
    low_rank: Mapping[str, LowRank], biases: Mapping[str, Tensor], experts: Mapping[str, object]
) -> Tensors:
    """The biases of lora_B by their keys: PEFT has them on every layer, so the others get zeros.

    Raises:
        ValueError: a layer for which PEFT has none.
    """
    wrong = [*experts, *(place for place in biases if place not in low_rank)]
    for place, layer in low_rank.items():
        if not isinstance(layer, LoRALinear | LoRAConv) or "magnitude" in layer._parameters:
            wrong.append(place)
    if wrong:
        raise ValueError(
            f"save_peft: {wrong[0]} takes no lora_bias in PEFT's format, which has one for all "
            f"layers of an adapter or for none ({len(biases)} have one)"
        )
    return {
        f"{place}.lora_B.bias": biases.get(place, torch.zeros(len(layer.factors()[1])))
        for place, layer in low_rank.items()
    }  # fmt: skip


def taken_bias(where: str, found: dict[Key, Tensor], *, wanted: bool) -> Tensor | None:
    """Take the bias of lora_B out of a module's tensors, None if there is none.

    Raises:
        ValueError: the configuration says otherwise.
    """
    key = next((key for key in found if key.role == "lora_bias"), None)
    if (key is not None) != wanted:
        raise ValueError(
            f"{where}: {'missing' if wanted else 'unexpected'} lora_B.bias; the configuration says "
            f"lora_bias = {str(wanted).lower()}"
        )
    return None if key is None else found.pop(key)


def experts_parameters(
    where: str, layer: LoRAExperts, found: Mapping[Key, Tensor], *, halves: int = 1
) -> Tensors:
    """What the adapter parameters of one expert weight get from a file's tensors.

    With two `halves` the tensors have twice the layer's rank: the second half is a start.

    Raises:
        ValueError: other tensors than lora_A and lora_B, or tensors of other ranks.
    """
    roles = {key.role: value for key, value in found.items()}
    if set(roles) != {"lora_A", "lora_B"} or any(value.dim() != 2 for value in roles.values()):
        raise ValueError(f"{where}: {sorted(roles)}; expected lora_A and lora_B")
    n_experts, rank = len(layer.lora_a), layer.lora_a.shape[1] * halves
    if roles["lora_A"].shape[0] != rank * n_experts or roles["lora_B"].shape[1] != rank * n_experts:
        raise ValueError(
            f"{where}: {tuple(roles['lora_A'].shape)} and {tuple(roles['lora_B'].shape)} are not "
            f"of rank {rank} for {n_experts} experts"
        )
    a, b = experts_from_peft(roles["lora_A"], roles["lora_B"], n_experts)
    return {"lora_a": a, "lora_b": b}


def copy_into(where: str, layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy tensors into a layer's own parameters; the shapes are checked first.

    Raises:
        ValueError: another shape or dtype, NaN or Inf, or a layer on the meta device.
    """
    own = layer.adapter_parameters()  # type: ignore[operator]
    if any(own[name].is_meta for name in values):
        raise ValueError(f"{where}: is on the meta device; load the base model's weights first")
    check_values(where, values, {name: own[name] for name in values})
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
