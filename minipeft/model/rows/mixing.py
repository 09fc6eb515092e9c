"""What in a model lets rows of a batch act on each other while it trains.

Adapters that train side by side then see each other's rows, and do not learn what they would learn
alone.  Found are normalisations by statistics of the batch, which are tried, and a router's balance
loss over all tokens, which transformers' configurations name.  Nothing finds what a forward of
one's own does with the batch's axis, or experts that drop tokens beyond a capacity.
"""

import copy
import warnings
from typing import Any

import torch
from torch import nn

from minipeft.adapters.protocol import is_adapter


def what_mixes(model: nn.Module) -> str:
    """The first thing that mixes rows in training, with what to do about it; "" for none."""
    own = {id(part) for adapter in model.modules() if is_adapter(adapter)
           for child in _parts(adapter) for part in child.modules()}  # fmt: skip
    for name, module in model.named_modules():
        config: Any = vars(module).get("config")
        if getattr(config, "output_router_logits", None) is True:
            return (
                f"{name or 'the model'}'s config.output_router_logits asks for a balance loss over "
                "all rows, so that each adapter would train on the rows of others; set it to False "
                "and call use_adapters again (add a balance loss for each adapter's own rows)"
            )
        if id(module) not in own and "running_mean" in module._buffers and _mixes(module):
            return (
                f"{name!r} ({type(module).__name__}) takes statistics over all rows of the batch, "
                "so that adapters which train side by side would act on each other; freeze it, if "
                "it keeps running statistics, or train the adapters one after the other"
            )
    return ""


def _parts(adapter: Any) -> list[nn.Module]:
    """The modules that an adapter has beside its base: they get the rows of that adapter alone."""
    return [child for name, child in adapter.named_children() if name != "base"]


def _mixes(module: nn.Module) -> bool:
    """Whether a row of its output changes with another row of its input, while it trains."""
    channels = getattr(module, "num_features", None)
    if not isinstance(channels, int):
        return False
    twin = copy.deepcopy(module).train()  # one whose statistics stand still stays in eval mode
    for axes in range(4):
        x = torch.ones(2, channels, *(2,) * axes)
        x[1] = 3.0
        other = x.clone()
        other[1] = 5.0
        first = next((t for t in (*twin.parameters(), *twin.buffers())), x)
        dtype = first.dtype if first.is_floating_point() else x.dtype
        x, other = (t.to(first.device, dtype) for t in (x, other))
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a batch that is too small, say
                return not torch.equal(twin(x)[0], twin(other)[0])
        except (ValueError, RuntimeError, TypeError, IndexError):  # it takes more axes
            continue
    return False
