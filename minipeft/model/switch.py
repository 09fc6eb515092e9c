"""Several adapters on one model: choose which are on, give one other values.

    inject_lora(model, "all-linear", rank=8)             the first one is called "default"
    inject_lora(model, "all-linear", rank=4, name="fr")  one more, over the same layers or others
    attach_prefix(model, 8, name="poet")                 or a prefix
    use_adapters(model, "fr")                            only this one; or a list of names
    replace_adapter(model, "fr", other)                  other factors; nothing is compiled again
    use_adapters(model, rows=["fr", None, "default"])    one for each row of a batch (rows/), in
                                                         training too

Which adapters are on and which are trained are separate things: `requires_grad` stays as it is.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT, adapters_called, named
from minipeft.adapters.replicas import check_replicas
from minipeft.adapters.sharded import own_class, refuse_shards
from minipeft.adapters.state import named_adapters, refuse_merged, require_adapters
from minipeft.inject import restoring
from minipeft.lora import LoRALinear
from minipeft.model.peft_words import in_our_words
from minipeft.model.rows import Row, serve_rows, stop_rows

Factors = Mapping[str, tuple[Tensor, Tensor, float]]  # module name: a, b, scaling
_WHOLE_TENSORS = (
    "adapter_state_dict gives whole tensors of shards, and load_adapter_state_dict takes them"
)


@in_our_words
def use_adapters(
    model: nn.Module,
    names: str | Iterable[str] | None = None,
    *,
    rows: Iterable[Row] | None = None,
) -> list[str]:
    """Switch these adapters on and all others off; or let each row of a batch use its own.

    An adapter that was never given a name is "default".  `requires_grad` stays as it is.  In a
    compiled training step an adapter that is off gets gradients of zero instead of none: freeze it
    or leave it out of the optimiser, if weight decay must not move it.

    torch's DistributedDataParallel waits in each step for a gradient of every parameter that
    trained when it was made.  Where some adapters are off, make it with
    `find_unused_parameters=True`: then what is off is not waited for, and other names may be chosen
    between any two steps, the same in every process.  Or freeze what is off before you make it, and
    make it anew to switch.  `fully_shard` needs nothing of that.

    `rows` has an entry for each row of the batches to come: a name, None for no adapter, or a list
    of names that add up.  Rows hold until `names` are given.  Another call with as many rows
    compiles nothing again in inference; a compiled training step compiles once for other rows.
    A batch of a multiple of these rows gives each entry as many rows side by side, as beams stand.
    Returns the names of the modules that are on.

    The batch must be axis 0 of what every adapted layer gets.  That is not checked where sizes fit
    by chance, and rows then use adapters of others.  It is not so in XLNet and
    nn.TransformerEncoderLayer(batch_first=False), nor in Longformer's attention, which have tokens
    first, nor in experts that are plain linear layers and get the tokens chosen for them: leave
    those layers without adapters.

    Rows also train, each its own adapters, as in a run of their own if the loss is a sum of each
    adapter's own mean.  An adapter without a row gets no gradient (None); a prefix that other rows
    use, zeros.  Rows of one adapter side by side are not copied.  After training, `eval()` or
    another call here takes over what was trained.  Strengths are those at the call, and so is
    `config.output_router_logits`, which asks for a balance loss.  In eval mode, after a call with
    gradients, each adapter computes for its own rows until `eval()` or another call here; so
    evaluate under no_grad.  Under checkpointing, a backward whose rows were changed since its
    forward raises RuntimeError.

    Raises:
        ValueError: no such adapter, a merged model, neither or both of names and rows; names that
            leave off what a DistributedDataParallel waits for (if `model` is one); with rows,
            shards, an adapter with layers that cannot tell them apart (experts,
            nn.MultiheadAttention, tables of positions), or in training something that mixes rows
            (statistics of the batch, a router's balance loss).  Nothing has changed then.
    """
    if (names is None) == (rows is None):
        raise ValueError("use_adapters: expected names, or rows=, and not both")
    if rows is not None:
        with restoring(model):
            return serve_rows(model, rows)
    refuse_merged("use_adapters", require_adapters("use_adapters", model))
    wanted = [names] if isinstance(names, str) else list(names or ())
    if not wanted:
        raise ValueError("use_adapters: no name; disable_adapters switches all of them off")
    chosen = {name: adapters_called("use_adapters", model, name) for name in wanted}
    everything = named(model)
    off = {name: places for name, places in everything.items() if name not in chosen}
    check_replicas("use_adapters", model, off)
    stop_rows(model)
    for name, places in everything.items():
        for adapter in itertools.chain.from_iterable(places.values()):
            adapter.enabled = name in chosen
    return list(dict.fromkeys(place for places in chosen.values() for place in places))


def factors_of(model: nn.Module, *, name: str = DEFAULT) -> dict[str, tuple[Tensor, Tensor, float]]:
    """An adapter's a, b and scaling by the names of its modules, for `replace_adapter`.

    Raises:
        ValueError: no such adapter, one with other layers than LoRALinear, or shards.
    """
    found = {}
    layers = _layers("factors_of", model, name)
    refuse_shards("factors_of", model, _WHOLE_TENSORS)
    for place, layer in layers.items():
        a, b = layer.factors()
        found[place] = (a.detach(), b.detach(), layer.scaling * layer.scale)
    return found


def _layers(caller: str, model: nn.Module, name: str) -> dict[str, LoRALinear]:
    layers: dict[str, LoRALinear] = {}
    for place, stack in adapters_called(caller, model, name).items():
        if len(stack) != 1 or own_class(stack[0]) is not LoRALinear:
            kinds = [own_class(layer).__name__ for layer in stack]
            raise ValueError(f"{caller}: {name!r} has {kinds} over {place!r}; expected LoRALinear")
        layers[place] = cast(LoRALinear, stack[0])
    return layers


def replace_adapter(
    model: nn.Module, name: str, other: nn.Module | Factors, *, other_name: str = DEFAULT
) -> list[str]:
    """Let the adapter `name` compute what another one does, in place; returns its modules' names.

    `other` is a model that has the other adapter, as `other_name` (the same architecture, loaded
    from a file for example), or what `factors_of` returns.  A smaller rank is padded with zeros;
    layers that the other adapter lacks add nothing.  The other's scaling goes into B, so that only
    the values of parameters change: optimisers keep their parameters, and a compiled model stays
    compiled.

    Raises:
        ValueError: no such adapter, a layer that `name` lacks, a rank above a layer's, other sizes,
            a merged model, shards.  Nothing has changed then.
    """
    refuse_merged("replace_adapter", named_adapters(model))
    refuse_shards("replace_adapter", model, _WHOLE_TENSORS)
    layers = _layers("replace_adapter", model, name)
    factors = factors_of(other, name=other_name) if isinstance(other, nn.Module) else other
    if unknown := [place for place in factors if place not in layers]:
        raise ValueError(
            f"replace_adapter: {name!r} has no layer over {unknown[:3]} ({len(unknown)})"
        )
    for place, (a, b, _) in factors.items():
        layer, rank = layers[place], len(a)
        expected = ((rank, layer.in_features), (layer.out_features, rank))
        if (tuple(a.shape), tuple(b.shape)) != expected or rank > layer.rank:
            raise ValueError(
                f"replace_adapter: {place} has factors {tuple(a.shape)} and {tuple(b.shape)}; the "
                f"layer takes (r, {layer.in_features}) and ({layer.out_features}, r), r at most "
                f"{layer.rank}"
            )
    if starts := [place for place, layer in layers.items() if layer.lora_a0 is not None]:
        raise ValueError(
            f"replace_adapter: {starts[0]} subtracts its start; give its values to a plain LoRA"
        )
    with torch.no_grad():
        for place, layer in layers.items():
            a, b, scaling = factors.get(place, (layer.lora_a[:0], layer.lora_b[:, :0], 0.0))
            layer.lora_a[: len(a)].copy_(a)
            layer.lora_b[:, : len(a)].copy_(b * (scaling / layer.scaling))
            layer.lora_a[len(a) :].zero_()
            layer.lora_b[:, len(a) :].zero_()
    return list(layers)
