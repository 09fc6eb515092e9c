"""New rows behind a frozen table, and new logits behind a frozen head.

    ids     0 ... n-1 | n ... n+k-1            logits    0 ... n-1 | n ... n+k-1
    rows    the base's | new_rows, trained               base(x)   | x new_rows^T

The base computes with the shapes that it had, so its rows and logits keep every bit; the new ones
stand beside them.  Chinese-LLaMA (Cui et al. 2023) adds 17,953 pieces so: trained whole, its two
tables take 409 M numbers, their new rows 147 M.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minipeft.adapters.linearity import why_not_formula
from minipeft.adapters.on_off import Unscaled
from minipeft.adapters.protocol import innermost, is_packed, linear_shape, why_not
from minipeft.adapters.wrapper import Wrapper
from minipeft.layers.embeddings import checked_table

Number = tuple[nn.Module, tuple[str, ...], str]  # a module, the way to the owner, an attribute


def set_number(number: Number, value: int) -> None:
    """Set an attribute of a module, or of what its attributes lead to.

    The way is followed each time: a prefix gives a model copies of its configurations.
    """
    owner, way, name = number
    for step in way:
        owner = vars(owner)[step]
    setattr(owner, name, value)


def _never(dtype: torch.dtype) -> float:
    """A logit whose probability is 0, with room below it for what generate subtracts."""
    return torch.finfo(dtype).min / 2


class _Longer(Unscaled, Wrapper):
    """What the table and the head share: how many rows the base has, and folding into one."""

    folds_into_base = False
    rows_are_lost = "it changes the number of logits; merge it first (remove(merge=True))"
    old_rows: int
    counted: str  # the base's attribute that is its number of rows

    def _rows_of(self, rows: Tensor, columns: int) -> nn.Parameter:
        """The new rows as a parameter: float32 or better, on the weight's device."""
        plain = innermost(self)
        first = next(plain.parameters())
        if first.is_meta:
            raise ValueError(
                f"{type(self).__name__}: the weight is on the meta device; load it first"
            )
        own = getattr(plain, "weight_dtype", first.dtype)
        if rows.dim() != 2 or not len(rows) or rows.shape[1] != columns:
            raise ValueError(
                f"{type(self).__name__}: new rows of shape {tuple(rows.shape)}; expected "
                f"(rows, {columns}), at least one"
            )
        if not rows.is_floating_point() or not bool(rows.isfinite().all()):
            raise ValueError(f"{type(self).__name__}: the new rows are no finite floats")
        dtype = torch.promote_types(own, torch.float32)
        return nn.Parameter(rows.detach().to(first.device, dtype, copy=True))

    def why_not_foldable(self) -> str | None:
        """Why the module below is not proved to compute the formula of its kind; None: it is."""
        return why_not("fold", innermost(self))

    def merged(self, *, requantize: bool = False) -> nn.Module:
        """One plain table or head with all rows; `requantize` rounds all of them to 4 bits."""
        made: Any = super().merged(requantize=requantize)
        if not is_packed(made):
            setattr(made, self.counted, len(made.weight))
        return made

    def fold(self, *, requantize: bool = False) -> nn.Module:
        """`merged`: the longer weight has no place in the base's own."""
        if not self.enabled:
            self.restore_base()
        return self.merged(requantize=requantize)


class LongerTable(_Longer):
    """An embedding with rows for new tokens, which train: ids from n on take rows of `new_rows`.

    `new_rows` (k, embedding_dim) is float32 or better; a table that scales its output (Gemma's)
    scales them too.  `num_embeddings` is n + k.  While it is off the table has n rows: a new id
    raises IndexError as it did before (compiled code gives NaN).

    Raises:
        TypeError: no module.
        ValueError: no embedding, or one that gives something else than rows of its table; new rows
            of another shape or not finite; a table on the meta device.

    >>> layer = LongerTable(nn.Embedding(10, 4), torch.zeros(2, 4))
    >>> layer(torch.tensor([3, 11])).shape, layer.num_embeddings
    (torch.Size([2, 4]), 12)
    """

    counted = "num_embeddings"
    new_rows: nn.Parameter

    def __init__(self, base: nn.Module, rows: Tensor) -> None:
        super().__init__(base)
        self.old_rows, dim = checked_table(type(self).__name__, base)
        self.new_rows = self._rows_of(rows, dim)
        self.num_embeddings = self.old_rows + len(self.new_rows)
        # numbers of rows elsewhere in the model, which model/vocabulary.py changed
        self.__dict__["numbers"] = []
        self.take_over()

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        if self.merged_module is not None and self._enabled:
            made: Tensor = self.call_merged(ids)
            return made
        strength = self.strength_now()
        if strength is None:
            return self._modules["base"](ids)
        out = self._modules["base"](ids.where(ids < self.old_rows, 0))
        return self.on_top(out, ids, strength)

    def on_top(self, out: Tensor, ids: Tensor, strength: float | Tensor) -> Tensor:
        """The output of the layers below, and for ids from n on the new rows."""
        rows = F.embedding((ids - self.old_rows).clamp(min=0), self.new_rows)
        scale = getattr(innermost(self), "embed_scale", None)
        if scale is not None:
            rows = rows * scale
        if isinstance(strength, Tensor):  # compiled: 0 is off
            rows = torch.where(strength == 0, torch.nan, rows)
        return torch.where((ids >= self.old_rows)[..., None], rows.to(out.dtype), out)

    def exact_parameters(self) -> dict[str, Tensor]:
        """The table with the new rows behind it."""
        below = self.parameters_below()
        if not self.enabled:
            return below
        table = self.exact_below("weight", torch.float32)
        return {**below, "weight": torch.cat([table, self.new_rows.to(table.dtype)])}

    def fold(self, *, requantize: bool = False) -> nn.Module:
        """One table with all rows, whose weight a tied head shares."""
        made = super().fold(requantize=requantize)
        self.share(made)
        return made

    def share(self, made: Any) -> None:
        """Give what this table, or its tied head, was folded into the weight of the first of both.

        4-bit modules keep codes of their own.
        """
        first = self.__dict__.setdefault("folded", made)
        if not is_packed(made):
            made.weight = first.weight

    def restore_base(self) -> None:
        """Put the numbers of rows back that the model's parts and configurations had."""
        super().restore_base()
        for number in self.__dict__["numbers"]:
            set_number(number, self.old_rows)
        self.__dict__["numbers"] = []


class LongerHead(_Longer):
    """A linear head with logits for new tokens behind its own: cat(base(x), x new_rows^T).

    The rows are its own, `new_rows` (k, in_features), float32 or better; or, where the head shares
    the table's weight, those of `table`, a LongerTable, with which it goes on and off.  A base with
    a bias gives the new logits the mean of its biases.  `out_features` is n + k.  While it is off
    the new logits are half of the least number, so that the head's probabilities are the base's; a
    difference of two is 0, where that of two -inf would be NaN (guidance in generate, KL).

    Raises:
        TypeError: no module.
        ValueError: no linear layer with a weight of (out, in) that computes x W^T + b, new rows of
            another shape or not finite; a layer on the meta device.

    >>> layer = LongerHead(nn.Linear(4, 10), torch.zeros(2, 4))
    >>> layer(torch.ones(3, 4)).shape, layer.out_features
    (torch.Size([3, 12]), 12)
    """

    counted = "out_features"
    new_rows: nn.Parameter
    table: LongerTable | None

    def __init__(self, base: nn.Module, rows: Tensor | LongerTable) -> None:
        super().__init__(base)
        plain, kind = innermost(self), type(self).__name__
        shape = linear_shape(plain)
        if shape is None or shape.transposed:
            raise ValueError(
                f"{kind}: {type(plain).__name__} is no linear layer with a row for each token"
            )
        if reason := why_not_formula(plain, hooks=False):
            raise ValueError(f"{kind}: {reason}; the new logits would not be its logits")
        self.old_rows = shape.out_features
        # not a submodule: the embedding has it
        self.__dict__["table"] = rows if isinstance(rows, LongerTable) else None
        if isinstance(rows, Tensor):
            self.new_rows = self._rows_of(rows, shape.in_features)
        self.out_features = self.old_rows + len(self.rows())
        self.take_over()

    def rows(self) -> nn.Parameter:
        """The rows that the new logits multiply by: the tied table's, or its own."""
        return self.new_rows if self.table is None else self.table.new_rows

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocabulary"]:
        if self.merged_module is not None and self._enabled:
            made: Tensor = self.call_merged(x)
            return made
        out: Tensor = self._modules["base"](x)
        return self.on_top(out, x, 0.0 if (now := self.strength_now()) is None else now)

    def strength_now(self) -> float | Tensor | None:
        """None while this layer is off, or the table whose rows it takes."""
        mine = Wrapper.strength_now(self)
        its = mine if self.table is None else Wrapper.strength_now(self.table)
        return None if mine is None or its is None else mine * its

    def on_top(self, out: Tensor, x: Tensor, strength: float | Tensor) -> Tensor:
        """The output of the layers below, and the logits of the new tokens behind it."""
        rows = self.rows()
        if isinstance(strength, float) and strength == 0:
            new = out.new_full((*out.shape[:-1], len(rows)), _never(out.dtype))
        else:
            new = F.linear(x.to(out.dtype), rows.to(out.dtype))
            if (bias := self._mean_bias()) is not None:
                new = new + bias.to(new.dtype)
            new = new.to(out.dtype)
        if isinstance(strength, Tensor):  # compiled: 0 is off
            new = torch.where(strength == 0, _never(out.dtype), new)
        return torch.cat([out, new], -1)

    def _mean_bias(self) -> Tensor | None:
        bias = getattr(self.base, "bias", None)
        if bias is None:
            return None
        return bias.mean(dtype=torch.promote_types(bias.dtype, torch.float32))

    @property
    def bias(self) -> Tensor | None:
        """The bias below, and its mean for each new logit."""
        below, mean = super().bias, self._mean_bias()
        if below is None or mean is None or not self.enabled:
            return below
        return torch.cat([below, mean.to(below.dtype).expand(len(self.rows()))])

    def exact_parameters(self) -> dict[str, Tensor]:
        """The weight with the new rows behind it, and the bias with its mean."""
        below = self.parameters_below()
        if Wrapper.strength_now(self) is None or not (self.table is None or self.table.enabled):
            return below
        weight = self.exact_below("weight", torch.float32)
        made = {**below, "weight": torch.cat([weight, self.rows().to(weight.dtype)])}
        if innermost(self)._parameters.get("bias") is not None:
            bias = self.exact_below("bias", torch.float32)
            made["bias"] = torch.cat([bias, bias.mean().expand(len(self.rows()))])
        return made

    def fold_reason(self) -> str | None:
        """Why this head and its table cannot become one weight; None: they can."""
        if self.table is None:
            return None
        with torch.no_grad():
            mine, its = self.exact_parameters(), self.table.exact_parameters()
            same = "weight" not in mine or torch.equal(mine["weight"], its["weight"])
        return None if same else (
            "the head shares the table's weight, and adapters below change one of the two alone "
            "(tied weights); untie them first"
        )  # fmt: skip

    def fold(self, *, requantize: bool = False) -> nn.Module:
        """One head with all rows; where it shared the table's weight, it shares the longer one."""
        made = super().fold(requantize=requantize)
        if self.table is not None:
            self.table.share(made)
        return made
