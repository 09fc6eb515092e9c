"""Adapters that are on or off: what they compute cannot be added in part."""

from torch import nn


class Unscaled:
    """The `scale` of such an adapter: 1.0, always."""

    @property
    def scale(self) -> float:
        """1.0: there is no product to scale."""
        return 1.0

    @scale.setter
    def scale(self, factor: float) -> None:
        if factor != 1.0:
            raise ValueError(
                f"{type(self).__name__}: cannot be scaled by {factor}; it is on or off (see "
                "disable_adapters)"
            )


class OnOff(Unscaled, nn.Module):
    """A prefix or a prompt: an adapter without a base, which owns all parameters that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """All its parameters."""
        return dict(self.named_parameters())
