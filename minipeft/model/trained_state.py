"""What training changes in a model, under the names of its own state dict.

`adapter_state_dict` names adapters as a plain model would; this names them as the model's
`load_state_dict` wants them, and has all of them at once: those that are frozen now, statistics
that belong to adapters, and what somebody let train beside them.
"""

from torch import Tensor, nn

from minipeft.adapters.protocol import keeps_statistics
from minipeft.adapters.state import named_adapters


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The entries of `model.state_dict()` that training may have changed, detached, not copied.

    All that adapters own, whether it trains now or not; parameters of the base that train although
    no adapter owns them, and the running statistics of their modules.  A tensor that the model has
    under two names comes under both.

    >>> from minipeft import inject_lora
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> inject_lora(model, ["0"], rank=2)
    ['0']
    >>> sorted(trained_state(model))
    ['0.lora_a', '0.lora_b']
    """
    own: set[int] = set()
    for adapter in named_adapters(model).values():
        own |= {id(parameter) for parameter in adapter.adapter_parameters().values()}
        if buffers := getattr(type(adapter), "adapter_buffers", None):
            own |= {id(buffer) for buffer in buffers(adapter).values()}
    for module in model.modules():
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if trains and keeps_statistics(module):
            own |= {id(buffer) for buffer in module.buffers(recurse=False)}
    return {
        name: value.detach() for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and (id(value) in own or value.requires_grad)
    }  # fmt: skip
