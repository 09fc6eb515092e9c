"""Prompts: trained vectors that take the place of embedded tokens; no weight changes.

Prompt tuning puts P trained rows in front of the embedded tokens, once, at the model's input:

    | prompt p_1 .. p_P | tokens x_1 .. x_S |  -> the frozen model
           trained            embedded

    PromptEmbedding   a table                               Lester et al. 2021
    PromptEncoder     a table through an MLP                P-tuning, Liu et al. 2021
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.adapters.on_off import OnOff
from minipeft.adapters.sizes import expect, whole


class _Prompt(OnOff):
    """What the prompts share: their sizes."""

    def __init__(self, prompt_length: int, embedding_dim: int) -> None:
        super().__init__()
        self.prompt_length = whole(type(self).__name__, "prompt_length", prompt_length)
        self.embedding_dim = whole(type(self).__name__, "embedding_dim", embedding_dim)

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
        fits = 0 < init_std < math.inf
        expect("PromptEmbedding", "init_std", init_std, fits, "a number above 0")
        rows = torch.randn(prompt_length, embedding_dim, dtype=torch.float32)
        self.table = nn.Parameter(rows * init_std)

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
    whole("rows_from_vocabulary", "prompt_length", prompt_length)
    vocabulary = len(weight)
    if among is not None:
        whole("rows_from_vocabulary", "among", among)
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
    whole("rows_from_tokens", "prompt_length", prompt_length)
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

        Linear(embedding_dim, hidden), ReLU, Linear(hidden, hidden), ReLU,
        Linear(hidden, embedding_dim)

    the layers, and their order, of PEFT's P_TUNING with an MLP.  The paper's other network, an
    LSTM, is not here: torch.compile breaks its graph at one.  `hidden` is `embedding_dim` unless
    given.  While `enabled` is False the prompt has length 0.  `bake` keeps the rows and drops the
    network.

    Raises:
        ValueError: a size below 1.

    >>> PromptEncoder(5, 16, hidden=8).bake()
    PromptEmbedding(prompt_length=5, embedding_dim=16)
    """

    def __init__(
        self, prompt_length: int, embedding_dim: int, *, hidden: int | None = None
    ) -> None:
        super().__init__(prompt_length, embedding_dim)
        hidden = embedding_dim if hidden is None else hidden
        self.hidden = whole("PromptEncoder", "hidden", hidden)
        rows = torch.randn(prompt_length, embedding_dim, dtype=torch.float32)
        self.embedding = nn.Parameter(rows)
        layers: list[nn.Module] = []
        for sizes in itertools.pairwise([embedding_dim, hidden, hidden, embedding_dim]):
            layers += [nn.Linear(*sizes, dtype=torch.float32), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self) -> Float[Tensor, "prompt embedding_dim"]:
        rows: Tensor = self.mlp(self.embedding)
        return rows if self.enabled else rows[:0]

    def bake(self) -> PromptEmbedding:
        """The same prompt as a plain table: what to keep after training."""
        baked = PromptEmbedding(self.prompt_length, self.embedding_dim)
        baked.to(self.embedding.device).train(self.training)
        baked.enabled = self.enabled
        baked.load_table(self.mlp(self.embedding))
        return baked

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hidden={self.hidden}"
