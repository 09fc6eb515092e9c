"""LoRA on a linear layer that holds several projections, each with a rank of its own.

    W (q + k + v rows, in)     rows in any order, see below
    A (r_q + r_k + r_v, in)    B_q (q, r_q)   B_k (k, r_k)   B_v (v, r_v)

One pair of factors over the whole would tie the three together; here each learns its own.  The B
are put together into one matrix with zeros between the slices, so that the branch is one product.

The model decides which rows belong to which slice.  Functions at the end give the usual layouts:

    blocks          q | k | v                              GPT-2, MPT, ChatGLM2, Phi-3, gate | up
    per_head        q k v of head 1, of head 2, ...        ChatGLM-6B, BLOOM, GPT-NeoX, Falcon-RW
    per_group       q .. q k v of group 1, of group 2, ..  Falcon-40B; with one group Falcon-7B
    model_parallel  q v k of block 1, .. of block 4        CodeGen, MOSS

Each gives {name: row numbers}, in the order in which the model makes heads of them.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar, Unpack

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.lora import LowRank, Options, add_lora, checked_linear, lora_delta, lora_scaling

Rows = dict[str, Tensor]
Number = TypeVar("Number", int, float)


class LoRAFusedLinear(LowRank):
    """A fused projection with LoRA on slices of its output: rows of slice i get s_i B_i A_i x.

    `slices` gives the sizes of consecutive slices by name, or the rows of each, as the functions
    below make them.  `rank` is one number for all or one for each name (0, or a name left out: no
    adapter there); `alpha` likewise, None for alpha = rank.  `lora_a` (sum of ranks, in_features)
    has the A of the slices one below the other; `lora_b_<name>` is (rows of the slice, its rank).
    `init` is called with the layer once lora_a is random and every B zero.  The other arguments
    are as of LoRALinear.

    Seen as one adapter, the layer has the sum of the ranks as its `rank`, scaling 1, and the two
    `factors()`.

    Raises:
        TypeError: base is no module.
        ValueError: base is no linear layer; slices that do not cover each output row once; a rank
            or alpha for a slice that is not there; no rank above 0; otherwise as LoRALinear.

    >>> layer = LoRAFusedLinear(nn.Linear(8, 12), {"q": 2, "v": 4}, slices={"q": 8, "k": 2, "v": 2})
    >>> layer.lora_a.shape, layer.lora_b_q.shape, layer.lora_b_v.shape
    (torch.Size([6, 8]), torch.Size([8, 2]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int | Mapping[str, int],
        alpha: float | Mapping[str, float] | None = None,
        *,
        slices: Mapping[str, int] | Rows,
        init: Callable[["LoRAFusedLinear"], None] | None = None,
        **options: Unpack[Options],
    ) -> None:
        shape = checked_linear(type(self).__name__, base)
        rows = _checked_rows(slices, shape.out_features)
        ranks = {name: r for name, r in _by_name("rank", rank, rows).items() if r != 0}
        alphas = ranks if alpha is None else _by_name("alpha", alpha, rows)
        if not ranks or not ranks.keys() <= alphas.keys():
            raise ValueError(
                f"LoRAFusedLinear: rank={rank}, alpha={alpha}; expected a rank above 0, and an "
                "alpha for each slice that has one"
            )
        stabilized = options.pop("rank_stabilized", False)  # of the slices: the whole has scaling 1
        scalings = {
            name: lora_scaling(alphas[name], r, rank_stabilized=stabilized)
            for name, r in ranks.items()
        }
        total = sum(ranks.values())
        super().__init__(base, (total, shape.in_features), (0, total), total, None, **options)
        self.in_features, self.out_features, self.transposed = shape
        self.rows, self.ranks, self.scalings = rows, ranks, scalings
        for name, r in ranks.items():
            b = self.lora_b.new_zeros(len(rows[name]), r)
            self.register_parameter(f"lora_b_{name}", nn.Parameter(b))
        del self.lora_b  # each slice has its own
        # not a buffer: it is made from the arguments, and the meta device would lose it
        self._order = torch.cat([rows[name] for name in ranks]).to(_real_device(self.lora_a))
        self.initialize(init)
        self.take_over()

    def start(self) -> None:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)); every B is zero already."""
        bound = max(1, self.in_features) ** -0.5
        with torch.no_grad():
            self.lora_a.uniform_(-bound, bound)

    def slice_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each slice that has an adapter, (its rank, in) and (its rows, its rank)."""
        parts = torch.split(self.lora_a, list(self.ranks.values()))
        return {
            name: (a, getattr(self, f"lora_b_{name}"))
            for name, a in zip(self.ranks, parts, strict=True)
        }

    def slice_delta(self, name: str) -> Float[Tensor, "rows in_features"]:
        """What is added to the rows of one slice, in their order; float32 or better.

        Raises:
            ValueError: the slice has no adapter.
        """
        if name not in self.ranks:
            raise ValueError(f"slice_delta: {name!r} has no adapter; {list(self.ranks)} have")
        return lora_delta(*self.slice_factors()[name], self.scalings[name] * self.scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        """lora_a, and B of the whole output with the slices' scalings in it, float32 or better."""
        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)
        scaled = [b.to(dtype) * self.scalings[n] for n, (_, b) in self.slice_factors().items()]
        stacked: Tensor = torch.block_diag(*scaled)  # type: ignore[no-untyped-call]
        b = stacked.new_zeros(self.out_features, self.rank)
        return self.lora_a, b.index_copy(0, self._order.to(b.device), stacked)

    def on_top(self, out: Tensor, x: Tensor, strength: float | Tensor) -> Tensor:
        """The output of the layers below, and the branches of the slices."""
        return add_lora(out, self.dropped(x), *self.factors(), strength)

    def delta_as_stored(self) -> Tensor:
        """`delta`, (in_features, out_features) where the weight is stored so (Conv1D)."""
        return self.delta().T if self.transposed else self.delta()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRAFusedLinear":
        super()._apply(fn, recurse)
        self._order = self._order.to(_real_device(self.lora_a))
        return self

    def extra_repr(self) -> str:
        off = "" if self.enabled else ", disabled"
        return f"ranks={self.ranks}, scalings={self.scalings}{off}"


def _real_device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _checked_rows(slices: Mapping[str, int] | Rows, out_features: int) -> Rows:
    """The rows of each slice, if together they are every output row once."""
    sizes = {name: size for name, size in slices.items() if isinstance(size, int)}
    given = {name: part.cpu() for name, part in slices.items() if isinstance(part, Tensor)}
    named = all(isinstance(name, str) and name.isidentifier() for name in slices)
    if not named or any(size < 1 for size in sizes.values()) or (sizes and given):
        raise ValueError(
            f"LoRAFusedLinear: slices={slices}; expected names (letters, digits, underscores) and "
            "for each a size above 0, or for each its rows"
        )
    rows = given or blocks(sizes)
    found = sorted(number for part in rows.values() for number in part.tolist())
    if found != list(range(out_features)) or any(r.dtype != torch.long for r in rows.values()):
        raise ValueError(
            f"LoRAFusedLinear: slices {list(rows)} of {[len(r) for r in rows.values()]} rows; they "
            f"must cover each of the {out_features} output rows once"
        )
    return rows


def _by_name(what: str, value: Number | Mapping[str, Number], rows: Rows) -> dict[str, Number]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(rows, value)
    if unknown := [name for name in value if name not in rows]:
        raise ValueError(f"LoRAFusedLinear: {what} for {unknown}; the slices are {list(rows)}")
    return {name: value[name] for name in rows if name in value}


def _arange(*ends: int) -> Tensor:
    return torch.arange(*ends, device="cpu")  # not the meta device, where a model may be built


def blocks(sizes: Mapping[str, int]) -> Rows:
    """One slice after the other.

    >>> blocks({"q": 2, "kv": 1})
    {'q': tensor([0, 1]), 'kv': tensor([2])}
    """
    bounds = pairwise(accumulate(sizes.values(), initial=0))
    return {name: _arange(*ends) for name, ends in zip(sizes, bounds, strict=True)}


def per_head(n_heads: int, head_dim: int, names: Sequence[str] = ("q", "k", "v")) -> Rows:
    """For each head its query, key and value.

    >>> per_head(n_heads=2, head_dim=1)
    {'q': tensor([0, 3]), 'k': tensor([1, 4]), 'v': tensor([2, 5])}
    """
    rows = _arange(n_heads * len(names) * head_dim)
    parts = rearrange(rows, "(h n d) -> n (h d)", h=n_heads, n=len(names))
    return dict(zip(names, parts, strict=True))


def per_group(n_heads: int, n_kv_heads: int, head_dim: int) -> Rows:
    """For each group its queries, then its one key, then its one value.

    Raises:
        ValueError: the groups do not divide the heads.
    """
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"per_group: {n_heads} heads in {n_kv_heads} groups; expected a divisor of {n_heads}"
        )
    rows = _arange((n_heads + 2 * n_kv_heads) * head_dim)
    heads = rearrange(rows, "(g n d) -> g n d", g=n_kv_heads, d=head_dim)
    return {"q": heads[:, :-2].flatten(), "k": heads[:, -2].flatten(), "v": heads[:, -1].flatten()}


def model_parallel(n_heads: int, head_dim: int, *, n_blocks: int = 4) -> Rows:
    """`n_blocks` blocks, each with the query, the value and the key of its heads, in this order.

    Raises:
        ValueError: the blocks do not divide the heads.
    """
    if n_blocks < 1 or n_heads % n_blocks:
        raise ValueError(
            f"model_parallel: {n_heads} heads in {n_blocks} blocks; expected a divisor of {n_heads}"
        )
    rows = _arange(3 * n_heads * head_dim)
    query, value, key = rearrange(rows, "(m n d) -> n (m d)", m=n_blocks, n=3)
    return {"q": query, "k": key, "v": value}
