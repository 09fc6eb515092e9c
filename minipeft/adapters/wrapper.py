"""What adapter layers share: a frozen base, on or off, how strongly, and merging.

An adapter layer wraps one module, its base.  The base may be wrapped itself: adapters stack, each
adding to what the one below computes, and the innermost module is the model's own.

    LoRALinear                  adds B A x
      base: LoRALinear          adds B' A' x
        base: nn.Linear         W x + b, frozen

A subclass says two things; the rest is here:

    on_top(out, x, strength)    what the layer makes of `out`, the output of the layers below for
                                the input `x`, while it is on; `strength` is scaling * scale
    exact_parameters()          what that makes of the innermost module's parameters

`forward` calls `on_top`, and so do batches whose rows use different adapters, whatever `enabled`
says (model/rows/stack.py).  A layer whose rows need numbers of their own returns them from
`lengths()`, a tuple of tensors (channels,); `on_top` then gets them by row after `strength`, with
the axes of `out`.  Such a layer may have `on_top_now(out, x, strength)` besides, for rows that
train: what it makes of `out` with the numbers of this moment, on top of its `base`.  A layer that
has a forward of its own asks `strength_now` how strongly it acts, and `call_merged` computes while
it is merged.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from minipeft.adapters.products import autocast_is_on, without_autocast
from minipeft.adapters.protocol import innermost, is_adapter, is_packed, why_not

# in the __dict__ of a module held in eval mode (model/buffers.py): what it was last told
HELD_MODE = "_minipeft_mode"


def stored_parameter(caller: str, module: nn.Module, name: str) -> Tensor:
    """A parameter of a plain module, as it is; of a packed layer the decoded weight, in float32.

    Raises:
        ValueError: the module has none of its own under this name: it computes it.
    """
    path, _, own = name.rpartition(".")
    holder = module.get_submodule(path)
    if own == "weight" and is_packed(holder):
        wide = getattr(holder, "weight_dtype", torch.float32) == torch.float64
        weight = holder.dequantize(torch.float64 if wide else torch.float32)
        return weight.T if getattr(holder, "transposed", False) else weight  # codes are (out, in)
    value = holder._parameters.get(own)
    if value is None:
        raise ValueError(
            f"{caller}: {type(module).__name__} computes its {name} (weight norm, a "
            "parametrisation); take that off first, with torch.nn.utils.parametrize."
            "remove_parametrizations or torch.nn.utils.remove_weight_norm"
        )
    return value


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """The dicts that hold a module's hooks, but those of its state dict, by their names."""
    ends = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
    return {n: h for n, h in vars(module).items() if n.endswith(ends) and "state_dict" not in n}


def take_hooks(layer: nn.Module, module: nn.Module) -> None:
    """Let the layer run the module's hooks; their handles still remove them."""
    vars(layer).update(hooks_of(module))


class Wrapper(nn.Module):
    """A module with an adapter: what it computes without is its `base`.

    `enabled` False computes as the base does; `scale` multiplies what the adapter adds, on top of
    `scaling`, which belongs to the adapter.  Their product is also a tensor, `strength`: that is
    what a compiled forward reads, so that switching and scaling compile nothing again.

    Attributes that the wrapper lacks are the innermost module's; `weight` and `bias` are the
    effective ones.
    """

    folds_into_base = True  # False: `fold` writes nothing to the innermost module
    nameless = False  # True: it belongs to no adapter (names.py)
    base: nn.Module
    _modules: dict[str, Any]  # a forward reads its base here: `self.base` takes a call more
    strength: Tensor  # scaling * scale, or 0 while not enabled; float32, without a dimension
    merged_module: nn.Module | None

    def __init__(self, base: nn.Module, *, scaling: float = 1.0) -> None:
        if not isinstance(base, nn.Module):
            raise TypeError(
                f"{type(self).__name__}: expected a module as base, got {type(base).__name__}"
            )
        super().__init__()
        self.scaling, self._scale, self._enabled = scaling, 1.0, True
        self.base = base
        # not among the submodules: it is in no state dict
        self.__dict__["merged_module"] = None
        with torch.inference_mode(False):  # its tensors could not be changed outside
            # not a buffer: casting the model must not round it, nor the meta device lose it
            self.strength = torch.tensor(scaling, dtype=torch.float32, device="cpu")

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The base's output, and what `on_top` makes of it while the layer is on."""
        if self.merged_module is not None and self._enabled:
            return self.call_merged(x, *args, **kwargs)
        out, strength = self._modules["base"](x, *args, **kwargs), self.strength_now()
        return out if strength is None else cast(Any, self).on_top(out, x, strength)

    def take_over(self) -> None:
        """The last line of a constructor: freeze the innermost module, take over its mode."""
        innermost(self).requires_grad_(False)
        self.train(vars(self.base).get(HELD_MODE, self.base.training))

    @property
    def enabled(self) -> bool:
        """Whether the adapter takes part."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        self._set_strength()

    @property
    def scale(self) -> float:
        """Multiplies what the adapter adds; 1.0 is as trained."""
        return self._scale

    @scale.setter
    def scale(self, factor: float) -> None:
        self._scale = factor
        self._set_strength()

    @property
    def full_strength(self) -> float:
        """scaling * scale, on or off."""
        return self.scaling * self._scale

    def strength_now(self) -> float | Tensor | None:
        """How strongly this call adds the adapter: scaling * scale, or None while it is off.

        Compiled code gets the tensor, on or off: its value may change, and nothing compiles again.
        """
        if torch.compiler.is_compiling():
            return self.strength
        return self.scaling * self._scale if self._enabled else None

    def _set_strength(self) -> None:
        self.strength.fill_(self.full_strength if self._enabled else 0.0)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this adapter owns: all but the base's."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    def exact_parameters(self) -> dict[str, Tensor]:
        """What the innermost module's parameters are with the adapters: those that change.

        In float32 or better, not rounded yet; differentiable.  Adapters below are included, and
        those that are off are not.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    def parameters_below(self) -> dict[str, Tensor]:
        """`exact_parameters` of the base, if that is wrapped too.

        Raises:
            ValueError: the base is an adapter that cannot be merged.
        """
        if not is_adapter(self.base):
            return {}
        exact = getattr(self.base, "exact_parameters", None)
        if exact is None:
            raise ValueError(f"{type(self.base).__name__} below cannot be merged")
        return exact()

    def exact_below(self, name: str, dtype: torch.dtype) -> Tensor:
        """One parameter as the base computes with it, in `dtype` or better."""
        value = self.parameters_below().get(name)
        if value is None:
            value = stored_parameter(type(self).__name__, innermost(self), name)
        return value.to(torch.promote_types(value.dtype, dtype))

    def effective_parameters(self) -> dict[str, Tensor]:
        """`exact_parameters`, each rounded once to the dtype of the innermost module's."""
        plain, found = innermost(self), {}
        if next(plain.parameters(), None) is None:  # statistics alone
            return {}
        with without_autocast(next(plain.parameters()).device):  # float32 means float32
            exact = self.exact_parameters()
        for name, value in exact.items():
            holder = plain.get_submodule(name.rpartition(".")[0])
            if is_packed(holder):
                dtype = cast(torch.dtype, getattr(holder, "weight_dtype", torch.float32))
            else:
                dtype = stored_parameter(type(self).__name__, plain, name).dtype
            found[name] = value.to(dtype)
        return found

    def _effective(self, name: str) -> Any:
        if self.merged_module is not None and self._enabled:
            return getattr(self.merged_module, name)
        stored = innermost(self)._parameters.get(name)
        if stored is not None and not stored.is_floating_point():
            return stored  # somebody's codes: models look at the dtype
        value = self.effective_parameters().get(name) if self._anything_on() else None
        return getattr(innermost(self), name) if value is None else value

    def _anything_on(self) -> bool:
        return self._enabled or (isinstance(self.base, Wrapper) and self.base._anything_on())

    @property
    def weight(self) -> Tensor:
        """The weight that forward multiplies by, in the base's layout; computed on read."""
        return self._effective("weight")

    @property
    def bias(self) -> Tensor | None:
        """The effective bias."""
        return getattr(self.base, "bias", None)

    def merge(self) -> None:
        """Compute with a plain module that has the effective parameters, beside the base.

        Adapters below take part; the base is not changed, and no state dict knows of it.  Written
        over W the sum could not be undone: in 16 bits (W + delta) - delta is not W again, since
        W + delta was rounded.

        Raises:
            ValueError: a merged weight is not finite, or the base is not proved to compute the
                formula of its kind; nothing has changed then.
        """
        merged = self.merged()
        for name, value in merged.named_parameters():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(
                    f"{type(self).__name__}.merge: the merged {name} holds NaN or Inf; look for a "
                    f"diverged adapter, or a sum beyond the range of {value.dtype}"
                )
        self.__dict__["merged_module"] = merged

    def unmerge(self) -> None:
        """Drop the merged module; the base was never changed."""
        self.__dict__["merged_module"] = None

    def call_merged(self, *args: Any, **kwargs: Any) -> Any:
        """What the merged module computes; raises RuntimeError while training.

        A packed layer takes every floating-point dtype and gives it back, so this does too.
        """
        self.refuse_training()
        merged = self.merged_module
        assert merged is not None
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is not None and x.is_floating_point() and is_packed(innermost(self)):
            named = dict(merged.named_parameters())
            other = any(p.dtype != x.dtype for p in named.values())
            if other and (x.dtype == torch.float64 or not autocast_is_on(x.device)):
                cast_to = {name: p.to(x.dtype) for name, p in named.items()}
                return torch.func.functional_call(merged, cast_to, args, kwargs)
        return merged(*args, **kwargs)

    def refuse_training(self) -> None:
        """Raise RuntimeError if a call now would train: what is merged has no gradient to give."""
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: training while merged would give the adapter no gradient; "
                "call minipeft.unmerge(model) first, or model.eval() to run it merged"
            )

    def why_not_foldable(self) -> str | None:
        """Why the innermost module cannot take this layer into its parameters; None: it can.

        It must compute the formula of its kind, which is tried (linearity.py).
        """
        return why_not("fold", innermost(self)) if self.folds_into_base else None

    def _check_foldable(self, caller: str) -> None:
        if reason := self.why_not_foldable():
            raise ValueError(
                f"{type(self).__name__}.{caller}: {reason}; leave it unmerged (it runs), or take "
                "it off with minipeft.remove(model)"
            )

    def merged(self, *, requantize: bool = False) -> nn.Module:
        """A plain module with the effective parameters: of the innermost module's own class.

        Of a packed one, the dense class; `requantize` keeps it packed, at the price of rounding to
        4 bits again.  Parameters that no adapter changes are shared.

        Raises:
            ValueError: requantize on a base that is not packed, or a base that is not proved to
                compute the formula of its kind.
        """
        with torch.inference_mode(False), torch.no_grad():
            values = self.effective_parameters()
        plain = innermost(self)
        if values or is_packed(plain):
            self._check_foldable("merged")
        if is_packed(plain):
            weight = values.pop("weight", None)
            if weight is None:
                weight = plain.dequantize()
            made = plain.requantized(weight) if requantize else plain.dense(weight)
            take_hooks(cast(nn.Module, made), plain)  # type: ignore[arg-type]
            plain = cast(nn.Module, made)
        elif requantize:
            raise ValueError(
                f"{type(self).__name__}.merged: {type(plain).__name__} has no codes to renew"
            )
        # deepcopy finds tensors in its memo, so no old one is copied
        memo: dict[int, Any] = {id(t): t for t in (*plain.parameters(), *plain.buffers())}
        for part in plain.modules():  # a hook may be a method of something that holds the model
            memo |= {id(hook): hook for own in hooks_of(part).values() for hook in own.values()}
        for name, value in values.items():
            memo[id(plain.get_parameter(name))] = nn.Parameter(value, requires_grad=False)
        return copy.deepcopy(plain, memo).requires_grad_(False).train(self.training)

    def fold(self, *, requantize: bool = False) -> nn.Module:
        """`merged`, but a dense innermost module gets the effective parameters itself."""
        plain = innermost(self)
        if is_packed(plain) or requantize:
            return self.merged(requantize=requantize)
        with torch.no_grad():
            values = self.effective_parameters()
            if values:
                self._check_foldable("fold")
            for name, value in values.items():
                try:
                    plain.get_parameter(name).copy_(value)
                except RuntimeError:  # an expanded or inference tensor takes no values
                    path, _, own = name.rpartition(".")
                    holder = plain.get_submodule(path)
                    holder._parameters[own] = nn.Parameter(value, requires_grad=False)
        return plain

    def restore_base(self) -> None:
        """Undo what an initialisation did to the base: put back the codes from before LoftQ."""
        before = self.__dict__.pop("codes_before", None)
        if before is not None:
            plain: Any = innermost(self)
            device = next(plain.parameters()).device
            plain.fill({name: value.to(device) for name, value in before.items()})

    def train(self, mode: bool = True) -> "Wrapper":
        """Set the mode, of the merged module too."""
        super().train(mode)
        if self.merged_module is not None:
            self.merged_module.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Wrapper":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.merged_module is not None:
            self.merged_module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getattr__(self, name: str) -> Any:
        for kind in ("_parameters", "_modules", "_buffers"):  # as nn.Module, in one call
            stored = self.__dict__.get(kind)
            if stored is not None and name in stored:
                return stored[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(innermost(self), name)  # not the base: that may be an adapter too

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"{type(self).__name__}.{name} belongs to the base; assign to .base.{name} "
                "(and unmerge first), or train the adapter's parameters"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        # torch's part of load_state_dict for one module; the last argument collects errors
        own = (f"{prefix}{name}" for name in self.adapter_parameters())
        if self.merged_module is not None and any(key in state for key in own):
            rest[-1].append(f"{prefix[:-1]} is merged; call minipeft.unmerge(model) first")
            return
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        return "" if self._enabled else "disabled"
