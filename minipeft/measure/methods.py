"""The methods that are compared: a name, what it is, and how it prepares a model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from minipeft.adapters.state import disable_adapters, named_adapters
from minipeft.model.inject_lora import inject_lora
from minipeft.model.quantize import inject_qlora


class Unsupported(Exception):
    """A method cannot be used here, and says why: a package is missing, or the model has no place.

    minipeft's own ValueError, TypeError and NotImplementedError count as that too; a method of
    yours or of another library raises this, or is shown as failed.
    """


@dataclass(frozen=True)
class Prepared:
    """A model ready to train, and a context within which its adapters are off."""

    model: Any
    adapters_off: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Method:
    """How one method prepares a model: `prepare(model, settings)`.

    `settings` has what `benchmark` was given: target, head, rank, alpha, prefix_length.  `peer` is
    the method of another library that does the same work, which `is_peer` there.  `starts_at_base`
    says that the prepared, untrained model computes what the base does, in every bit: LoRA does,
    since its B is zero, and a prefix does not.  The gate compares the two losses, and a method gets
    no figures where it says the wrong thing.  `imports` come before memory is measured.
    """

    title: str
    prepare: Callable[[Any, dict[str, Any]], Prepared]
    learning_rate: float = 5e-4
    starts_at_base: bool = True
    peer: str | None = None
    is_peer: bool = False
    imports: Sequence[str] = field(default_factory=tuple)


def _full(model: nn.Module, settings: dict[str, Any]) -> Prepared:
    return Prepared(model.requires_grad_(True))


def _lora(
    model: nn.Module, settings: dict[str, Any], *, inject: Callable[..., object] = inject_lora,
    **options: Any,
) -> Prepared:  # fmt: skip
    inject(
        model, settings["target"], settings["rank"], settings["alpha"],
        head=settings.get("head"), **options,
    )  # fmt: skip
    return Prepared(model, partial(disable_adapters, model))


def _ptuning(model: nn.Module, settings: dict[str, Any]) -> Prepared:
    from minipeft.integrations.transformers import attach_prefix

    attach_prefix(model, settings["prefix_length"])
    return Prepared(model, partial(disable_adapters, model))


METHODS: Mapping[str, Method] = {
    "full": Method("full fine-tuning", _full, 5e-5),
    "lora": Method("LoRA", _lora),
    "dora": Method("DoRA", partial(_lora, dora=True)),
    "qlora": Method("QLoRA", partial(_lora, inject=inject_qlora)),
    "ptuning": Method(
        "P-tuning v2", _ptuning, 1e-2, starts_at_base=False,
        imports=["minipeft.integrations.transformers"],
    ),
}  # fmt: skip


def prepared_by(function: Callable[[Any], Any], model: Any, settings: dict[str, Any]) -> Prepared:
    """What a function of the caller's makes of a model, in place or as a new one."""
    made = function(model)
    if isinstance(made, Prepared):
        return made
    model = made if isinstance(made, nn.Module) else model
    return Prepared(
        model, partial(disable_adapters, model) if named_adapters(model) else nullcontext
    )


def chosen(methods: Sequence[str] | Mapping[str, Any]) -> dict[str, Method]:
    """Methods by name: ours by their names, others as functions `model -> None or model`.

    Raises:
        TypeError: `methods` is neither a mapping nor a list of names.
        ValueError: none, a name that is not here, or something that is neither.
    """
    if not isinstance(methods, Mapping | Sequence):
        raise TypeError(
            f"benchmark: methods is a {type(methods).__name__}; expected a list of names, of "
            f"{list(METHODS)}, or a mapping from names to functions"
        )
    named = dict.fromkeys(methods) if not isinstance(methods, Mapping) else dict(methods)
    if isinstance(methods, str) or not named:
        raise ValueError(f"benchmark: methods={methods!r}; a list of names, of {list(METHODS)}")
    found: dict[str, Method] = {}
    for name, given in named.items():
        if isinstance(given, Method):
            found[name] = given
        elif callable(given):
            found[name] = Method(name, partial(prepared_by, given))
        elif given is None and name in METHODS:
            found[name] = METHODS[name]
        else:
            raise ValueError(
                f"benchmark: no method {name!r}; one of {list(METHODS)}, or "
                "methods={'mine': function}, where the function gets the model"
            )
    return found
