"""Parts of a base that train beside low-rank factors: biases, whole modules, rows of a table.

Each is an adapter layer over an untouched base, so it is saved, switched off and taken off like
any other:

    TrainedBias      base(x) + delta
    TrainedModule    a copy of the base, trained whole: a head, new embeddings
    TrainedTokens    an embedding in which some tokens have trained rows
    TrainedLogits    the head that shares its weight with that embedding
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minipeft.adapters.on_off import Unscaled
from minipeft.adapters.protocol import innermost, keeps_statistics
from minipeft.adapters.wrapper import Wrapper, stored_parameter
from minipeft.layers.casting import CastCall, rounded_like, widened

_CHANNELS_FIRST = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_INSTANCE_NORMS = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}


class AddedBias(Wrapper):
    """A layer that adds one vector to the base's output: the parameter that `vector` names.

    `_trailing` are the axes after the channels' axis, each of size 1; None: the channels are the
    second axis, and all later ones come after it.
    """

    vector: str
    _trailing: tuple[int, ...] | None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output, and what is added; the base may take any arguments."""
        if self.merged_module is not None and self._enabled:
            return self.call_merged(*args, **kwargs)
        out: Tensor = self.base(*args, **kwargs)
        strength = self.strength_now()
        return out if strength is None else self.on_top(out, out, strength)

    def on_top(self, out: Tensor, x: Tensor, strength: float | Tensor) -> Tensor:
        """The output of the layers below, and strength times the vector."""
        added = getattr(self, self.vector) * strength
        after = (1,) * max(0, out.dim() - 2) if self._trailing is None else self._trailing
        return out + added.to(out.dtype).view(*added.shape, *after)

    def exact_parameters(self) -> dict[str, Tensor]:
        """The innermost bias plus strength times the vector."""
        below = self.parameters_below()
        if not self.enabled:
            return below
        bias = self.exact_below("bias", torch.float32)
        return {**below, "bias": bias + getattr(self, self.vector) * self.full_strength}

    @property
    def bias(self) -> Tensor | None:
        """The bias below, and what this layer adds to it."""
        below, strength = super().bias, self.strength_now()
        if strength is None:
            return below
        added: Tensor = getattr(self, self.vector) * strength
        return added if below is None else below + added.to(below.dtype)


class TrainedBias(AddedBias):
    """A module whose bias trains: base(x) + bias_delta, which starts at zero.

    `base` has a bias that it adds to its output: a linear layer, a convolution, a normalisation.
    `bias_delta` has the bias' shape and is float32; it is cast to the output's dtype.

    Raises:
        ValueError: the base has no bias, or uses it inside (nn.MultiheadAttention, recurrent
            layers).

    >>> layer = TrainedBias(nn.Linear(4, 2))
    >>> layer.bias_delta
    Parameter containing:
    tensor([0., 0.], requires_grad=True)
    """

    vector = "bias_delta"

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        plain = innermost(base)
        bias = getattr(plain, "bias", None)
        inside = isinstance(plain, nn.MultiheadAttention | nn.RNNBase | nn.Bilinear)
        if not isinstance(bias, Tensor) or inside:
            raise ValueError(f"TrainedBias: {type(plain).__name__} has no bias that it adds")
        self.bias_delta = nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))
        second = isinstance(plain, _CHANNELS_FIRST)
        self._trailing = None if second else (1,) * spatial_axes(plain)
        self.take_over()

    def trained_bias(self) -> Tensor:
        """The bias with its delta, on or off, float32 or better: what files hold."""
        return stored_parameter("TrainedBias", innermost(self), "bias") + self.bias_delta.detach()


def spatial_axes(module: nn.Module) -> int:
    """How many axes come after the channels', batched or not."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return len(module.kernel_size)
    return next((n for kind, n in _INSTANCE_NORMS.items() if isinstance(module, kind)), 0)


class TrainedModule(Unscaled, Wrapper):
    """A copy of a module that trains whole, beside the frozen original.

    Computes as `copy` while enabled, as `base` otherwise.  `copy` is float32 where the base has 16
    bits (`dtype` asks for another dtype); it takes what the base takes and gives the dtypes that
    the base would give (casting.py).  Merged it is rounded to the base's dtypes, once.  `memo` is
    deepcopy's: modules copied with the same one share what their originals share.  Running
    statistics of norms in it follow the data, as part of the adapter.

    Raises:
        ValueError: the module has no parameters, holds adapters, or holds 4-bit codes.
    """

    copy: nn.Module
    folds_into_base = False
    _call: CastCall

    def __init__(
        self,
        base: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        memo: dict[int, Any] | None = None,
    ) -> None:
        super().__init__(base)
        parameters = list(base.parameters())
        if not parameters and not any(map(keeps_statistics, base.modules())):
            raise ValueError(f"TrainedModule: {type(base).__name__} has no parameters to train")
        if any(not p.is_floating_point() for p in parameters):
            raise ValueError(
                f"TrainedModule: {type(base).__name__} holds codes, which cannot train"
            )
        if any(isinstance(module, Wrapper) for module in base.modules()):
            raise ValueError(f"TrainedModule: {type(base).__name__} holds an adapter already")
        made = copy.deepcopy(base, {} if memo is None else memo)
        self.copy = made._apply(widened) if dtype is None else made.to(dtype)  # type: ignore[no-untyped-call]
        self.__dict__["_call"] = CastCall()
        self.take_over()
        self.copy.requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._enabled:
            return self.base(*args, **kwargs)
        if self.merged_module is not None:
            return self.call_merged(*args, **kwargs)
        return self._call(self.copy, self.base, args, kwargs)

    def on_top(self, out: Tensor, x: Tensor, strength: float | Tensor) -> Tensor:
        """What the copy computes, in place of the layers below.

        Raises:
            TypeError: it returns no tensor of the base's shape.
        """
        made = self._call(self.copy, innermost(self), (x,), {})
        if not isinstance(made, Tensor) or made.shape != out.shape:
            raise TypeError(f"TrainedModule: {type(self.copy).__name__} returns more than a tensor")
        return made

    @property
    def bias(self) -> Tensor | None:
        """The copy's bias in the base's dtype, or the base's while off."""
        its = getattr(self.base, "bias", None)
        mine: Tensor | None = getattr(self.copy, "bias", None) if self._enabled else its
        return mine.to(its.dtype) if isinstance(mine, Tensor) and isinstance(its, Tensor) else mine

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the copy."""
        return {f"copy.{name}": p for name, p in self.copy.named_parameters()}

    def adapter_buffers(self) -> dict[str, Tensor]:
        """Running statistics of the copy, and what else its state dict has."""
        state = self.copy.state_dict(keep_vars=True)
        return {f"copy.{n}": b for n, b in self.copy.named_buffers() if n in state}

    def exact_parameters(self) -> dict[str, Tensor]:
        """Those of the copy, if it is on."""
        return dict(self.copy.named_parameters()) if self.enabled else {}

    def merged(self, *, requantize: bool = False) -> nn.Module:
        """The copy, copied, rounded to the base's dtypes and frozen; the base's copy while off."""
        if requantize:
            raise ValueError("TrainedModule.merged: there are no codes to renew")
        source = self.copy if self.enabled else self.base
        made = rounded_like(copy.deepcopy(source), self.base)
        return made.requires_grad_(False).train(self.training)

    def fold(self, *, requantize: bool = False) -> nn.Module:
        """The trained copy itself, rounded and frozen: the base is not written to."""
        if not self.enabled:
            return self.base
        return rounded_like(self.copy, self.base).requires_grad_(False)


class TrainedTokens(Unscaled, Wrapper):
    """An embedding in which some tokens have rows of their own that train.

    `token_ids` are the tokens, `token_rows` (n, dim) their rows, which start as the table's, in
    float32.  A table that scales its output (Gemma's) scales them too.

    Raises:
        ValueError: no embedding, no ids, an id twice or beyond the table.

    >>> layer = TrainedTokens(nn.Embedding(10, 4), [2, 7])
    >>> layer.token_rows.shape
    torch.Size([2, 4])
    """

    token_ids: Tensor
    _slots: Tensor

    def __init__(self, base: nn.Module, token_ids: Sequence[int]) -> None:
        super().__init__(base)
        count = getattr(innermost(base), "num_embeddings", None)
        if not isinstance(count, int):
            raise ValueError(f"TrainedTokens: {type(innermost(base)).__name__} is no embedding")
        ids, self.token_rows = rows_of(self, token_ids, count)
        slots = torch.full((count,), -1, device=ids.device)
        slots[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("token_ids", ids, persistent=False)
        self.register_buffer("_slots", slots, persistent=False)
        self.take_over()

    def on_top(
        self,
        out: Float[Tensor, "*shape dim"],
        ids: Int[Tensor, "*shape"],
        strength: float | Tensor,
    ) -> Float[Tensor, "*shape dim"]:
        """The output of the layers below, but for the trained tokens their rows."""
        slots = self._slots[ids]
        hit = slots >= 0
        if isinstance(strength, Tensor):  # compiled: 0 is off
            hit = hit & (strength != 0)
        rows = F.embedding(slots.clamp(min=0), self.token_rows)
        scale = getattr(innermost(self), "embed_scale", None)
        if scale is not None:
            rows = rows * scale
        return torch.where(hit[..., None], rows.to(out.dtype), out)

    def exact_parameters(self) -> dict[str, Tensor]:
        """The table with the trained rows in it."""
        below = self.parameters_below()
        if not self.enabled:
            return below
        table = self.exact_below("weight", torch.float32)
        rows = self.token_rows.to(table.dtype)
        return {**below, "weight": table.index_copy(0, self.token_ids, rows)}


class TrainedLogits(Unscaled, Wrapper):
    """The head whose weight is an embedding's: it multiplies by the trained rows of its tokens.

    Owns no parameter: they are those of `tokens`, whose `enabled` it follows.
    """

    tokens: TrainedTokens

    def __init__(self, base: nn.Module, tokens: TrainedTokens) -> None:
        super().__init__(base)
        self.__dict__["tokens"] = tokens  # not a submodule: the embedding has it
        self.take_over()

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocabulary"]:
        out: Tensor = self.base(x)
        if (strength := self.strength_now()) is None:
            return out
        made = self.on_top(out, x, strength)
        return torch.where(strength != 0, made, out) if isinstance(strength, Tensor) else made

    def strength_now(self) -> float | Tensor | None:
        """None while this layer is off, or the layer that has the rows."""
        mine, its = Wrapper.strength_now(self), Wrapper.strength_now(self.tokens)
        return None if mine is None or its is None else mine * its

    def on_top(self, out: Tensor, x: Tensor, strength: float | Tensor) -> Tensor:
        """The output of the layers below, with logits of the trained tokens by their rows."""
        ids = self.tokens.token_ids
        bias = getattr(innermost(self), "bias", None)
        logits = F.linear(x.to(out.dtype), self.tokens.token_rows.to(out.dtype),
                          None if bias is None else bias[ids].to(out.dtype))  # fmt: skip
        return out.index_copy(-1, ids, logits)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """None of its own."""
        return {}

    def exact_parameters(self) -> dict[str, Tensor]:
        """The weight with the trained rows in it."""
        below = self.parameters_below()
        if not (self.enabled and self.tokens.enabled):
            return below
        weight = self.exact_below("weight", torch.float32)
        rows = self.tokens.token_rows.to(weight.dtype)
        return {**below, "weight": weight.index_copy(0, self.tokens.token_ids, rows)}


def rows_of(layer: Wrapper, token_ids: Iterable[int], count: int) -> tuple[Tensor, nn.Parameter]:
    """The ids on the weight's device, and a copy of the weight's rows in float32 or better.

    Raises:
        ValueError: no id, one twice, or one that is no row of a weight of `count` rows; a weight
            on the meta device.
    """
    kind, ids = type(layer).__name__, list(token_ids)
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count]
    if not ids or wrong or len(set(ids)) < len(ids):
        raise ValueError(
            f"{kind}: token ids {wrong[:5] or ids[:5]}; expected different whole numbers "
            f"from 0 to {count - 1}"
        )
    weight: Tensor = innermost(layer).weight  # type: ignore[assignment]
    if weight.is_meta:
        raise ValueError(f"{kind}: the weight is on the meta device; load it first")
    on_device = torch.tensor(ids, device=weight.device)
    rows = weight.detach()[on_device].to(torch.promote_types(weight.dtype, torch.float32))
    return on_device, nn.Parameter(rows.clone())
