"""LoRA on nn.MultiheadAttention: on its input projections and on its output projection.

That module keeps the weights of query, key and value in one matrix and multiplies by it itself, so
there is no layer inside to wrap.  Its forward is written out here, with a low-rank branch at each
projection:

    q, k, v = in_proj(x) + branch     (embed_dim each)
    heads   = softmax(q k^T / sqrt(head_dim) + mask) v
    out     = out_proj(heads) + branch

`nn.TransformerEncoderLayer` in eval() reads `in_proj_weight` and `out_proj.weight` and calls
nothing; it finds the effective weights there.
"""

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.adapters.protocol import innermost
from minipeft.lora import LowRank, Options, add_lora, lora_delta

# the weights of nn.MultiheadAttention, and the names of their factors but for the last letter
TOGETHER = {"in_proj_weight": "lora_", "out_proj.weight": "out_lora_"}
APART = {
    "q_proj_weight": "lora_", "k_proj_weight": "k_lora_", "v_proj_weight": "v_lora_",
    "out_proj.weight": "out_lora_",
}  # fmt: skip


class Projection(NamedTuple):
    """The effective weight and the bias, for models that read `out_proj`."""

    weight: Tensor
    bias: Tensor | None


def effective(name: str) -> Any:
    """A property: the weight of this name as all adapters over the module make it."""
    return property(lambda layer: layer._effective(name))


class LoRAMultiheadAttention(LowRank):
    """nn.MultiheadAttention with LoRA on its projections; called as it, with the same results.

    `lora_a` (rank, embed_dim) and `lora_b` (3 embed_dim, rank) are over query, key and value
    together, as in PEFT; `out_lora_a` (rank, embed_dim) and `out_lora_b` (embed_dim, rank) over the
    output projection.  Where keys or values have a size of their own, `lora_*` are the query's,
    and `k_lora_*`, `v_lora_*` theirs.  `dropout` acts on the branches' inputs while training (the
    attention's own is `base.dropout`); `init` is called with the layer and may change any of them.
    The other arguments are as of LoRALinear.

    Raises:
        TypeError: base is no module.
        ValueError: base is no nn.MultiheadAttention, or one with a forward of its own; rank, alpha,
            dropout as of LoRALinear.

    >>> layer = LoRAMultiheadAttention(nn.MultiheadAttention(8, 2), rank=2)
    >>> layer.lora_b.shape, layer.out_lora_b.shape
    (torch.Size([24, 2]), torch.Size([8, 2]))
    """

    rows_are_lost = (
        "nn.MultiheadAttention computes from its projections to its output in one call, so that "
        "nothing can be added to that row by row"
    )

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        init: Callable[["LoRAMultiheadAttention"], None] | None = None,
        **options: Unpack[Options],
    ) -> None:
        plain = _checked_attention(type(self).__name__, base)
        names = TOGETHER if plain._qkv_same_embed_dim else APART
        shapes = {prefix: attrgetter(name)(plain).shape for name, prefix in names.items()}
        rows, columns = shapes.pop("lora_")
        super().__init__(base, (rank, columns), (rows, rank), rank, alpha, **options)
        for prefix, (rows, columns) in shapes.items():
            a, b = self.lora_a.new_empty(rank, columns), self.lora_b.new_zeros(rows, rank)
            self.register_parameter(f"{prefix}a", nn.Parameter(_uniform(a)))
            self.register_parameter(f"{prefix}b", nn.Parameter(b))
        self.initialize(init)
        self.take_over()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        arguments = (
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
            is_causal,
        )  # fmt: skip
        if self.merged_module is not None and self._enabled:
            return self.call_merged(*arguments)
        if self.strength_now() is None:
            return self.base(*arguments)
        if query.is_nested:  # an encoder's inference: only torch's own kernel takes these
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{type(self).__name__}: nested tensors give the adapter no gradient; call it "
                    "under torch.no_grad(), or pad"
                )
            return self.merged()(*arguments)
        if is_causal and attn_mask is None:
            raise ValueError(
                f"{type(self).__name__}: is_causal says what attn_mask is; pass the mask too"
            )
        is_causal = is_causal and key_padding_mask is None and not need_weights
        plain: Any = innermost(self)
        batched = query.dim() == 3
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        axes = "tokens" if not batched else "batch tokens" if plain.batch_first else "tokens batch"
        batch = "batch" if batched else "1"
        q, k, v = (
            rearrange(x, f"{axes} (heads dim) -> {batch} heads tokens dim", heads=plain.num_heads)
            for x in self.project_inputs(query, key, value)
        )
        mask = joined_mask(None if is_causal else attn_mask, key_padding_mask, q, k)
        if plain.bias_k is not None:  # one more key and value, learned
            k, v = _with_one_more(k, plain.bias_k), _with_one_more(v, plain.bias_v)
        if plain.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        p = plain.dropout if self.training else 0.0
        heads, weights = attend(q, k, v, mask, p, need_weights=need_weights, is_causal=is_causal)
        joined = rearrange(heads, f"{batch} heads tokens dim -> {axes} (heads dim)")
        out = self.project("out_proj.weight", joined)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return out, weights

    def project_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, with the branches that are on."""
        inputs = query, key, value
        if not self.together:
            parts = zip(list(APART)[:3], inputs, range(3), strict=True)
            return tuple(self.project(name, x, part) for name, x, part in parts)
        if query is key is value:
            return self.project("in_proj_weight", query).chunk(3, dim=-1)
        return tuple(self.project("in_proj_weight", x, part) for part, x in enumerate(inputs))

    def project(self, name: str, x: Tensor, part: int | None = None) -> Tensor:
        """x times one weight, and the branches of this layer and of those below that are on.

        Where query, key and value share a weight, `part` 0, 1 or 2 takes the third of one of them.
        """
        if isinstance(self.base, LoRAMultiheadAttention):
            out = self.base.project(name, x, part)
        else:
            out = _project(self.base, name, x, part)
        if (strength := self.strength_now()) is None:
            return out
        a, b = self.pairs()[name]
        b = _third(b, part) if name == "in_proj_weight" else b
        return add_lora(out, self.dropped(x), a, b, strength)

    @property
    def together(self) -> bool:
        """Whether query, key and value share one weight."""
        plain: Any = innermost(self)
        return bool(plain._qkv_same_embed_dim)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The two factors over each weight, by the weight's name."""
        names = TOGETHER if self.together else APART
        return {
            name: self.factors()
            if prefix == "lora_"
            else (getattr(self, f"{prefix}a"), getattr(self, f"{prefix}b"))
            for name, prefix in names.items()
        }

    def deltas(self) -> dict[str, Tensor]:
        """What is added to each weight, in float32 or better, with the runtime scale."""
        pairs = self.pairs().items()
        return {name: lora_delta(a, b, self.full_strength) for name, (a, b) in pairs}

    def exact_parameters(self) -> dict[str, Tensor]:
        """The weights of the layers below plus `deltas`."""
        below = self.parameters_below()
        if not self.enabled:
            return below
        deltas = self.deltas().items()
        return {**below, **{n: self.exact_below(n, delta.dtype) + delta for n, delta in deltas}}

    # each None where the base has no weight of this name
    in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight = map(
        effective, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    )

    @property
    def out_proj(self) -> Projection:
        """The effective weight and the bias of the output projection."""
        if self.merged_module is not None and self._enabled:
            merged: Any = self.merged_module.out_proj
            return Projection(merged.weight, merged.bias)
        plain: Any = innermost(self).out_proj
        weight = self.effective_parameters().get("out_proj.weight", plain.weight)
        return Projection(weight, plain.bias)


def attend(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads sources dim"],
    v: Float[Tensor, "batch heads sources dim"],
    mask: Float[Tensor, "*broadcast sources"] | None,
    dropout: float,
    *,
    need_weights: bool,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(dim) + mask) v  (Vaswani et al. 2017, eq. 1), and the softmax.

    The softmax (batch, heads, tokens, sources) is None unless `need_weights`; it comes after its
    dropout, as nn.MultiheadAttention gives it.
    """
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout)
    return weights @ v, weights


def joined_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """Both masks as one, to be added to the scores (batch, heads, tokens, sources).

    `attn_mask` is (tokens, sources) or (batch * heads, tokens, sources), `key_padding_mask`
    (batch, sources).  A boolean mask counts as -inf where it is True.

    Raises:
        ValueError: another shape, or neither boolean nor floating-point.
    """
    (batch, heads, tokens, _), sources = q.shape, k.shape[2]
    attention_shapes = [(tokens, sources), (batch * heads, tokens, sources)]
    found: Tensor | None = None
    for name, mask, shapes in (
        ("attn_mask", attn_mask, attention_shapes),
        ("key_padding_mask", key_padding_mask, [(batch, sources)]),
    ):
        if mask is None:
            continue
        boolean = mask.dtype == torch.bool
        if mask.shape not in shapes or not (boolean or mask.is_floating_point()):
            raise ValueError(
                f"{name}: {mask.dtype} of shape {tuple(mask.shape)}; expected bool or floats of "
                f"{' or '.join(map(str, shapes))}"
            )
        if boolean:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
        if name == "key_padding_mask":
            mask = mask[:, None, None]
        elif mask.dim() == 3:
            mask = mask.view(batch, heads, tokens, sources)
        mask = mask.to(q.dtype)
        found = mask if found is None else found + mask
    return found


def _project(attention: Any, name: str, x: Tensor, part: int | None) -> Tensor:
    """One projection of a plain nn.MultiheadAttention."""
    if name == "out_proj.weight":
        out: Tensor = attention.out_proj(x)
        return out
    weight, bias = getattr(attention, name), attention.in_proj_bias
    weight = _third(weight, part) if name == "in_proj_weight" else weight
    return F.linear(x, weight, None if bias is None else _third(bias, part))


def _third(rows: Tensor, part: int | None) -> Tensor:
    return rows if part is None else rows.chunk(3)[part]


def _with_one_more(keys: Tensor, bias: Tensor) -> Tensor:
    one = rearrange(bias, "1 1 (heads dim) -> 1 heads 1 dim", heads=keys.shape[1])
    return torch.cat([keys, one.to(keys.dtype).expand(len(keys), -1, -1, -1)], dim=2)


def _uniform(a: Tensor) -> Tensor:
    bound = a.shape[1] ** -0.5
    return a.uniform_(-bound, bound)


def _checked_attention(caller: str, base: object) -> nn.MultiheadAttention:
    if not isinstance(base, nn.Module):
        raise TypeError(f"{caller}: expected a module as base, got {type(base).__name__}")
    plain = innermost(base)
    if not isinstance(plain, nn.MultiheadAttention):
        raise ValueError(f"{caller}: {type(plain).__name__} is no nn.MultiheadAttention")
    if type(plain).forward is not nn.MultiheadAttention.forward:
        raise ValueError(
            f"{caller}: {type(plain).__name__} has a forward of its own, which would be lost"
        )
    if base is not plain and not isinstance(base, LoRAMultiheadAttention):
        raise ValueError(f"{caller}: {type(base).__name__} below is no LoRAMultiheadAttention")
    return plain
