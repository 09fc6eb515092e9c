"""The layer that lies over a stack of adapter layers while rows of a batch use different ones.

A gate (rows, adapters) says which row uses which adapter.  It is one tensor for the whole model,
changed in place to serve other rows.  There are two kinds: bank.py joins the factors of linear
layers into one product; stack.py asks one layer after the other, of any kind.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import innermost
from minipeft.adapters.wrapper import Wrapper

Row = str | None | Sequence[str]  # an adapter, none, or several that add up


class ByRow(Wrapper):
    """A layer whose rows use different adapters among those of the layers below.

    `gate` (rows, capacity) has a 1 where a row uses an adapter; (1, capacity) is for all rows
    alike.  In a batch of n times as many rows, each row of the gate stands for n rows side by side,
    as `generate` has beams.  For inference: training raises.
    """

    nameless = True  # it is no adapter of its own
    gate: Tensor

    def __init__(self, base: nn.Module, gate: Tensor) -> None:
        super().__init__(base)
        # not a buffer: it is shared by all layers of a model, and casting one would part them
        self.gate = gate

    def refuse_training(self) -> None:
        """Raise RuntimeError if this call would train."""
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: rows of a batch use different adapters, which is for "
                "inference; call minipeft.use_adapters(model, names) to train, or model.eval()"
            )

    def rows_of_each(self, x: Tensor, least_axes: int = 2) -> int:
        """How many rows of the batch belong to each row of the gate.

        Raises:
            ValueError: another number of rows, or fewer axes than a batch has.
        """
        if len(self.gate) == 1:
            return x.shape[0] if x.dim() else 1
        if x.dim() < least_axes or x.shape[0] % len(self.gate):
            raise ValueError(
                f"{type(self).__name__}: a batch of shape {tuple(x.shape)} for {len(self.gate)} "
                "rows; use_adapters(rows=) takes one name for each row of the batch"
            )
        return x.shape[0] // len(self.gate)

    def _set_strength(self) -> None:
        self.strength.fill_(float(self._enabled))  # the layers' own scales are kept elsewhere

    @property
    def weight(self) -> Tensor:
        """No weight that all rows share: a meta tensor of the right shape and dtype.

        Models that look at those work, and nn.TransformerEncoderLayer calls this layer.
        """
        plain: Any = innermost(self)
        own = plain._parameters.get("weight")
        if own is not None:
            return torch.empty_like(own, device="meta")
        dtype = getattr(plain, "weight_dtype", None) or plain.weight.dtype
        if hasattr(plain, "num_embeddings"):
            shape = (plain.num_embeddings, plain.embedding_dim)
        else:
            shape = (plain.out_features, plain.in_features)
        shape = shape[::-1] if getattr(plain, "transposed", False) else shape
        return torch.empty(shape, dtype=dtype, device="meta")

    def exact_parameters(self) -> dict[str, Tensor]:
        """Rows use different weights, so there is no weight to merge."""
        raise ValueError(
            f"{type(self).__name__}: rows of a batch use different adapters; use_adapters first"
        )
