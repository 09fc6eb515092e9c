"""One adapter from several.

    cat      [A_1; A_2], [w_1 s_1 B_1, w_2 s_2 B_2]: exactly the weighted sum, of the sum of ranks
    svd      the best approximation of that sum by a rank
    linear   sum of sqrt(|w s|) A_i, sum of +- sqrt(|w s|) B_i: cheap, with products across adapters
    ties     trimmed, agreed in sign, averaged (Yadav et al. 2023), then svd
    dare     random parts dropped, the rest scaled up (Yu et al. 2023), then svd

w are the weights; s scales each adapter's product: alpha / rank, or alpha / sqrt(rank) under rank
stabilisation.  ties and dare work on the deltas B A, which are made for one layer at a time.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.names import adapters_called, check_new_name, give_name
from minipeft.adapters.ready import check_ready
from minipeft.adapters.sharded import own_class
from minipeft.adapters.state import named_adapters, refuse_merged
from minipeft.adapters.targets import Names
from minipeft.inject import build, freeze, restoring, swap_shared
from minipeft.layers.conv import LoRAConv
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.lora import LoRALinear, LowRank
from minipeft.model.peft_words import in_our_words
from minipeft.model.rows import refuse_rows

METHODS = ("cat", "svd", "linear", "ties", "dare")
_KINDS = (LoRALinear, LoRAEmbedding, LoRAConv)
Pair = tuple[Tensor, Tensor]


@in_our_words
def combine_adapters(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    method: str = "cat",
    *,
    new_name: str,
    rank: int | None = None,
    density: float = 0.5,
    missing: str = "error",
    seed: int = 0,
) -> Names:
    """Add an adapter that is the weighted combination of others: it is on then, they are off.

    This file's header lists the methods.  `rank` is the result's for svd, ties and dare; the
    largest of the adapters' unless given.  `density` is the share of each delta that ties and dare
    keep, `seed` seeds what dare draws.  A module that only some of the adapters have layers over
    raises; with missing="zero" the others count as zero there.  What `scale_adapters` set counts.
    Returns the names of the modules.

    Raises:
        ValueError: an unknown method or adapter, a name that is taken, another number of weights
            than of names, layers of different kinds or sizes, layers that some adapters lack, a
            merged model, a model that is an adapter layer itself.  Nothing has changed then.
    """
    refuse_merged("combine_adapters", named_adapters(model))
    check_ready("combine_adapters", model)
    refuse_rows("combine_adapters", model)
    check_new_name("combine_adapters", model, new_name)
    names, weights = list(names), [float(weight) for weight in weights]
    _check_arguments(names, weights, method, rank, density, missing)
    by_place = _layers(model, names, missing)
    generator = torch.Generator().manual_seed(seed)

    def make(place: str, module: nn.Module) -> nn.Module:
        layers = by_place[place]
        own = [(layers[n], w) for n, w in zip(names, weights, strict=True) if n in layers]
        with torch.no_grad():
            a, b = _combined(place, own, method, rank, density, generator)
        return _layer(own[0][0], module, a, b)

    with restoring(model):
        built = build({place: model.get_submodule(place) for place in by_place}, make)
        swap_shared(model, built)
        give_name(new_name, built.values())
        freeze(model)
        for layers in by_place.values():
            for layer in layers.values():
                layer.enabled = False
    return Names(built)


def _check_arguments(
    names: list[str], weights: list[float], method: str, rank: int | None, density: float,
    missing: str,
) -> None:  # fmt: skip
    if method not in METHODS:
        raise ValueError(f"combine_adapters: method={method!r}; choose one of {METHODS}")
    if len(names) != len(weights) or len(set(names)) != len(names) or not names:
        raise ValueError(
            f"combine_adapters: adapters {names} and weights {weights}; expected a weight for each "
            "of different names"
        )
    if not all(torch.tensor(weights).isfinite().tolist()):
        raise ValueError(f"combine_adapters: weights {weights}; expected finite numbers")
    if rank is not None and (method in ("cat", "linear") or rank < 1):
        raise ValueError(f"combine_adapters: rank={rank} with {method!r}; svd, ties, dare take one")
    if not 0 < density <= 1:
        raise ValueError(f"combine_adapters: density={density}; expected 0 < density <= 1")
    if missing not in ("error", "zero"):
        raise ValueError(f"combine_adapters: missing={missing!r}; choose 'error' or 'zero'")


def _layers(model: nn.Module, names: Iterable[str], missing: str) -> dict[str, dict[str, LowRank]]:
    """{module name: {adapter name: its layer}}, of one kind each."""
    found: dict[str, dict[str, LowRank]] = {}
    names = list(names)
    for name in names:
        for place, stack in adapters_called("combine_adapters", model, name).items():
            if len(stack) != 1 or own_class(stack[0]) not in _KINDS:
                kinds = [own_class(layer).__name__ for layer in stack]
                raise ValueError(
                    f"combine_adapters: {name!r} has {kinds} over {place!r}; expected one of "
                    f"{[kind.__name__ for kind in _KINDS]}"
                )
            if not place:
                raise ValueError("combine_adapters: the model is itself a layer; put it in one")
            found.setdefault(place, {})[name] = stack[0]  # type: ignore[assignment]
    partly = {p: [n for n in names if n not in layers] for p, layers in found.items()}
    partly = {place: lacking for place, lacking in partly.items() if lacking}
    if partly and missing == "error":
        place, lacking = next(iter(partly.items()))
        raise ValueError(
            f"combine_adapters: {lacking} have no layer over {place!r} ({len(partly)} modules are "
            "not in all adapters); missing='zero' counts them as zero"
        )
    return found


def _combined(
    place: str,
    layers: list[tuple[LowRank, float]],
    method: str,
    rank: int | None,
    density: float,
    generator: torch.Generator,
) -> Pair:
    """Factors of the combination, with scaling 1."""
    scaled = [(layer, w * layer.scaling * layer.scale) for layer, w in layers]
    pairs = [(_wide(*layer.factors()), w) for layer, w in scaled]
    if method == "linear":
        return _linear(place, pairs)
    groups = getattr(scaled[0][0], "groups", 1)
    if method == "cat":
        return _cat(pairs, groups)
    largest = rank or max(layer.rank for layer, _ in layers)
    if groups > 1:
        raise ValueError(f"combine_adapters: {place} is a convolution in groups; use 'cat'")
    if method == "svd":
        a, b = _cat(pairs, groups)
        return _reshaped(_small_svd(a.flatten(1), b.flatten(1), largest), a, b)
    deltas = torch.stack([w * b.flatten(1) @ a.flatten(1) for (a, b), w in pairs])
    kept = _ties(deltas, density) if method == "ties" else _dare(deltas, density, generator)
    u, s, v = torch.linalg.svd(kept, full_matrices=False)
    root = s[:largest].sqrt()
    factors = root[:, None] * v[:largest], u[:, :largest] * root
    return _reshaped(factors, *pairs[0][0])


def _wide(a: Tensor, b: Tensor) -> Pair:
    """Both factors in float32 or better, since multiplying by weights rounds."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(a.dtype, b.dtype))
    return a.to(dtype), b.to(dtype)


def _cat(pairs: list[tuple[Pair, float]], groups: int) -> Pair:
    if groups == 1:
        a = torch.cat([a for (a, _), _ in pairs])
    else:  # the ranks of a group lie together
        parts = [a.view(groups, -1, *a.shape[1:]) for (a, _), _ in pairs]
        a = torch.cat(parts, dim=1).flatten(0, 1)
    return a, torch.cat([b * w for (_, b), w in pairs], dim=1)


def _linear(place: str, pairs: list[tuple[Pair, float]]) -> Pair:
    shapes = {(tuple(a.shape), tuple(b.shape)) for (a, b), _ in pairs}
    if len(shapes) > 1:
        raise ValueError(f"combine_adapters: 'linear' needs equal ranks; {place} has {shapes}")
    a = sum(abs(w) ** 0.5 * a for (a, _), w in pairs)
    b = sum((1 if w >= 0 else -1) * abs(w) ** 0.5 * b for (_, b), w in pairs)
    return torch.as_tensor(a), torch.as_tensor(b)


def _small_svd(a: Tensor, b: Tensor, rank: int) -> Pair:
    """The best factors of b a of this rank; no matrix of the size of b a is decomposed."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    best_a, best_b = root[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
    return best_a.to(a.dtype), best_b.to(b.dtype)


def _reshaped(factors: Pair, a: Tensor, b: Tensor) -> Pair:
    """Flattened factors in the axes that a and b have."""
    return factors[0].view(-1, *a.shape[1:]), factors[1].reshape(len(b), -1, *b.shape[2:])


def _ties(deltas: Tensor, density: float) -> Tensor:
    """Keep the largest values of each delta; then, for each weight, average those whose sign wins.

    The sign of the sum over the deltas wins.
    """
    flat = deltas.flatten(1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = flat.abs().kthvalue(flat.shape[1] - keep + 1, dim=1, keepdim=True).values
    kept = torch.where(flat.abs() >= threshold, flat, 0.0)
    sign = kept.sum(0).sign()
    agreeing = torch.where(kept.sign() == sign, kept, 0.0)
    count = (agreeing != 0).sum(0).clamp(min=1)
    return (agreeing.sum(0) / count).view(deltas.shape[1:])


def _dare(deltas: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each value with this probability, divide by it, and add up."""
    mask = torch.rand(deltas.shape, generator=generator).to(deltas.device) < density
    return (deltas * mask / density).sum(0)


def _layer(source: LowRank, module: nn.Module, a: Tensor, b: Tensor) -> nn.Module:
    """A layer of the source's kind over the stack, with these factors and scaling 1."""
    kind: Any = own_class(source)

    def fill(layer: LowRank) -> None:
        with torch.no_grad():
            layer.lora_a.copy_(a)
            layer.lora_b.copy_(b)

    layer: nn.Module = kind(module, len(a), dropout=source.dropout, init=fill, dtype=a.dtype)
    return layer
