"""Prompts: trained vectors that take the place of embedded tokens; no weight changes.

Prompt tuning puts P trained rows in front of the embedded tokens, once, at the model's input:

    | prompt p_1 .. p_P | tokens x_1 .. x_S |  -> the frozen model
           trained            embedded

    PromptEmbedding   a table                               Lester et al. 2021
    PromptEncoder     a table through an MLP                P-tuning, Liu et al. 2021
"""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.adapters.on_off import OnOff
from minipeft.adapters.protocol import expect, whole


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
    front of them.  While `enabled` is False it has length 0.  Embeddings of real tokens are often
    the better start (Lester et al. 2021): give them to `load_table`.

    Raises:
        ValueError: a size below 1, init_std not above 0.

    >>> prompt = PromptEmbedding(5, 16)
    >>> embedding = nn.Embedding(100, 16)
    >>> prompt.load_table(embedding.weight[[7, 3, 7, 3, 7]])
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
