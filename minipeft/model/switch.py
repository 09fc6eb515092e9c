"""Several adapters on one model: add one more, choose which are on.

    inject_lora(model, "all-linear", rank=8)             the first one is called "default"
    add_adapter(model, "fr", "all-linear", rank=4)       one more, over the same layers or others
    add_adapter(model, "poet", PrefixEncoder(...))       or a further prefix
    use_adapters(model, "fr")                            only this one; or a list of names
    use_adapters(model, rows=["fr", None, "default"])    one for each row of a batch (rows/bank.py)

Which adapters are on and which are trained are separate things: `requires_grad` stays as it is.
"""

import itertools
from collections.abc import Iterable, Mapping

from torch import nn

from minipeft.adapters.names import adapters_called, check_new_name, give_name, named
from minipeft.adapters.state import named_adapters, refuse_merged, require_adapters
from minipeft.adapters.targets import Head, Names, Target, survey
from minipeft.inject import check_model, restoring
from minipeft.model.inject_lora import plan_lora, wrap_in_lora
from minipeft.model.peft_words import in_our_words
from minipeft.model.rows import Row, refuse_rows, serve_rows, stop_rows
from minipeft.prefix import PrefixEncoder


@in_our_words
def add_adapter(
    model: nn.Module,
    name: str,
    target: Target | PrefixEncoder,
    rank: int | Mapping[str, int] | None = None,
    alpha: float | Mapping[str, float] | None = None,
    *,
    exclude: Target | None = None,
    head: Head = None,
    **lora: object,
) -> Names:
    """One more adapter, called `name`, over layers that may have others; as `inject_lora` else.

    Layers stack: each adds to what those below compute.  The new adapter is on and trainable; the
    others stay as they are, on or off, trainable or not.  Returns the names of the modules.

    A PrefixEncoder in the place of `target` joins the prefixes of a model that has one
    (attach_prefix): of the same shapes, of any length.

    Raises:
        ValueError: the name is taken or none, no rank; otherwise as `inject_lora`.  The model is
            then as it was.
    """
    check_model("add_adapter", model)
    check_new_name("add_adapter", model, name)
    if isinstance(target, PrefixEncoder):
        return _add_prefix(model, name, target)
    if rank is None:
        raise ValueError("add_adapter: expected a rank")
    refuse_rows("add_adapter", model)
    refuse_merged("add_adapter", named_adapters(model))
    plan = plan_lora(survey(model, head), target, rank, alpha, exclude, lora, stack=True)
    with restoring(model):
        names = wrap_in_lora(model, plan, {})
        give_name(model, name, [model.get_submodule(place) for place in names])
    return names


def _add_prefix(model: nn.Module, name: str, encoder: PrefixEncoder) -> Names:
    for place, module in model.named_modules():
        if callable(getattr(type(module), "add_encoder", None)):
            module.add_encoder(name, encoder)
            give_name(model, name, [encoder])
            return Names([f"{place}.encoders.{name}"])
    raise ValueError(
        "add_adapter: the model has no prefix that this could join; attach_prefix first"
    )


def use_adapters(
    model: nn.Module,
    names: str | Iterable[str] | None = None,
    *,
    rows: Iterable[Row] | None = None,
) -> list[str]:
    """Switch these adapters on and all others off; or let each row of a batch use its own.

    An adapter that was never given a name is "default".  Does not touch `requires_grad`; in a
    compiled training step one that is off gets gradients of zero instead of none, so leave it out
    of the optimiser or freeze it, if weight decay must not move it.  `rows`
    has an entry for each row of the batches to come: a name, None for no adapter, or a list of
    names that add up; it is for inference, and holds until `names` are given.  Called again with
    as many rows it compiles nothing again, and takes over what was trained since.  Returns the
    names of the modules that are on.

    Raises:
        ValueError: no such adapter, a merged model, neither or both of names and rows; for rows an
            adapter with layers in which they cannot be told apart (experts, nn.MultiheadAttention,
            tables of positions).  Nothing has changed then.
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
    stop_rows(model)
    for name, places in named(model).items():
        for adapter in itertools.chain.from_iterable(places.values()):
            adapter.enabled = name in chosen
    return list(dict.fromkeys(place for places in chosen.values() for place in places))
