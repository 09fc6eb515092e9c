"""A batch whose rows use different adapters, in one pass.

The factors of all adapters lie side by side, as if they were one adapter of a high rank; a gate
says which of its columns a row of the batch uses:

    hidden = x [A_1; A_2; ...]^T       (rows, ..., capacity * rank)
    hidden = hidden * gate[row]        1 on the columns of the row's adapters, 0 elsewhere
    y      = base(x) + hidden [B_1, B_2, ...]^T

Lower ranks are padded with zeros.  Costs grow with the number of adapters that are loaded, not with
how many a batch uses, and stay below the base's while capacity * rank is below its sizes.  Choosing
other rows, strengths or factors changes tensors in place: a compiled model stays compiled.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minipeft.adapters import refuse_merged, require_adapters
from minipeft.inject import swap
from minipeft.lora import LoRALinear, add_lora, checked_linear
from minipeft.protocol import Adapter
from minipeft.registry import named, stacks
from minipeft.targets import visible_modules
from minipeft.wrapper import Wrapper, innermost

Row = str | None | Sequence[str]  # an adapter, none, or several that add up


class LoRABank(Wrapper):
    """Up to `capacity` LoRA adapters of at most `rank` over one linear layer, gated by row.

    `a` (capacity, rank, in_features) and `b` (capacity, rank, out_features) are buffers of no state
    dict, zero at first; `load` fills a slot.  `gate` (rows, capacity), or (1, capacity) for all
    rows alike, says which rows use which slots; banks of a model may share one tensor.  A batch of
    n times as many rows has n for each row of the gate, side by side, as `generate` has beams.
    Rows whose gate is 0 equal the base bit for bit, whatever else is loaded.  For inference:
    training raises.

    Raises:
        TypeError, ValueError: as LoRALinear; capacity or rank below 1.
    """

    a: Tensor
    b: Tensor
    nameless = True  # it is no adapter of its own

    def __init__(
        self,
        base: nn.Module,
        capacity: int,
        rank: int,
        *,
        gate: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = checked_linear("LoRABank", base)
        if capacity < 1 or rank < 1:
            raise ValueError(f"LoRABank: capacity={capacity}, rank={rank}; expected at least 1")
        super().__init__(base)
        self.capacity, self.rank = capacity, rank
        self.in_features, self.out_features, self.transposed = shape
        device = next(innermost(base).parameters()).device
        with torch.inference_mode(False):  # its tensors could not be changed outside
            for name, size in (("a", shape.in_features), ("b", shape.out_features)):
                zeros = torch.zeros(capacity, rank, size, dtype=dtype, device=device)
                self.register_buffer(name, zeros, persistent=False)
            # shared by the banks of a model, so no buffer: casting one bank would part them
            self.gate = torch.zeros(1, capacity, device=device) if gate is None else gate
        self.take_over()

    def load(self, slot: int, a: Float[Tensor, "r inner"], b: Float[Tensor, "outer r"]) -> None:
        """Copy the factors of one adapter into a slot, padded with zeros to the bank's rank.

        Raises:
            ValueError: no such slot, a rank above the bank's, other sizes, or NaN or Inf, which
                would reach every row (0 * NaN is NaN); nothing changes.
        """
        rank = a.shape[0]
        if not 0 <= slot < self.capacity:
            raise ValueError(f"LoRABank: slot {slot} of {self.capacity}")
        sizes = (a.shape[1], b.shape[0], b.shape[1])
        if rank > self.rank or sizes != (self.in_features, self.out_features, rank):
            raise ValueError(
                f"LoRABank: factors {tuple(a.shape)} and {tuple(b.shape)}; expected (r, "
                f"{self.in_features}) and ({self.out_features}, r) with r at most {self.rank}"
            )
        if not _finite(a, b):
            raise ValueError("LoRABank: the factors hold NaN or Inf; look for a diverged adapter")
        with torch.no_grad():
            self.clear(slot)
            self.a[slot, :rank] = a.to(self.a.dtype)
            self.b[slot, :rank] = b.T.to(self.b.dtype)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.a[slot].zero_()
        self.b[slot].zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "LoRABank: rows of a batch use different adapters, which is for inference; call "
                "minipeft.use_adapters(model, names) to train, or model.eval()"
            )
        out: Tensor = innermost(self)(x)
        compiling = torch.compiler.is_compiling()
        if not compiling and not self._enabled:
            return out
        gate = self.gate * self.strength.to(self.gate.device) if compiling else self.gate
        if len(gate) > 1:
            if x.dim() < 2 or x.shape[0] % len(gate):
                raise ValueError(
                    f"LoRABank: a batch of shape {tuple(x.shape)} for {len(gate)} rows; "
                    "use_adapters(rows=) takes one name for each row of the batch"
                )
            gate = gate.repeat_interleave(x.shape[0] // len(gate), dim=0)
        columns = gate.to(out.device, out.dtype).repeat_interleave(self.rank, dim=1)
        if x.dim() == 1:
            columns = columns[0]
        else:
            columns = columns.view(len(gate), *(1,) * (x.dim() - 2), -1)
        return add_lora(out, x, self.a.flatten(0, 1), self.b.flatten(0, 1).T, columns)

    def _set_strength(self) -> None:
        self.strength.fill_(float(self._enabled))  # the layers' own scales are in `b` already

    @property
    def weight(self) -> Tensor:
        """No weight that all rows share: a meta tensor of the right shape and dtype.

        Models that look at those work, and nn.TransformerEncoderLayer calls the bank.
        """
        plain: Any = innermost(self)
        dtype = getattr(plain, "weight_dtype", None) or plain.weight.dtype
        shape = (self.out_features, self.in_features)
        return torch.empty(shape[::-1] if self.transposed else shape, dtype=dtype, device="meta")

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """None: the adapters are those of the layers below."""
        return {}

    def exact_parameters(self) -> dict[str, Tensor]:
        """Rows use different weights, so there is no weight to merge."""
        raise ValueError("LoRABank: rows of a batch use different adapters; use_adapters first")

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, rank={self.rank}"


def _finite(*factors: Tensor) -> bool:
    return all(bool(factor.isfinite().all()) for factor in factors)


def _wanted(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    return [() if row is None else (row,) if isinstance(row, str) else tuple(row) for row in rows]


def serve_rows(model: nn.Module, rows: Iterable[Row]) -> list[str]:
    """Let row i of every batch use the adapter `rows[i]`: a name, None, or several names.

    Called again with as many rows it changes tensors in place, and takes over factors and scales
    as they are then.  The first axis of what the layers get must be the batch, flattened with
    later axes at most.  A module that has `serve_rows` of its own (the prefixes of a model) is told
    of its adapters.  Returns the names of the modules.

    Raises:
        ValueError: no rows, no such adapter, a merged model, NaN or Inf in an adapter, or one that
            is asked for or on with other layers than LoRALinear; the model is then as it was.
    """
    wanted = _wanted(rows)
    if not wanted:
        raise ValueError("use_adapters: rows is empty; expected one name for each row of the batch")
    refuse_merged("use_adapters", require_adapters("use_adapters", model))
    everything = named(model)
    used = list(dict.fromkeys(name for row in wanted for name in row))
    if unknown := [name for name in used if name not in everything]:
        raise ValueError(
            f"use_adapters: the model has no adapter {unknown}; it has {sorted(everything)}"
        )
    owners = [module for module in model.modules() if _serves_rows(module)]
    own = {id(part): part for owner in owners for part in owner.modules()}
    names = list(everything)  # all of them: other rows may want others
    places = _places(everything, used, own)
    prompts = {
        name
        for owner in owners
        for name in owner.run_by_the_model()  # type: ignore[operator]
    }
    if places and (mixed := prompts & set(used)):
        raise ValueError(
            f"use_adapters: {sorted(mixed)[0]!r} is a prompt, which runs through the model once "
            "for all rows, and LoRA differs by row; bake the prompt, or serve them in two batches"
        )
    present = {n: s[0] for n, s in stacks(model).items() if isinstance(s[0], LoRABank)}
    banks = _banks(model, names, places, present, len(wanted)) if places else {}
    for owner in owners:
        owner.serve_rows(wanted)  # type: ignore[operator]
    with torch.no_grad():
        gate = next((bank.gate for bank in banks.values()), torch.zeros(len(wanted), len(names)))
        gate.zero_()
        for i, row in enumerate(wanted):
            for name in row:
                gate[i, names.index(name)] = 1.0
        for place, layers in places.items():
            bank = banks[place]
            for slot, name in enumerate(names):
                layer = layers.get(name)
                if layer is None:
                    bank.clear(slot)
                else:
                    a, b = layer.factors()
                    bank.load(slot, a, b * (layer.scaling * layer.scale))
    found = [place for name in used for place in everything[name]]
    return list(dict.fromkeys([*places, *found]))


def _serves_rows(module: nn.Module) -> bool:
    return callable(getattr(type(module), "serve_rows", None))


def _places(
    everything: dict[str, dict[str, list[Adapter]]], used: list[str], own: dict[int, nn.Module]
) -> dict[str, dict[str, LoRALinear]]:
    """{module name: {adapter name: its layer}}, for adapters that are LoRALinear throughout."""
    places: dict[str, dict[str, LoRALinear]] = {}
    for name, adapters in everything.items():
        for place, stack in adapters.items():
            if all(id(layer) in own for layer in stack):
                continue
            plain = [layer for layer in stack if type(layer) is LoRALinear]
            if len(plain) != len(stack) or len(plain) != 1:
                if name not in used and not any(layer.enabled for layer in stack):
                    continue
                kinds = [type(layer).__name__ for layer in stack]
                raise ValueError(
                    f"use_adapters: {name!r} has {kinds} over {place!r}; rows of a batch can use "
                    "adapters of one LoRALinear a layer, and others must be off"
                )
            if not place:
                raise ValueError(
                    "use_adapters: the model is itself an adapter layer; put it in one"
                )
            if not _finite(*plain[0].factors()):
                raise ValueError(
                    f"use_adapters: {name!r} holds NaN or Inf over {place!r}, which would reach "
                    "the rows of others; remove it first"
                )
            places.setdefault(place, {})[name] = plain[0]
    return places


def _banks(
    model: nn.Module,
    names: list[str],
    places: dict[str, dict[str, LoRALinear]],
    present: dict[str, LoRABank],
    rows: int,
) -> dict[str, LoRABank]:
    """A bank over each place: those that are there if they fit, or new ones that share a gate."""
    ranks = {p: max(len(layer.factors()[0]) for layer in layers.values())
             for p, layers in places.items()}  # fmt: skip
    fits = set(present) == set(places) and all(
        bank.capacity == len(names) and bank.rank >= ranks[place] and len(bank.gate) == rows
        for place, bank in present.items()
    )
    if fits:
        return present
    if present:
        stop_rows(model)
    first = next(layer for layers in places.values() for layer in layers.values())
    with torch.inference_mode(False):
        gate = torch.zeros(rows, len(names), device=first.lora_a.device)
    modules = visible_modules(model)
    banks = {}
    for place, layers in places.items():
        dtype = torch.float32
        for layer in layers.values():
            dtype = torch.promote_types(dtype, layer.lora_a.dtype)
        banks[place] = LoRABank(modules[place], len(names), ranks[place], gate=gate, dtype=dtype)
    of_module: dict[int, nn.Module] = {id(modules[place]): bank for place, bank in banks.items()}
    swap(model, {n: of_module[id(m)] for n, m in modules.items() if id(m) in of_module})
    return banks


def stop_rows(model: nn.Module) -> None:
    """Take the banks off: every row uses the adapters that are on."""
    banks: dict[str, Any] = {
        n: m.base for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRABank)
    }
    if banks:
        swap(model, banks)
    for module in model.modules():
        if _serves_rows(module):
            module.stop_rows()  # type: ignore[operator]


def refuse_rows(caller: str, model: nn.Module) -> None:
    """Raise ValueError while rows of a batch are told apart."""
    if any(isinstance(module, LoRABank) for module in model.modules()):
        raise ValueError(
            f"{caller}: rows of a batch use different adapters (use_adapters(rows=)); call "
            "minipeft.use_adapters(model, names) first"
        )
