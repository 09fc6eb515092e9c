"""A model's adapters as they are written: whole, and by one process.

Parameters may have their values elsewhere: in other processes (shards of fully_shard), or with the
caller, who gathered them.  `whole` puts the values in their places for the time of a save, so that
what describes an adapter (a PEFT file, a prefix with its network) needs to know nothing of it.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from minipeft.adapters.protocol import innermost
from minipeft.adapters.sharded import agreed, gathered_all, is_first, is_shard, resharded
from minipeft.adapters.state import named_adapters
from minipeft.layers.trained import TrainedBias
from minipeft.model.trained_state import trained_state

TASK_HEADS = ("classifier", "score", "qa_outputs")  # PEFT's files of prompts hold them untrained


@contextmanager
def whole(caller: str, model: Any, state_dict: Mapping[str, Tensor] | None) -> Iterator[bool]:
    """Within this context all that an adapter's file holds is whole.

    Gives whether this process writes.  Of shards that is one: the process of the lowest rank among
    those that share the model.  Every process must enter the context, the others wait at its end
    for the one that writes, and an error of one is raised in all.  `state_dict` has values by the
    names of the model's parameters: nothing is gathered then, no process waits for another, and
    whoever called writes.

    Raises:
        ValueError: `state_dict` lacks a shard that is to be written.
    """
    if state_dict is not None:
        own = dict(model.named_parameters(remove_duplicate=False))
        needed = {id(parameter) for parameter in _written(model)}
        beside = {id(own[name]) for name in trained_state(model) if name in own}
        values = {id(own[key]): value for key, value in state_dict.items()
                  if key in own and id(own[key]) in (needed | beside)}  # fmt: skip
        for name, parameter in own.items():
            if is_shard(parameter) and id(parameter) in needed - values.keys():
                raise ValueError(
                    f"{caller}: {name} is a shard (DTensor), and state_dict lacks it; leave "
                    "state_dict out and call this in every process: the values are gathered then"
                )
        with _in_place(model, values):
            yield True
        return
    meshes = resharded(model)
    if meshes is None:
        yield True
        return
    first = is_first(meshes)
    with ExitStack() as stack:
        with agreed(caller, meshes):  # nobody writes before all have come so far
            names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
            shards = {names[id(p)]: p for p in _written(model) if is_shard(p)}
            found = gathered_all(caller, meshes, shards)
            values = {id(shards[name]): value for name, value in found.items()}
            stack.enter_context(_in_place(model, values))
        with agreed(caller, meshes):
            yield first


def _written(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a file's tensors come from, in the same order in every process."""
    found: dict[int, nn.Parameter] = {}
    for adapter in named_adapters(model).values():
        own = [*adapter.adapter_parameters().values()]
        if isinstance(adapter, TrainedBias):  # a file has the sum of the bias and its change
            own += [p for p in [innermost(adapter)._parameters.get("bias")] if p is not None]
        found |= {id(parameter): parameter for parameter in own}
    for name, child in model.named_children():
        if name.endswith(TASK_HEADS):
            found |= {id(parameter): parameter for parameter in child.parameters()}
    return list(found.values())


@contextmanager
def _in_place(model: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """Within this context parameters have these values, by the ids of the parameters."""
    before = [
        (module, name, own)
        for module in model.modules()
        for name, own in module._parameters.items()
        if own is not None and id(own) in values
    ]
    made: dict[int, nn.Parameter] = {}  # one that two modules share stays one
    for _, _, own in before:
        value = values[id(own)].detach()
        value = value if own.is_meta else value.to(own.device)
        trains = own.requires_grad and value.is_floating_point()
        made[id(own)] = nn.Parameter(value, requires_grad=trains)
    try:
        for module, name, own in before:
            module._parameters[name] = made[id(own)]
        yield
    finally:
        for module, name, own in before:
            module._parameters[name] = own
