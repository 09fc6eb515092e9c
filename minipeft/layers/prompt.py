"""Prompts: trained vectors that take the place of embedded tokens; no weight changes.

Prompt tuning puts P trained rows in front of the embedded tokens, once, at the model's input:

    | prompt p_1 .. p_P | tokens x_1 .. x_S |  -> the frozen model
           trained            embedded

    PromptEmbedding   a table                               Lester et al. 2021
    PromptEncoder     a table through an LSTM or an MLP     P-tuning, Liu et al. 2021
    ZeroGatedPrompt   a table and gates for every layer     LLaMA-Adapter, Zhang et al. 2023

The last one enters inside the attention: a layer's frozen key and value projections make keys and
values of its rows, attention over them has a softmax of its own, and tanh(gate), 0 at the start,
times the result is added to what the layer computes anyway:

    y = softmax(scale * q k^T) v + tanh(gate) * softmax(scale * q prompt_k^T) prompt_v
"""

import copy
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def _check_size(owner: str, name: str, size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{owner}: {name}={size!r}; expected a whole number of at least 1")


def _table(owner: str, prompt_length: int, embedding_dim: int, init_std: float) -> Tensor:
    """Rows drawn from N(0, init_std) in float32, whatever the default dtype."""
    if not 0 < init_std < math.inf:
        raise ValueError(f"{owner}: init_std={init_std!r}; expected a number above 0")
    return torch.randn(prompt_length, embedding_dim, dtype=torch.float32) * init_std


class _Prompt(nn.Module):
    """What the prompts share: sizes, on or off, and that all parameters are the adapter's."""

    def __init__(self, prompt_length: int, embedding_dim: int) -> None:
        super().__init__()
        _check_size(type(self).__name__, "prompt_length", prompt_length)
        _check_size(type(self).__name__, "embedding_dim", embedding_dim)
        self.prompt_length, self.embedding_dim = prompt_length, embedding_dim
        self.enabled = True

    @property
    def scale(self) -> float:
        """1.0: a prompt is on or off, there is no product to scale."""
        return 1.0

    @scale.setter
    def scale(self, factor: float) -> None:
        if factor != 1.0:
            raise ValueError(
                f"{type(self).__name__}: cannot be scaled by {factor}; a prompt is on or off (see "
                "disable_adapters)"
            )

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """All its parameters."""
        return dict(self.named_parameters())

    def extra_repr(self) -> str:
        off = "" if self.enabled else ", disabled"
        return f"prompt_length={self.prompt_length}, embedding_dim={self.embedding_dim}{off}"


class PromptEmbedding(_Prompt):
    """Prompt tuning's table: `table` (prompt_length, embedding_dim), float32, from N(0, init_std).

    `forward()` returns it; the caller casts it to the dtype of the embedded tokens and puts it in
    front of them.  While `enabled` is False it has length 0.  Rows of real tokens are often the
    better start (Lester et al. 2021): see `rows_from_vocabulary`, `rows_from_tokens`.

    Raises:
        ValueError: a size below 1, init_std not above 0.

    >>> prompt = PromptEmbedding(5, 16)
    >>> prompt.load_table(rows_from_tokens(torch.randn(100, 16), [7, 3], 5))
    >>> prompt().shape
    torch.Size([5, 16])
    """

    def __init__(self, prompt_length: int, embedding_dim: int, *, init_std: float = 0.02) -> None:
        super().__init__(prompt_length, embedding_dim)
        rows = _table("PromptEmbedding", prompt_length, embedding_dim, init_std)
        self.table = nn.Parameter(rows)

    def forward(self) -> Float[Tensor, "prompt embedding_dim"]:
        return self.table if self.enabled else self.table[:0]

    def load_table(self, rows: Float[Tensor, "prompt embedding_dim"]) -> None:
        """Copy rows into the table; checked before anything is copied.

        Raises:
            ValueError: another shape, or a value that is not finite in the table's dtype.
        """
        if rows.shape != self.table.shape:
            raise ValueError(
                f"PromptEmbedding: rows of shape {tuple(rows.shape)}; expected "
                f"{tuple(self.table.shape)} (prompt_length, embedding_dim)"
            )
        rows = rows.detach().to(self.table.device, self.table.dtype)
        if not bool(rows.isfinite().all()):
            raise ValueError("PromptEmbedding: the rows hold NaN or Inf")
        with torch.no_grad():
            self.table.copy_(rows)


def _check_weight(owner: str, weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{owner}: weight of shape {tuple(weight.shape)} and {weight.dtype}; expected the "
            "floating-point weight (vocabulary, embedding_dim) of an embedding"
        )


def rows_from_vocabulary(
    weight: Tensor,
    prompt_length: int,
    *,
    generator: torch.Generator | None = None,
    among: int | None = None,
) -> Float[Tensor, "prompt embedding_dim"]:
    """Embeddings of random tokens, each at most once, as float32: a start for a prompt.

    `weight` (vocabulary, embedding_dim) is the model's embedding.  `among` takes them from the
    first ids alone, which many tokenizers give to frequent tokens; it also keeps out rows past the
    tokenizer's length, which some models pad their embedding with.  Drawn on the generator's
    device, without one on the CPU.

    Raises:
        ValueError: not a weight, `among` above the vocabulary, fewer tokens than prompt_length.
    """
    _check_weight("rows_from_vocabulary", weight)
    _check_size("rows_from_vocabulary", "prompt_length", prompt_length)
    vocabulary = len(weight)
    if among is not None:
        _check_size("rows_from_vocabulary", "among", among)
        if among > vocabulary:
            raise ValueError(
                f"rows_from_vocabulary: among={among}; the weight has {vocabulary} rows"
            )
        vocabulary = among
    if prompt_length > vocabulary:
        raise ValueError(
            f"rows_from_vocabulary: prompt_length={prompt_length} of {vocabulary} tokens; each is "
            "taken at most once, so expected no more than that"
        )
    device = "cpu" if generator is None else generator.device
    ids = torch.randperm(vocabulary, generator=generator, device=device)[:prompt_length]
    return weight.detach()[ids.to(weight.device)].to(torch.float32)


def rows_from_tokens(
    weight: Tensor, ids: Sequence[int] | Tensor, prompt_length: int
) -> Float[Tensor, "prompt embedding_dim"]:
    """Embeddings of a text's token ids as float32: the first ones, or all again and again.

    A text longer than the prompt is cut, a shorter one is repeated and its last repetition cut;
    special tokens among the ids count as any other (PEFT's rule, init "TEXT").

    Raises:
        ValueError: not a weight, no ids, ids in more than one dimension or outside the vocabulary.
    """
    _check_weight("rows_from_tokens", weight)
    _check_size("rows_from_tokens", "prompt_length", prompt_length)
    tokens = torch.as_tensor(ids)
    if tokens.dim() != 1 or not len(tokens) or tokens.is_floating_point():
        raise ValueError(
            f"rows_from_tokens: ids of shape {tuple(tokens.shape)} and {tokens.dtype}; expected a "
            "list of whole numbers, the ids of one text, and at least one"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= len(weight):
        raise ValueError(
            f"rows_from_tokens: ids from {low} to {high}; the weight has rows 0 to "
            f"{len(weight) - 1}"
        )
    tokens = tokens.to(weight.device, torch.int64)
    chosen = tokens[torch.arange(prompt_length, device=weight.device) % len(tokens)]
    return weight.detach()[chosen].to(torch.float32)


class PromptEncoder(_Prompt):
    """P-tuning (version 1): a prompt that a small network computes from a table, in float32.

    `embedding` (prompt_length, embedding_dim), drawn from N(0, 1), goes through

        "mlp"   Linear(embedding_dim, hidden), ReLU, Linear(hidden, hidden), ReLU,
                Linear(hidden, embedding_dim)
        "lstm"  an LSTM over the prompt's positions, both ways, `hidden` each way, then
                Linear(2 hidden, 2 hidden), ReLU, Linear(2 hidden, embedding_dim)

    the layers, and their order, of PEFT's P_TUNING.  `hidden` is `embedding_dim` unless given.
    `dropout` acts between the layers of the LSTM while training, and nowhere else.  While
    `enabled` is False the prompt has length 0.  `bake` keeps the rows and drops the network.
    torch.compile breaks its graph at an LSTM; an MLP and a baked prompt compile whole.

    Raises:
        ValueError: a size below 1, another kind, dropout outside [0, 1), settings of the LSTM for
            an MLP, dropout with nothing between layers to act on.

    >>> PromptEncoder(5, 16, kind="lstm", hidden=8).bake()
    PromptEmbedding(prompt_length=5, embedding_dim=16)
    """

    def __init__(
        self,
        prompt_length: int,
        embedding_dim: int,
        *,
        hidden: int | None = None,
        kind: str = "mlp",
        lstm_layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(prompt_length, embedding_dim)
        hidden = embedding_dim if hidden is None else hidden
        _check_size("PromptEncoder", "hidden", hidden)
        _check_size("PromptEncoder", "lstm_layers", lstm_layers)
        if kind not in ("mlp", "lstm"):
            raise ValueError(f"PromptEncoder: kind={kind!r}; expected 'mlp' or 'lstm'")
        if not 0 <= dropout < 1:
            raise ValueError(f"PromptEncoder: dropout={dropout!r}; expected 0 <= dropout < 1")
        if kind == "mlp" and lstm_layers != 2:
            raise ValueError(f"PromptEncoder: lstm_layers={lstm_layers} needs kind='lstm'")
        if dropout and (kind == "mlp" or lstm_layers == 1):
            raise ValueError(
                f"PromptEncoder: dropout={dropout} acts between the layers of an LSTM; expected "
                "kind='lstm' with 2 or more lstm_layers, or no dropout"
            )
        self.kind, self.hidden = kind, hidden
        rows = torch.randn(prompt_length, embedding_dim, dtype=torch.float32)
        self.embedding = nn.Parameter(rows)
        sizes = [embedding_dim, hidden, hidden, embedding_dim]
        if kind == "lstm":
            self.lstm = nn.LSTM(
                embedding_dim, hidden, lstm_layers,
                dropout=dropout, bidirectional=True, dtype=torch.float32,
            )  # fmt: skip
            sizes = [2 * hidden, 2 * hidden, embedding_dim]
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(sizes):
            layers += [nn.Linear(size_in, size_out, dtype=torch.float32), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def _rows(self) -> Float[Tensor, "prompt embedding_dim"]:
        rows: Tensor = self.embedding
        if self.kind == "lstm":
            rows = self.lstm(rows)[0]  # (prompt, 2 hidden): forwards, backwards
        out: Tensor = self.mlp(rows)
        return out

    def forward(self) -> Float[Tensor, "prompt embedding_dim"]:
        rows = self._rows()
        return rows if self.enabled else rows[:0]

    def bake(self) -> PromptEmbedding:
        """The same prompt, without dropout, as a plain table: what to keep after training."""
        baked = PromptEmbedding(self.prompt_length, self.embedding_dim)
        baked.to(self.embedding.device).train(self.training)
        baked.enabled = self.enabled
        # not under no_grad: CPUs have another LSTM there, which rounds differently
        baked.load_table(copy.deepcopy(self).eval()._rows())
        return baked

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hidden={self.hidden}, {self.kind}"


class ZeroGatedPrompt(_Prompt):
    """LLaMA-Adapter's prompts: for every layer rows, and a gate per head that starts at 0.

    `tables` has (prompt_length, embedding_dim) per layer, drawn from N(0, init_std), and `gates`
    (n_heads,) per layer, zeros; all float32.  `layer(i)` returns both, the gate before its tanh.
    The caller casts the rows, sends them through layer i's key and value projections (without a
    rotary embedding: they have no place in the text) and adds `zero_gated_attention` to what the
    layer's attention computes.  At gate 0 the model computes what it did, bit for bit; the gates
    have gradients there, the rows only once the gates have moved.

    While `enabled` is False the rows have length 0, and nothing is added.

    Raises:
        ValueError: a size below 1, init_std not above 0.

    >>> prompt = ZeroGatedPrompt(3, 10, 16, n_heads=4)
    >>> rows, gate = prompt.layer(2)
    >>> rows.shape, gate
    (torch.Size([10, 16]), Parameter containing:
    tensor([0., 0., 0., 0.], requires_grad=True))
    """

    def __init__(
        self,
        n_layers: int,
        prompt_length: int,
        embedding_dim: int,
        n_heads: int,
        *,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(prompt_length, embedding_dim)
        _check_size("ZeroGatedPrompt", "n_layers", n_layers)
        _check_size("ZeroGatedPrompt", "n_heads", n_heads)
        self.n_layers, self.n_heads = n_layers, n_heads
        self.tables = nn.ParameterList(
            _table("ZeroGatedPrompt", prompt_length, embedding_dim, init_std)
            for _ in range(n_layers)
        )
        self.gates = nn.ParameterList(
            torch.zeros(n_heads, dtype=torch.float32) for _ in range(n_layers)
        )

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's rows (prompt_length, embedding_dim) and gate (n_heads,), before the tanh."""
        rows = self.tables[layer]
        return rows if self.enabled else rows[:0], self.gates[layer]

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        return [self.layer(index) for index in range(self.n_layers)]

    def extra_repr(self) -> str:
        return f"n_layers={self.n_layers}, n_heads={self.n_heads}, {super().extra_repr()}"


def zero_gated_attention(
    q: Float[Tensor, "b h t dk"],
    prompt_k: Tensor,
    prompt_v: Tensor,
    gate: Tensor,
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h t dv"]:
    """tanh(gate) * softmax(scale * q prompt_k^T) prompt_v  (Zhang et al. 2023).

    A softmax of its own, over the prompt alone: add the result to attention over the tokens.
    `prompt_k` (g, p, dk) and `prompt_v` (g, p, dv) are the same for all rows; h is a multiple of g
    (grouped heads).  `gate` is (h,), or (b, h) for each row its own, before the tanh.  All are
    cast to q's dtype.  `scale` None: 1 / sqrt(dk).  p = 0 adds zeros.

    Raises:
        ValueError: shapes that do not belong together.
    """
    batch, heads, tokens, key_dim = q.shape
    shapes = tuple(prompt_k.shape), tuple(prompt_v.shape), tuple(gate.shape)
    if (
        prompt_k.dim() != 3
        or prompt_v.dim() != 3
        or prompt_k.shape[:2] != prompt_v.shape[:2]
        or prompt_k.shape[2] != key_dim
        or len(prompt_k) == 0
        or heads % len(prompt_k)
        or shapes[2] not in ((heads,), (batch, heads))
    ):
        raise ValueError(
            f"zero_gated_attention: q {tuple(q.shape)}, prompt_k {shapes[0]}, prompt_v {shapes[1]}"
            f", gate {shapes[2]}; expected (b, h, t, dk), (g, p, dk), (g, p, dv), (h,) or (b, h) "
            "with h a multiple of g"
        )
    if prompt_k.shape[1] == 0:  # a mean over nothing; not every attention kernel takes it
        return q.new_zeros(batch, heads, tokens, prompt_v.shape[2])
    k, v = (x.to(q.device, q.dtype).expand(batch, *x.shape) for x in (prompt_k, prompt_v))
    mean = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=heads != k.shape[1])
    return torch.tanh(gate).to(mean.device, mean.dtype)[..., None, None] * mean
