"""P-tuning v2: trainable keys and values in front of every attention layer.

Prefix tuning (Li & Liang 2021) and P-tuning v2 (Liu et al. 2022) change no weight.  Each attention
layer gets P more keys and values, which belong to no token:

        keys    | prefix k_1 .. k_P | tokens k_1 .. k_S |
        values  | prefix v_1 .. v_P | tokens v_1 .. v_S |
                      trained             computed

    y = softmax(scale * q [prefix_k, k]^T) [prefix_v, v]

Every query sees the whole prefix: causality hides what comes after a query, a mask hides padding,
and the prefix is neither.

A prompt at the input (layers/prompt.py) trains one vector for each position, and the frozen layers
compute keys and values from it.  A deep prefix trains the keys and values of each layer directly:
more numbers, and no run of the prefix through the model.

The prefix is a trained table with a row for each position.  Or a small MLP makes the table (Linear,
tanh, Linear on an embedding); `bake` drops the MLP after training.  Other programs read the prefix
as one flat table (prefix_length, sum of kv_heads * (key_dim + value_dim)), with columns ordered by
layer, then keys before values, then head, then dim.

Read next: fast/prefix.py, the same attention without a copy of the keys.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minipeft import ops
from minipeft.adapters.on_off import OnOff
from minipeft.adapters.protocol import expect, whole


def prefix_attention(
    q: Float[Tensor, "b h t dk"],
    k: Float[Tensor, "b g s dk"],
    v: Float[Tensor, "b g s dv"],
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    dropout: float = 0.0,
    gate: Tensor | None = None,
) -> Float[Tensor, "b h t dv"]:
    """Attention with a prefix that every query sees, for attention of your own.

    The t queries are the last of the s tokens (t < s when keys come from a cache): with
    `is_causal`, query i sees tokens 0 to s - t + i.  h is a multiple of g (grouped heads).
    `mask` is over the tokens, broadcastable to (b, h, t, s): bool (True attends) or added to the
    scores, and combined with `is_causal`.  `prefix_k` (g, p, dk) and `prefix_v` (g, p, dv) are for
    all rows of the batch, (b, g, p, ...) for each its own; p = 0 is attention without prefix.  Both
    are cast to k's dtype.  `scale` None: 1 / sqrt(dk).  `dropout` acts on the attention weights,
    also in eval mode: pass 0 outside training.  `gate` (g,), or one number for all heads, goes from
    attention without the prefix (0) to attention with it (1): `PrefixEncoder.gate`.

    `joined_attention` is the plain form, and what torch.compile traces.  Where that was measured to
    be faster, fast/prefix.py merges two attentions; the result differs by rounding.
    `use_kernels("plain")` switches that off.

    Raises:
        ValueError: shapes that do not belong together, a mask whose last size is not s.
    """
    check_tokens(q, k, v, mask, is_causal=is_causal)
    attend = joined_attention
    if not torch.compiler.is_compiling():
        attend = ops.OPERATORS["prefix_attention"].choose(q.device, q.dtype, q.shape)
    settings: Any = {"mask": mask, "is_causal": is_causal, "scale": scale, "dropout": dropout}
    joined: Tensor = attend(q, k, v, prefix_k, prefix_v, **settings)
    if gate is None:
        return joined
    alone = attend(q, k, v, prefix_k[..., :0, :], prefix_v[..., :0, :], **settings)
    return gated_attention(alone, joined, gate)


@ops.plain_row("prefix_attention")
def joined_attention(
    q: Float[Tensor, "b h t dk"],
    k: Float[Tensor, "b g s dk"],
    v: Float[Tensor, "b g s dv"],
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h t dv"]:
    """`prefix_attention` as its formula says: the prefix in front of the keys and values."""
    (t, s), grouped = (q.shape[2], k.shape[2]), q.shape[1] != k.shape[1]
    k, v, p = with_prefix(k, v, prefix_k, prefix_v)
    if is_causal and t > 1:
        lower_right = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
        if mask is None:
            mask = lower_right
        elif mask.dtype == torch.bool:
            mask = mask & lower_right
        else:
            mask = mask.masked_fill(~lower_right, -math.inf)
    if mask is not None:
        mask = pad_mask(mask, p)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def with_prefix(
    k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Keys and values (b, g, p + s, dim) with the prefix in front, and p.

    Raises:
        ValueError: the prefix has other heads or sizes.
    """
    check_prefix(k, v, prefix_k, prefix_v)
    joined = []
    for tokens, prefix in ((k, prefix_k), (v, prefix_v)):
        prefix = prefix.to(tokens.device, tokens.dtype).expand(len(tokens), -1, -1, -1)
        joined.append(torch.cat([prefix, tokens], dim=2))
    return joined[0], joined[1], prefix_k.shape[-2]


def pad_mask(mask: Tensor, prefix_length: int) -> Tensor:
    """The mask with columns in front that let every query see the prefix."""
    return F.pad(mask, (prefix_length, 0), value=True if mask.dtype == torch.bool else 0.0)


def gated_attention(
    alone: Float[Tensor, "b h t dv"],
    joined: Float[Tensor, "b h t dv"],
    gate: Tensor,
    *,
    others: Float[Tensor, "b h t dv"] | None = None,
) -> Float[Tensor, "b h t dv"]:
    """From attention without a prefix towards attention with it: alone + gate * (joined - alone).

    With y_x attention to the tokens alone and y_p to the prefix alone, joined attention is
    y_x + w (y_p - y_x), w a weight for each query (fast/prefix.py).  So a gate, one per key/value
    head (g,), makes it y_x + gate * w (y_p - y_x): it multiplies the weight of the prefix.

    Several gated prefixes each add their part: `others` is `alone` with the parts of others.
    """
    gate = gate.to(alone.dtype).reshape(-1).repeat_interleave(alone.shape[1] // gate.numel())
    start = alone if others is None else others
    return start + gate[:, None, None] * (joined - alone)


def check_tokens(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool) -> None:
    """Raise ValueError unless queries, keys, values and mask belong together."""
    (batch, heads, t, size), (_, groups, s, _) = q.shape, k.shape
    if heads % groups or k.shape != (batch, groups, s, size) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"prefix_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected (b, h, t, dk), (b, g, s, dk), (b, g, s, dv) with h a multiple of g"
        )
    if is_causal and t > s:
        raise ValueError(f"prefix_attention: {t} queries over {s} keys cannot be causal")
    if mask is not None and mask.shape[-1] != s:
        raise ValueError(
            f"prefix_attention: the mask covers {mask.shape[-1]} keys, there are {s} (leave the "
            "prefix out: it is always visible)"
        )


def check_prefix(k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> None:
    """Raise ValueError unless the prefix has the heads and sizes of these keys and values."""
    for name, tokens, prefix in (("keys", k, prefix_k), ("values", v, prefix_v)):
        (batch, heads, _, size), shape = tokens.shape, tuple(prefix.shape)
        wanted = (heads, prefix_k.shape[-2], size)
        if shape[-3:] != wanted or shape[:-3] not in ((), (1,), (batch,)):
            raise ValueError(
                f"prefix of other shapes: {name} are {shape}; expected {wanted} "
                f"(heads, prefix, dim) for tokens of shape {tuple(tokens.shape)}"
            )


class KVShape(NamedTuple):
    """The key/value heads of one layer's attention, and the sizes of their keys and values."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers per prefix position."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def split_kv(rows: Float[Tensor, "prefix width"], shape: KVShape) -> tuple[Tensor, Tensor]:
    """One layer's columns as k (kv_heads, prefix, key_dim) and v (kv_heads, prefix, value_dim)."""
    keys = shape.kv_heads * shape.key_dim
    k = rearrange(rows[:, :keys], "p (h d) -> h p d", h=shape.kv_heads)
    v = rearrange(rows[:, keys:], "p (h d) -> h p d", h=shape.kv_heads)
    return k, v


def join_kv(k: Float[Tensor, "h p dk"], v: Float[Tensor, "h p dv"]) -> Float[Tensor, "p width"]:
    """The inverse of `split_kv`: keys of all heads, then values of all heads."""
    return torch.cat([rearrange(t, "h p d -> p (h d)") for t in (k, v)], dim=1)


class PrefixEncoder(OnOff):
    """The trainable prefix of every layer: a table, or an MLP that produces it.

    `kv_shapes` has (kv_heads, key_dim, value_dim) for each layer, as attention gets them (grouped
    heads once, not repeated).  Everything is float32.  Without `hidden` each layer has a table
    (prefix_length, width), drawn from N(0, init_std).  With `hidden`, an embedding (prefix_length,
    embedding_dim) goes through Linear(embedding_dim, hidden), tanh, and a Linear(hidden, width) for
    each layer, scaled so that the prefix starts near N(0, init_std) too; `embedding_dim` is
    `hidden` unless given.  `dropout` acts on the prefix while training.

    The first `frozen` positions are not trained: an attention sink from load_kv, for example.  With
    `gated` each layer has a gate for each key/value head, which scales the weight of the prefix by
    tanh(gate) (see `gated_attention`).  Gates start at 0, so the model starts exactly where it was.

    `forward()` returns (k, v) for each layer, each (kv_heads, prefix_length, dim).  While `enabled`
    is False (minipeft.disable_adapters) they have length 0: attention without prefix.

    Raises:
        ValueError: no layers, sizes or prefix_length below 1, dropout outside [0, 1), init_std
            not above 0, frozen not below prefix_length.

    >>> encoder = PrefixEncoder([(2, 8, 8)] * 3, prefix_length=5)
    >>> k, v = encoder()[0]
    >>> k.shape, encoder.flat().shape
    (torch.Size([2, 5, 8]), torch.Size([5, 96]))
    """

    def __init__(
        self,
        kv_shapes: Sequence[tuple[int, int, int]],
        prefix_length: int,
        *,
        hidden: int | None = None,
        embedding_dim: int | None = None,
        dropout: float = 0.0,
        init_std: float = 0.02,
        frozen: int = 0,
        gated: bool = False,
    ) -> None:
        super().__init__()
        owner = "PrefixEncoder"
        self.kv_shapes = [
            KVShape(*(whole(owner, f"kv_shapes[{index}]", size) for size in shape))
            for index, shape in enumerate(kv_shapes)
        ]
        expect(owner, "kv_shapes", kv_shapes, self.kv_shapes, "one shape per layer")
        self.prefix_length = whole(owner, "prefix_length", prefix_length)
        self.frozen = whole(owner, "frozen", frozen, least=0)
        expect(owner, "frozen", frozen, frozen < prefix_length, "fewer than prefix_length")
        self.hidden = None if hidden is None else whole(owner, "hidden", hidden)
        if embedding_dim is not None:
            whole(owner, "embedding_dim", embedding_dim)
            expect(owner, "hidden", hidden, hidden, "the size of the MLP, beside embedding_dim")
        expect(owner, "dropout", dropout, 0 <= dropout < 1, "0 <= dropout < 1")
        expect(owner, "init_std", init_std, 0 < init_std < math.inf, "a number above 0")
        self.dropout, self.gated = dropout, gated
        widths = [shape.width for shape in self.kv_shapes]
        trained = prefix_length - frozen

        def table(length: int, width: int) -> Tensor:
            return torch.randn(length, width, dtype=torch.float32) * init_std

        if frozen:
            self.sinks = nn.ParameterList(table(frozen, width) for width in widths)
            self.sinks.requires_grad_(False)
        if gated:
            self.gates = nn.ParameterList(
                torch.zeros(shape.kv_heads, dtype=torch.float32) for shape in self.kv_shapes
            )
        if hidden is None:
            self.tables = nn.ParameterList(table(trained, width) for width in widths)
        else:
            rows = torch.randn(trained, embedding_dim or hidden, dtype=torch.float32)
            self.embedding = nn.Parameter(rows)
            self.inner = nn.Linear(embedding_dim or hidden, hidden, dtype=torch.float32)
            outer = [nn.Linear(hidden, width, dtype=torch.float32) for width in widths]
            for linear in outer:  # tanh's outputs have a mean square of about a third
                nn.init.normal_(linear.weight, std=init_std * math.sqrt(3 / hidden))
                nn.init.zeros_(linear.bias)
            self.outer = nn.ModuleList(outer)

    def _rows(self, layer: int, dropout: float = 0.0) -> Float[Tensor, "prefix width"]:
        if self.hidden is None:
            rows: Tensor = self.tables[layer]
        else:
            # computed again for each layer, which is cheap: re-entrant checkpointing needs graphs
            # of layers that share nothing
            rows = self.outer[layer](torch.tanh(self.inner(self.embedding)))
        if dropout:
            rows = F.dropout(rows, dropout)
        return torch.cat([self.sinks[layer], rows]) if self.frozen else rows

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v of one layer, (kv_heads, prefix_length, dim); of length 0 while not enabled."""
        rows = self._rows(layer, self.dropout if self.training else 0.0)
        return split_kv(rows if self.enabled else rows[:0], self.kv_shapes[layer])

    def gate(self, layer: int) -> Float[Tensor, " kv_heads"] | None:
        """tanh of the gates of one layer; None without gates."""
        return torch.tanh(self.gates[layer]) if self.gated else None

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        return [self.layer(index) for index in range(len(self.kv_shapes))]

    def flat(self) -> Float[Tensor, "prefix total"]:
        """The whole prefix as one table, layer by layer, without dropout."""
        return torch.cat([self._rows(index) for index in range(len(self.kv_shapes))], dim=1)

    def bake(self) -> "PrefixEncoder":
        """A new encoder with the same prefix as plain tables: what to keep after training."""
        baked = PrefixEncoder(
            self.kv_shapes, self.prefix_length,
            dropout=self.dropout, frozen=self.frozen, gated=self.gated,
        )  # fmt: skip
        baked.to(self.flat().device).train(self.training)
        baked.enabled = self.enabled
        baked.load_flat(self.flat().detach())
        if self.gated:
            baked.gates.load_state_dict(self.gates.state_dict())
        return baked

    def load_flat(self, flat: Tensor) -> None:
        """Copy a flat table (prefix_length, total) into a prefix without an MLP.

        Raises:
            ValueError: another shape, a value that is not finite, or an encoder with an MLP;
                nothing has changed then.
        """
        widths = [shape.width for shape in self.kv_shapes]
        if self.hidden is not None:
            raise ValueError("PrefixEncoder: its MLP cannot take a table; load into .bake()")
        if tuple(flat.shape) != (self.prefix_length, sum(widths)):
            raise ValueError(
                f"PrefixEncoder: a table of shape {tuple(flat.shape)}; expected "
                f"{(self.prefix_length, sum(widths))}"
            )
        if not flat.is_floating_point() or not bool(flat.to(torch.float32).isfinite().all()):
            raise ValueError(
                "PrefixEncoder: the table holds NaN or Inf, or no floating-point numbers"
            )
        with torch.no_grad():
            for layer, columns in enumerate(torch.split(flat, widths, dim=1)):
                if self.frozen:
                    self.sinks[layer].copy_(columns[: self.frozen])
                self.tables[layer].copy_(columns[self.frozen :])

    def load_kv(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy keys and values of each layer, each (kv_heads, prefix_length, dim), as caches hold.

        Keys are those that attention multiplies by (in most models after rotary embedding).  A
        leading dimension of 1 is dropped.

        Raises:
            ValueError: another number of layers or other shapes, values that are not finite, or
                an encoder with an MLP; nothing has changed then.
        """
        given = [tuple(t[0] if t.dim() == 4 and len(t) == 1 else t for t in pair) for pair in pairs]
        expected = [
            tuple((s.kv_heads, self.prefix_length, dim) for dim in (s.key_dim, s.value_dim))
            for s in self.kv_shapes
        ]
        if len(given) != len(expected):
            raise ValueError(f"load_kv: {len(given)} layers; the prefix has {len(expected)}")
        for layer, (pair, shapes) in enumerate(zip(given, expected, strict=True)):
            found = tuple(tuple(t.shape) for t in pair)
            if found != shapes:
                raise ValueError(f"load_kv: layer {layer} has shapes {found}; expected {shapes}")
        device = next(self.parameters()).device
        self.load_flat(torch.cat([join_kv(k, v).to(device, torch.float32) for k, v in given], 1))

    def extra_repr(self) -> str:
        how = "table" if self.hidden is None else f"hidden={self.hidden}"
        frozen = f", frozen={self.frozen}" if self.frozen else ""
        rest = f"{frozen}{', gated' if self.gated else ''}{'' if self.enabled else ', disabled'}"
        return f"prefix_length={self.prefix_length}, layers={len(self.kv_shapes)}, {how}{rest}"
