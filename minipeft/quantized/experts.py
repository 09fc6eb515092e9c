"""The 3-D weight of a mixture of experts in NF4: one expert's codes are decoded at a time.

    experts = NF4Experts.from_weight(weight)     weight (experts, out_features, in_features)
    y = experts(x, expert)                       x (tokens, in_features), expert (tokens,)
    experts[3]                                   the dense weight of expert 3

`experts[i]` is what models index that multiply by one expert after the other, so an NF4Experts can
stand where the 3-D parameter stood.
"""

from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minipeft import ops
from minipeft.adapters import products
from minipeft.fast.gathered import EXPERT, check_numbers, one_expert
from minipeft.ops import Packed
from minipeft.qlora import PackedModule, Quantized, Stored, decode, encoded, frozen


def _experts_shape(given: Any) -> Any:
    columns = given.shape[2] if given.transposed else given.shape[1]
    return given.x.new_empty((given.x.shape[0], columns))


def _gradient_of_x(grad: Tensor, given: Any) -> Tensor:
    """y[t] = W[expert[t]] x[t]: its gradient is the same operator with the transposed weights."""
    return ops.call(
        "nf4_experts", grad, given.expert, given.weight, given.shape, not given.transposed
    )


@ops.operator(
    "nf4_experts",
    "(Tensor x, Tensor expert, Packed weight, SymInt[] shape, bool transposed) -> Tensor",
    shapes=_experts_shape,
    gradients={"x": _gradient_of_x},
    row_arguments=2,
)
def experts(
    x: Tensor, expert: Tensor, weight: Packed, shape: list[int], transposed: bool
) -> Tensor:
    """Decode all experts, then multiply each one's rows."""
    check_numbers(EXPERT, expert, shape[0])
    dense = decode(weight, shape, x.dtype)
    dense = dense if transposed else dense.mT
    out = x.new_empty(x.shape[0], dense.shape[-1])
    for number, matrix in enumerate(dense):
        out[expert == number] = x[expert == number] @ matrix
    return out


class NF4Experts(PackedModule):
    """Weights (n_experts, out_features, in_features) of a mixture of experts, frozen, in NF4.

    `forward(x, expert)` multiplies each row of x by the weight of its expert.  Nothing dense is
    kept for backward: the codes of the experts that were asked for are decoded again.

    `turned` says that the model has the weight as (n_experts, in_features, out_features), while
    blocks of codes run along the inputs, as in gpt-oss' files: `shape`, `weight` and `experts[i]`
    are then as the model has them.  Without it a model's weight of either layout is kept as it is.
    """

    def __init__(
        self,
        n_experts: int,
        out_features: int,
        in_features: int,
        *,
        compute_dtype: torch.dtype | None = None,
        turned: bool = False,
        **stored: Unpack[Stored],
    ) -> None:
        super().__init__((n_experts, out_features, in_features), **stored)
        self.coded_shape, self.turned = self.shape, turned  # the codes' own layout
        if (out_features * in_features) % self.block_size:
            raise ValueError(
                f"NF4Experts: an expert of {out_features} x {in_features} weights is no whole "
                f"number of blocks of {self.block_size}; choose a smaller block_size"
            )
        self.n_experts, self.compute_dtype = n_experts, compute_dtype
        if turned:
            self.shape = (n_experts, in_features, out_features)

    @classmethod
    @torch.inference_mode(False)
    def from_weight(
        cls,
        weight: Float[Tensor, "n_experts out_features in_features"],
        *,
        compute_dtype: torch.dtype | None = None,
        **settings: Unpack[Quantized],
    ) -> "NF4Experts":
        """The experts of a 3-D weight, rounded to NF4.

        Raises:
            ValueError: an expert is no whole number of blocks, or weights that cannot be
                quantised.
        """
        n_experts, out_features, in_features = weight.shape
        layer = cls(
            n_experts, out_features, in_features, compute_dtype=compute_dtype,
            dtype=weight.dtype, device="meta", **settings,
        )  # fmt: skip
        layer.fill(encoded(weight, layer.block_size, layer.double_quant))
        return layer

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"compute_dtype": self.compute_dtype}

    def __getitem__(
        self, expert: int | Int[Tensor, ""]
    ) -> Float[Tensor, "out_features in_features"]:
        number = int(expert)
        if not -self.n_experts <= number < self.n_experts:
            raise IndexError(EXPERT.format(number, self.n_experts))
        weight = one_expert(self.state(), number % self.n_experts, self.n_experts)
        dense = decode(weight, self.coded_shape[1:], self.weight_dtype)
        return dense.T.contiguous() if self.turned else dense  # rows as the parameter has them

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "*shape"]:
        """The dense weight as the model has it, in `dtype` or the dtype that it had."""
        dense = decode(self.state(), self.coded_shape, dtype or self.weight_dtype)
        return dense.mT.contiguous() if self.turned else dense

    def __len__(self) -> int:
        return self.n_experts

    def forward(
        self, x: Float[Tensor, "tokens in_features"], expert: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens out_features"]:
        in_features = self.coded_shape[2]
        if x.dim() != 2 or x.shape[-1] != in_features or expert.shape != x.shape[:1]:
            raise ValueError(
                f"NF4Experts: x {tuple(x.shape)} and expert {tuple(expert.shape)}; expected "
                f"(tokens, {in_features}) and (tokens,)"
            )
        dtype = products.product_dtype(x)
        x = x.to(self.compute_dtype or dtype)
        shape = list(self.coded_shape)
        return ops.call("nf4_experts", x, expert, self.state(), shape, False).to(dtype)

    def dense(self, weight: Tensor | None = None) -> nn.Parameter:
        """The 3-D parameter that this layer stands for, or another one; frozen."""
        values: Tensor = self.dequantize() if weight is None else weight
        return frozen(values)
