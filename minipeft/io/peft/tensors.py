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


def _roles(layer: nn.Module) -> dict[str, tuple[str, str]]:
    """What each adapter parameter of a layer is in a file: its role and part, as in keys.Key."""
    if isinstance(layer, LoRAMultiheadAttention):
        return {
            "lora_a": ("lora_A", ""), "lora_b": ("lora_B", ""),
            "out_lora_a": ("lora_A", "out_proj"), "out_lora_b": ("lora_B", "out_proj"),
        }  # fmt: skip
    kind = "lora_embedding" if isinstance(layer, LoRAEmbedding) else "lora"
    roles = {"lora_a": (f"{kind}_A", ""), "lora_b": (f"{kind}_B", "")}
    if "magnitude" in layer._parameters:
        roles["magnitude"] = ("lora_magnitude_vector", "")
    return roles


def written(place: str, layer: nn.Module) -> Tensors:
    """The tensors of a low-rank layer by their keys, without the prefix.

    Raises:
        ValueError: a layer that PEFT's format cannot express.
    """
    roles = _roles(layer)
    if isinstance(layer, LoRAMultiheadAttention):
        values: Tensors = {**layer.adapter_parameters()}
        if values.keys() != roles.keys():
            raise ValueError(
                f"save_peft: {place} is an nn.MultiheadAttention whose keys or values have another "
                "size, which PEFT's format cannot express"
            )
    elif isinstance(layer, LoRATiedLinear | LoRAEmbedding | LoRAConv) or (
        isinstance(layer, LowRank) and linear_shape(layer) is not None
    ):
        a, b = _fused(layer) if isinstance(layer, LoRAFusedLinear) else layer.factors()
        if isinstance(layer, LoRAConv) and not layer.across_groups:
            a, b = full_from_grouped(a, b, layer.groups)
        values = {**layer._parameters, "lora_a": a, "lora_b": b}  # type: ignore[dict-item]
        if isinstance(layer, LoRAConv) and "magnitude" in roles:
            values["magnitude"] = values["magnitude"].view(1, -1, *(1,) * (b.dim() - 2))
    else:
        raise ValueError(
            f"save_peft: {place} is a {type(layer).__name__}, which PEFT's LoRA format cannot "
            "express; use adapter_state_dict with safetensors"
        )
    return {_key(place, *role): values[own] for own, role in roles.items()}


def _key(place: str, role: str, part: str) -> str:
    inside = f".base_layer.{part}" if part else ""
    return f"{place}{inside}.{role}{'.weight' if role in ('lora_A', 'lora_B') else ''}"


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


def parameters(
    where: str, layer: nn.Module, found: Mapping[Key, Tensor], *, halves: int = 1
) -> Tensors:
    """What `layer.adapter_parameters()` get from a file's tensors of its module.

    With two `halves` the tensors have twice the layer's rank: the second half is a start.

    Raises:
        ValueError: a tensor is missing, one too many, or cannot be expressed by the layer.
    """
    roles = {(key.role, key.part): value for key, value in found.items()}
    wanted = _roles(layer)
    missing = [".".join(filter(None, role[::-1])) for role in wanted.values() if role not in roles]
    extra = [".".join(filter(None, role[::-1])) for role in roles if role not in wanted.values()]
    if missing or extra:
        raise ValueError(
            f"{where}: missing {missing or 'nothing'}, unexpected {extra or 'nothing'} for a "
            f"{type(layer).__name__}"
        )
    made = {own: roles[role] for own, role in wanted.items()}
    if isinstance(layer, LoRAExperts):
        _check_experts(where, made["lora_a"], made["lora_b"], layer, halves)
        a, b = experts_from_peft(made["lora_a"], made["lora_b"], len(layer.lora_a))
        return {"lora_a": a, "lora_b": b}
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


def _check_experts(where: str, a: Tensor, b: Tensor, layer: LoRAExperts, halves: int) -> None:
    """Raise ValueError unless these are the factors of all experts, in PEFT's layout."""
    n_experts, rank = len(layer.lora_a), layer.lora_a.shape[1] * halves
    if not a.dim() == b.dim() == 2 or not len(a) == b.shape[1] == rank * n_experts:
        raise ValueError(
            f"{where}: {tuple(a.shape)} and {tuple(b.shape)} are not of rank {rank} for "
            f"{n_experts} experts"
        )


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
