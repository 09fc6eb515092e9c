"""What transformers asks about the values of a text, answered for a text that has none.

Before attention, models look whether several texts are packed into one row, and whether a mask
hides anything: (numbers == expected).all().  On the meta device there is nothing to look at.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ANSWERS = {torch.Tensor.all: True, torch.all: True, torch.Tensor.any: False, torch.any: False}


class PlainText(TorchFunctionMode):
    """Within this context, texts on the meta device are neither padded nor packed.

    Of a whole tensor of whole numbers or truth values, `all` is true and `any` is false.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = _ANSWERS.get(func)
        if answer is not None and not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            given = args[0]
            if given.is_meta and not given.is_floating_point():
                return torch.tensor(answer)
        return func(*args, **(kwargs or {}))
