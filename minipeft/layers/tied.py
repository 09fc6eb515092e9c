"""The head that shares its weight with an embedding follows the embedding's adapter.

The table and the head are one weight E (tokens, dim).  With factors on the embedding both become
E + scaling * (B A)^T, so the head multiplies by A^T and B^T of the same two parameters: what is
trained on one side is trained on the other, and they stay tied.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.adapters.protocol import innermost
from minipeft.adapters.wrapper import Wrapper
from minipeft.layers.embeddings import LoRAEmbedding
from minipeft.lora import add_lora


class LoRATiedLinear(Wrapper):
    """A linear head over the weight of an embedding that has LoRA: base(x) + scaling * A^T B^T x.

    Owns no parameter: they are those of `embedding`, whose `enabled` and `scale` it follows.

    Raises:
        ValueError: the head's weight is not the embedding's, or the embedding has DoRA, whose
            table is no sum.
    """

    embedding: LoRAEmbedding

    def __init__(self, base: nn.Module, embedding: LoRAEmbedding) -> None:
        super().__init__(base)
        if hasattr(embedding, "magnitude"):
            raise ValueError(
                "LoRATiedLinear: the table of a DoRAEmbedding is no sum that a head could follow; "
                "use LoRAEmbedding"
            )
        plain, table = innermost(base), innermost(embedding)
        if plain._parameters.get("weight") is None or (
            plain._parameters["weight"] is not table._parameters.get("weight")
        ):
            raise ValueError(
                f"LoRATiedLinear: the weight of {type(plain).__name__} is not the embedding's; "
                "wrap an untied head in LoRALinear"
            )
        self.__dict__["embedding"] = embedding  # not a submodule: the model has it elsewhere
        self.take_over()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, dim) and B (tokens, rank) of the head: the embedding's, transposed."""
        a, b = self.embedding.factors()
        return b.T, a.T

    def strength_now(self) -> float | Tensor | None:
        """The embedding's, while this layer is on too."""
        its = self.embedding.strength_now()
        if isinstance(its, Tensor):
            return its * (self.strength != 0).to(torch.float32)
        return its if self._enabled else None

    def on_top(
        self, out: Float[Tensor, "*batch tokens"], x: Tensor, strength: float | Tensor
    ) -> Tensor:
        """The output of the layers below, and the branch."""
        return add_lora(out, x, *self.factors(), strength)

    @property
    def full_strength(self) -> float:
        """The embedding's."""
        return self.embedding.full_strength

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """None of its own."""
        return {}

    def exact_parameters(self) -> dict[str, Tensor]:
        """The weight of the layers below plus the embedding's delta."""
        below = self.parameters_below()
        if not (self.enabled and self.embedding.enabled):
            return below
        delta = self.embedding.delta_as_stored()
        return {**below, "weight": self.exact_below("weight", delta.dtype) + delta}

    def extra_repr(self) -> str:
        return f"tied, rank={self.embedding.rank}"


def tied_heads(
    model: nn.Module, embeddings: Iterable[LoRAEmbedding]
) -> dict[str, tuple[nn.Module, LoRAEmbedding]]:
    """Linear layers whose weight is that of one of these embeddings, by name, and the embedding."""
    tables = {id(innermost(e)._parameters.get("weight")): e for e in embeddings}
    tables.pop(id(None), None)
    inside = {id(part) for module in model.modules() if isinstance(module, Wrapper)
              for part in module.children()}  # fmt: skip
    return {
        name: (module, tables[id(innermost(module)._parameters.get("weight"))])
        for name, module in model.named_modules(remove_duplicate=False)
        if id(innermost(module)._parameters.get("weight")) in tables
        and isinstance(innermost(module), nn.Linear) and id(module) not in inside
    }  # fmt: skip
