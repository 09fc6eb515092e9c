"""What prefixes and prompts have in common: on or off, and all parameters are the adapter's."""

from torch import nn


class OnOff(nn.Module):
    """An adapter without a base: `enabled` or not, and no product that could be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    @property
    def scale(self) -> float:
        """1.0, always."""
        return 1.0

    @scale.setter
    def scale(self, factor: float) -> None:
        if factor != 1.0:
            raise ValueError(
                f"{type(self).__name__}: cannot be scaled by {factor}; it is on or off (see "
                "disable_adapters)"
            )

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """All its parameters."""
        return dict(self.named_parameters())
