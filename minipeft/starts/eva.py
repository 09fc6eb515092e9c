"""EVA: factors that start where the activations vary  (Paischer et al. 2024).

A few batches run through the model; each layer's inputs are decomposed by an incremental singular
value decomposition, and the rows of A become the right singular vectors.  Ranks go where they
explain most: the budget is the sum of the ranks there were.

    inject_lora(model, "all-linear", rank=16)
    eva(model, batches)                     before an optimiser is made: parameters are new
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.progress import Progress
from minipeft.adapters.sharded import is_shard, is_sharded_module, refuse_shards
from minipeft.lora import LoRALinear


class IncrementalSVD:
    """Leading right singular vectors of rows that come in batches; nothing is centred.

    After each batch the vectors, times their singular values, are decomposed together with the new
    rows: what lies outside the kept ones is lost.
    """

    def __init__(self, components: int) -> None:
        self.components = components
        self.vectors: Tensor | None = None  # (components, n)
        self.values: Tensor | None = None
        self.rows, self.total = 0, 0.0  # total: the sum of squares of all rows
        self.converged = False

    def update(self, rows: Tensor, tau: float) -> None:
        """Take (rows, n) in; converged once each vector's cosine with its last is above tau."""
        rows = rows.to(torch.float32)
        self.rows += len(rows)
        self.total += float(rows.square().sum())
        if self.vectors is not None and self.values is not None:
            rows = torch.cat([self.values[:, None] * self.vectors, rows])
        _, s, v = torch.linalg.svd(rows, full_matrices=False)
        new = v[: self.components]
        if self.vectors is not None and self.vectors.shape == new.shape:
            cosine = (self.vectors * new).sum(1).abs()
            self.converged = bool((cosine > tau).all())
        self.vectors, self.values = new, s[: self.components]

    def explained(self) -> Tensor:
        """The share of each component in the variance of all rows, the lost part included."""
        assert self.values is not None
        return self.values.square() / max(self.total, torch.finfo(torch.float32).tiny)


def _call(model: nn.Module, batch: Any) -> Any:
    named = batch if isinstance(batch, Mapping) else {}
    args = () if named else batch if isinstance(batch, tuple | list) else (batch,)
    try:
        inspect.signature(model.forward).bind(*args, **named)
    except TypeError as error:
        raise ValueError(
            f"eva: a batch does not fit {type(model).__name__}.forward ({error}); of batches (x, "
            "y) pass the inputs alone: forward=lambda model, batch: model(batch[0])"
        ) from None
    return model(*args, **named)


def _redistributed(found: Mapping[str, IncrementalSVD], ranks: Mapping[str, int],
                   rho: float) -> dict[str, int]:  # fmt: skip
    """Ranks with the same sum, at the components that explain most of their layer's variance."""
    shares = [
        (float(share), name)
        for name, svd in found.items()
        for share in svd.explained()[: int(rho * ranks[name])]
    ]
    shares.sort(key=lambda entry: -entry[0])
    chosen = dict.fromkeys(found, 1)  # one at least: a layer cannot have none
    left = sum(ranks.values()) - len(chosen)
    used = dict.fromkeys(found, 0)
    for _, name in shares:
        used[name] += 1
        if left and used[name] > 1:
            chosen[name] += 1
            left -= 1
    return chosen


@torch.no_grad()
def eva(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    forward: Callable[[nn.Module, Any], Any] = _call,
    progress: bool | None = None,
) -> dict[str, int]:
    """Start every LoRALinear of the model at the directions of its inputs; returns the ranks.

    `batches` are run through `forward(model, batch)`, by default the model called with a dict's
    values, a tuple's elements or the batch itself, in eval mode, until every layer's vectors have
    converged (cosine above `tau`) or the batches end.  No layer gets more than `rho` times its
    rank; 1.0 leaves the ranks alone.  B is zero, so the model computes what it did; scalings stay.
    Layers that are given the very same tensor one after another share one decomposition.  The
    parameters lora_a and lora_b are new ones: make the optimiser afterwards.  `progress` shows a
    bar; None: on a terminal.

    Raises:
        ValueError: no LoRALinear, one whose B is not zero (trained, or PiSSA's), rho below 1, no
            batches, one that does not fit the model's forward, inputs of fewer rows than a rank,
            inputs that are not finite, or layers of which each process has a part (shards).  The
            model is then as it was.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("eva: the model has no LoRALinear; inject first")
    if any(map(is_sharded_module, model.modules())) or any(
        is_shard(p) for layer in layers.values() for p in layer.parameters()
    ):
        refuse_shards(
            "eva", model, "use it in every process, with the same batches, then shard or cut the "
            "model"
        )  # fmt: skip
    if trained := [n for n, x in layers.items() if x.lora_a0 is not None or x.lora_b.any()]:
        raise ValueError(
            f"eva: {trained[:3]} do not start at zero ({len(trained)} layers), so that what "
            "they learnt would be lost; use it first, on adapters of the default initialisation"
        )
    if rho < 1:
        raise ValueError(f"eva: rho={rho}; expected at least 1")
    found = {n: IncrementalSVD(int(rho * layer.rank)) for n, layer in layers.items()}
    _watch(model, layers, found, batches, tau, forward, progress)
    unseen = [n for n, svd in found.items() if svd.vectors is None]
    if unseen:
        raise ValueError(f"eva: no batch reached {unseen[:3]} ({len(unseen)} layers)")
    ranks = {name: layer.rank for name, layer in layers.items()}
    new = dict(ranks) if rho == 1 else _redistributed(found, ranks, rho)
    if sum(new.values()) < sum(ranks.values()):
        raise ValueError(
            f"eva: {max(svd.rows for svd in found.values())} rows are too few for ranks of "
            f"{sum(ranks.values())} in all; pass more batches"
        )
    short = [n for n, svd in found.items() if len(svd.vectors) < new[n]]  # type: ignore[arg-type]
    if short:
        raise ValueError(
            f"eva: {short[0]} saw {found[short[0]].rows} rows, too few for rank "
            f"{new[short[0]]}; pass more batches"
        )
    for name, layer in layers.items():
        vectors = found[name].vectors
        assert vectors is not None
        _restart(layer, vectors[: new[name]])
    return new


def _watch(
    model: nn.Module,
    layers: Mapping[str, LoRALinear],
    found: Mapping[str, IncrementalSVD],
    batches: Iterable[Any],
    tau: float,
    forward: Callable[[nn.Module, Any], Any],
    progress: bool | None,
) -> None:
    """Run the batches, feeding each layer's inputs to its decomposition."""
    last: list[Any] = [None, None, None]  # of the batch: an input, its version, what took it in

    def hook(name: str) -> Callable[..., None]:
        def take_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # at once: the model may change it in place later, and all inputs together are large
            _take_in(name, args[0] if args else next(iter(kwargs.values())), last, found, tau)

        return take_in

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for batch in Progress(batches, desc="EVA", unit="batch", shown=progress):
            forward(model, batch)
            last[:] = None, None, None
            if all(svd.converged for svd in found.values()):
                break
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _take_in(
    name: str, x: Tensor, last: list[Any], found: Mapping[str, IncrementalSVD], tau: float
) -> None:
    svd = found[name]
    if svd.converged:
        return
    version, same = None if x.is_inference() else x._version, last[2]
    rows = x.reshape(-1, x.shape[-1])
    if (
        x is last[0] and version == last[1] and same.components == svd.components
        and same.rows == svd.rows + len(rows)
    ):  # fmt: skip
        vars(svd).update(vars(same))
        return
    if not bool(x.isfinite().all()):
        raise ValueError(f"eva: the inputs of {name} hold NaN or Inf")
    svd.update(rows, tau)
    last[:] = x, version, svd


def _restart(layer: LoRALinear, vectors: Tensor) -> None:
    """New factors of this many rows: A as given, B zero, the scaling as it was."""
    old_a, old_b = layer.lora_a, layer.lora_b
    a = vectors.to(old_a.device, old_a.dtype).clone()
    b = old_b.new_zeros(old_b.shape[0], len(a))
    layer.lora_a = nn.Parameter(a, requires_grad=old_a.requires_grad)
    layer.lora_b = nn.Parameter(b, requires_grad=old_b.requires_grad)
    layer.rank = len(a)
    layer.alpha = layer.scaling * (layer.rank**0.5 if layer.rank_stabilized else layer.rank)
