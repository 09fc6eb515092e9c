"""A head in which some tokens have rows of their own that train, apart from any embedding's."""

from collections.abc import Sequence

from torch import Tensor, nn

from minipeft.adapters.protocol import innermost, linear_shape
from minipeft.adapters.wrapper import Wrapper
from minipeft.layers.trained import TrainedLogits, rows_of


class TrainedHeadRows(TrainedLogits):
    """A linear head that multiplies by rows of its own for some tokens.

    As TrainedLogits, but the rows are not an embedding's: `token_ids` are the tokens, `token_rows`
    (n, in_features) their rows, which start as the weight's, in float32.

    Raises:
        ValueError: no linear layer with a weight of (out, in), no ids, an id twice or beyond the
            rows, a layer on the meta device.

    >>> layer = TrainedHeadRows(nn.Linear(4, 10), [2, 7])
    >>> layer.token_rows.shape
    torch.Size([2, 4])
    """

    token_ids: Tensor

    def __init__(self, base: nn.Module, token_ids: Sequence[int]) -> None:
        Wrapper.__init__(self, base)
        plain = innermost(base)
        shape = linear_shape(plain)
        if shape is None or shape.transposed:
            raise ValueError(
                f"TrainedHeadRows: {type(plain).__name__} is no linear layer with a row for each "
                "token"
            )
        self.__dict__["tokens"] = self  # the rows that it follows are its own
        ids, self.token_rows = rows_of(self, token_ids, shape.out_features)
        self.register_buffer("token_ids", ids, persistent=False)
        self.take_over()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The rows."""
        return {"token_rows": self.token_rows}
