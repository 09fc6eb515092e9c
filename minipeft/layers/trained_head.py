"""A head in which some tokens have rows of their own that train, apart from any embedding's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import innermost, linear_shape
from minipeft.layers.trained import TrainedLogits, Unscaled, checked_ids


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
        plain = innermost(base)
        shape = linear_shape(plain)
        if shape is None or shape.transposed:
            raise ValueError(
                f"TrainedHeadRows: {type(plain).__name__} is no linear layer with a row for each "
                "token"
            )
        ids = checked_ids(token_ids, shape.out_features)
        weight: Tensor = plain.weight  # type: ignore[assignment]
        if weight.is_meta:
            raise ValueError("TrainedHeadRows: the head is on the meta device; load it first")
        Unscaled.__init__(self, base)
        self.__dict__["tokens"] = self  # the rows that it follows are its own
        on_device = torch.tensor(ids, device=weight.device)
        self.register_buffer("token_ids", on_device, persistent=False)
        rows = weight.detach()[on_device].to(torch.promote_types(weight.dtype, torch.float32))
        self.token_rows = nn.Parameter(rows.clone())
        self.take_over()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The rows."""
        return {"token_rows": self.token_rows}
