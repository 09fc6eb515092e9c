"""The 3-D weight of a mixture of experts in NF4: one expert's codes are decoded at a time.

    experts = NF4Experts.from_weight(weight)     weight (experts, out_features, in_features)
    y = experts(x, expert)                       x (tokens, in_features), expert (tokens,)
    experts[3]                                   the dense weight of expert 3

`experts[i]` is what models index that multiply by one expert after the other, so an NF4Experts can
stand where the 3-D parameter stood.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minipeft import ops
from minipeft.fast import products
from minipeft.fast.nf4 import absmax_of_blocks
from minipeft.qlora import Packed, PackedModule, decode, encoded, frozen


def _expert_state(number: int, n_experts: int, state: Packed) -> Packed:
    """Codes and float32 scales of one expert."""
    count, device = state.absmax.numel() // n_experts, state.absmax.device
    blocks = torch.arange(number * count, (number + 1) * count, device=device)
    scales = absmax_of_blocks(state.absmax, state.scale, state.offset, blocks)
    return Packed(state.packed.view(n_experts, -1)[number], scales, codebook=state.codebook)


def _experts_shape(given: Any) -> Any:
    columns = given.shape[2] if given.transposed else given.shape[1]
    return given.x.new_empty((given.x.shape[0], columns))


def _gradient_of_x(grad: Tensor, given: Any) -> Tensor:
    """y[t] = W[expert[t]] x[t]: its gradient is the same operator with the transposed weights."""
    return ops.call(
        "nf4_experts", grad, given.expert, given.packed, given.absmax, given.scale, given.offset,
        given.shape, not given.transposed, given.block_size, given.codebook,
    )  # fmt: skip


@ops.operator(
    "nf4_experts",
    "(Tensor x, Tensor expert, Tensor packed, Tensor absmax, Tensor? scale, Tensor? offset, "
    "SymInt[] shape, bool transposed, int block_size, Tensor? codebook=None) -> Tensor",
    shapes=_experts_shape,
    gradients={"x": _gradient_of_x},
    row_arguments=2,
)
def _experts(
    x: Tensor,
    expert: Tensor,
    packed: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    transposed: bool,
    block_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    n_experts, *matrix = shape
    state = Packed(packed, absmax, scale, offset, codebook)
    order = expert.argsort(stable=True)  # rows of one expert together: one product for each
    numbers, counts = torch.unique_consecutive(expert[order], return_counts=True)
    rows, first = x[order], 0
    out = x.new_empty(x.shape[0], matrix[1] if transposed else matrix[0])
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        if not 0 <= number < n_experts:
            raise IndexError(f"NF4Experts: expert {number} of {n_experts}")
        weight = decode(_expert_state(number, n_experts, state), matrix, block_size, x.dtype)
        part = rows[first : first + count]
        out[order[first : first + count]] = products.matmul(
            part, weight if transposed else weight.T
        )
        first += count
    return out


class NF4Experts(PackedModule):
    """Weights (n_experts, out_features, in_features) of a mixture of experts, frozen, in NF4.

    `forward(x, expert)` multiplies each row of x by the weight of its expert.  Nothing dense is
    kept for backward: the codes of the experts that were asked for are decoded again.
    """

    def __init__(
        self,
        n_experts: int,
        out_features: int,
        in_features: int,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if (out_features * in_features) % block_size:
            raise ValueError(
                f"NF4Experts: an expert of {out_features} x {in_features} weights is no whole "
                f"number of blocks of {block_size}; choose a smaller block_size"
            )
        super().__init__(
            (n_experts, out_features, in_features), block_size=block_size,
            double_quant=double_quant, dtype=dtype, device=device,
        )  # fmt: skip
        self.n_experts, self.compute_dtype = n_experts, compute_dtype

    @classmethod
    @torch.inference_mode(False)
    def from_weight(
        cls,
        weight: Float[Tensor, "n_experts out_features in_features"],
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> "NF4Experts":
        """The experts of a 3-D weight, rounded to NF4.

        Raises:
            ValueError: an expert is no whole number of blocks, or weights that cannot be
                quantised.
        """
        n_experts, out_features, in_features = weight.shape
        layer = cls(
            n_experts, out_features, in_features, block_size=block_size,
            double_quant=double_quant, compute_dtype=compute_dtype, dtype=weight.dtype,
            device="meta",
        )  # fmt: skip
        layer.fill(encoded(weight, block_size, double_quant))
        return layer

    def __getitem__(
        self, expert: int | Int[Tensor, ""]
    ) -> Float[Tensor, "out_features in_features"]:
        number = int(expert)
        if not -self.n_experts <= number < self.n_experts:
            raise IndexError(f"NF4Experts: expert {number} of {self.n_experts}")
        state = _expert_state(number % self.n_experts, self.n_experts, self.state())
        return decode(state, list(self.shape[1:]), self.block_size, self.weight_dtype)

    def __len__(self) -> int:
        return self.n_experts

    def forward(
        self, x: Float[Tensor, "tokens in_features"], expert: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens out_features"]:
        in_features = self.shape[2]
        if x.dim() != 2 or x.shape[-1] != in_features or expert.shape != x.shape[:1]:
            raise ValueError(
                f"NF4Experts: x {tuple(x.shape)} and expert {tuple(expert.shape)}; expected "
                f"(tokens, {in_features}) and (tokens,)"
            )
        dtype = ops.product_dtype(x)
        compute_dtype = self.compute_dtype or dtype
        *codes, codebook = self.state()
        out = ops.call(
            "nf4_experts", x.to(compute_dtype), expert, *codes, list(self.shape), False,
            self.block_size, codebook,
        )  # fmt: skip
        return out.to(dtype)

    def requantized(self, weight: Tensor) -> "NF4Experts":
        """A layer of the same settings with the codes of another 3-D weight."""
        layer = self.from_weight(
            weight.float(), block_size=self.block_size, double_quant=self.double_quant,
            compute_dtype=self.compute_dtype,
        )  # fmt: skip
        layer.weight_dtype = self.weight_dtype
        return layer.train(self.training)

    def dense(self, weight: Tensor | None = None) -> nn.Parameter:
        """The 3-D parameter that this layer stands for, or another one; frozen."""
        values: Tensor = self.dequantize() if weight is None else weight
        return frozen(values)
