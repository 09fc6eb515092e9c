"""What transformers asks about the values of a text, answered for a text that has none.

Before attention, models look whether several texts are packed into one row, and whether a mask
hides anything: (numbers == expected).all(), or mask.sum() == mask.numel().  On the meta device
there is nothing to look at.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ANSWERS = {torch.Tensor.all: True, torch.all: True, torch.Tensor.any: False, torch.any: False}
_SUM = (torch.Tensor.sum, torch.sum)
_EQUAL = (torch.Tensor.__eq__, torch.Tensor.eq, torch.eq)
_COUNTED = "_minipeft_counted"  # on a sum of truth values: how many they are, and whether all hold


class PlainText(TorchFunctionMode):
    """Within this context, texts on the meta device are not packed, and padded only if told so.

    Of a whole tensor of whole numbers or truth values, `all` is true and `any` is false.  With
    `padded` it is the other way about for tensors with the axes of a mask, (texts, tokens): some
    tokens are padding and some are not.  A sum of truth values equals their number where `all` is
    true.
    """

    def __init__(self, *, padded: bool = False) -> None:
        super().__init__()
        self.padded = padded

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = args[0] if args else None
        if kwargs or not isinstance(given, Tensor) or not given.is_meta:
            return func(*args, **(kwargs or {}))
        mixed = self.padded and given.dim() == 2
        if len(args) == 1 and not given.is_floating_point():
            if (answer := _ANSWERS.get(func)) is not None:
                return torch.tensor(answer != mixed)
            if func in _SUM and given.dtype == torch.bool:
                count = func(given)
                setattr(count, _COUNTED, (given.numel(), not mixed))
                return count
        if func in _EQUAL and (counted := getattr(given, _COUNTED, None)) is not None:
            number, holds = counted
            if args[1] == number:
                return torch.tensor(holds)
        return func(*args)
