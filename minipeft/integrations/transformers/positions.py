"""The arguments of a call of a transformers model, and the rule that numbers its tokens."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TABLES = ("wpe", "embed_positions", "position_embeddings")  # learned absolute positions


class Arguments:
    """`given["position_ids"]` reads an argument (None if absent); assigning changes the call.

    `token_axis` is the axis of the tokens in the pairs of a tuple cache.
    """

    def __init__(
        self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], token_axis: int = 2
    ) -> None:
        self.args, self.kwargs, self._names = args, dict(kwargs), names
        self.token_axis = token_axis

    def __getitem__(self, name: str) -> Any:
        if name in self._names[: len(self.args)]:
            return self.args[self._names.index(name)]
        return self.kwargs.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._names[: len(self.args)]:
            index = self._names.index(name)
            self.args = (*self.args[:index], value, *self.args[index + 1 :])
        else:
            self.kwargs[name] = value


def names_of(module: nn.Module) -> list[str]:
    """The names of the parameters of `module.forward`, in their order."""
    return list(inspect.signature(module.forward).parameters)


def seen(given: Arguments) -> Any:
    """How many tokens the cache holds; a tensor where the cache is static."""
    cache = given["past_key_values"]
    if isinstance(cache, (tuple, list)):  # a pair for each layer
        return 0 if not cache or cache[0] is None else int(cache[0][0].shape[given.token_axis])
    return 0 if cache is None else cache.get_seq_length()


def tokens(given: Arguments) -> Tensor:
    """A tensor (batch, tokens, ...) of the call; without text, its first tensor (batch, ...)."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(found := given[name], Tensor):
            return found
    return next(v for v in (*given.args, *given.kwargs.values()) if isinstance(v, Tensor))


def check_mask(given: Arguments) -> None:
    """Raise ValueError unless a 2-D mask covers the cached and the new tokens, and them alone."""
    mask, held = given["attention_mask"], seen(given)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not isinstance(held, int):
        return
    expected, cache = held + tokens(given).shape[1], given["past_key_values"]
    most = getattr(cache, "get_max_length", lambda: -1)() if held or cache is not None else -1
    if mask.shape[1] not in (expected, most):  # a static cache's mask may cover all its slots
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens; expected {expected}, cached and new "
            "ones together (the prefix takes no part in it)"
        )


def _counted(given: Arguments, pad: int | None) -> Tensor:
    """0, 1, 2, ... after what the cache holds: most models."""
    found = tokens(given)
    counted: Tensor = torch.arange(found.shape[1], device=found.device) + seen(given)
    return counted[None]


def _unpadded(given: Arguments, pad: int | None) -> Tensor:
    """The number of tokens before it, padding not counted; -1 for padding: OPT."""
    mask = given["attention_mask"]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return _counted(given, pad)
    numbered = (mask.cumsum(1) * mask - 1).long()
    new = tokens(given).shape[1]
    slots: Tensor = torch.arange(new, device=mask.device) + seen(given)
    return numbered.gather(1, slots.expand(len(mask), -1))


def _behind_padding_id(given: Arguments, pad: int | None) -> Tensor:
    """Counted from the padding token's id, which is the number of padding itself: RoBERTa."""
    ids = given["input_ids"]
    if pad is None or ids is None:
        return _counted(given, pad) + 1 + (pad or 0)
    real = (ids != pad).long()
    numbered: Tensor = real.cumsum(1) * real + pad
    return numbered


RULES: dict[str, Callable[[Arguments, int | None], Tensor]] = {
    "counted": _counted, "unpadded": _unpadded, "behind the padding id": _behind_padding_id,
}  # fmt: skip


def padding_id(base: nn.Module) -> int | None:
    """The id of the padding token, if it is one of the vocabulary."""
    pad = getattr(base.config, "pad_token_id", None)
    table = embedding_of(base)
    rows = getattr(table, "num_embeddings", 0)
    return pad if isinstance(pad, int) and 0 <= pad < rows else None


def renumber(
    given: Arguments, rule: str, pad: int | None, by: int | Tensor, unpadded: int | Tensor
) -> None:
    """Add `by` (a number, or (batch, 1)) to the caller's positions, or to those of the rule.

    Rows where `unpadded` is not 0 leave their padding out of the count, whatever the rule: where
    attention sees only how far apart two tokens are, padding between a prefix and the text would
    move them apart.
    """
    numbers = given["position_ids"]
    if numbers is None:
        numbers = RULES[rule](given, pad)
        if rule == "counted":
            without = _unpadded(given, pad).clamp(min=0)
            if isinstance(unpadded, Tensor):
                numbers = torch.where(unpadded != 0, without, numbers)
            elif unpadded:
                numbers = without
    given["position_ids"] = numbers + by


def table_rows(base: nn.Module) -> int | None:
    """How many positions a table holds, learned or not; None where positions are computed."""
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding):
            return module.num_embeddings - int(getattr(module, "offset", 0))
        table = getattr(module, "embed_positions", None)  # sines and cosines: CodeGen, GPT-J
        if isinstance(table, Tensor) and table.dim() == 2:
            return len(table)
    return None


def check_table(
    given: Arguments, rule: str | None, pad: int | None, rows: int | None, position: str
) -> None:
    """Raise ValueError if a position lies beyond a table of `rows`."""
    texts = given["input_ids"] is not None or given["inputs_embeds"] is not None
    if (
        rows is None or not texts or torch.compiler.is_compiling()
    ):  # a compiled lookup checks its own bounds
        return
    positions = given["position_ids"]
    if positions is None:
        positions = RULES[rule or "counted"](given, pad)
    last = int(positions.max()) if positions.numel() else -1
    if last >= rows:
        which = "the text must fit it"
        if position == "shift":
            which = "prefix and text must fit it together (or attach with position='none')"
        raise ValueError(
            f"position {last} is beyond the model's table of {rows} positions; {which}"
        )


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run(model: nn.Module, *, use_cache: bool = False, **arguments: Any) -> Any:
    """The model's output for these arguments, in eval mode and without gradients.

    Raises:
        ValueError: the model cannot be run like this.
    """
    if "use_cache" in names_of(model) and "past_key_values" in names_of(model):
        arguments["use_cache"] = use_cache
    with quietly(model):
        try:
            return model(**arguments)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} could not be run on a few tokens "
                f"({', '.join(arguments)}): {type(error).__name__}: {error}.  If it needs other "
                "inputs, pass example=, the keyword arguments of one forward"
            ) from error


def find_rule(base: nn.Module) -> str | None:
    """The one of RULES by which the model numbers its tokens; None: another, or no numbers.

    The model gets three tokens of which the middle one is padding, once without numbers and once
    with those of each rule.  The first rule with the same output is the model's.
    """
    if "position_ids" not in names_of(base):
        return None
    ids, pad = _with_padding(base)
    mask = torch.tensor([[1, 0, 1]], device=ids.device)
    own = _last(run(base, input_ids=ids, attention_mask=mask))
    given = Arguments([], (), {"input_ids": ids, "attention_mask": mask})
    for name, rule in RULES.items():
        there = rule(given, pad)
        if torch.equal(own, _last(run(base, input_ids=ids, attention_mask=mask,
                                      position_ids=there.clamp(min=0)))):  # fmt: skip
            return name
    return None


def matter(base: nn.Module) -> bool:
    """Whether other position_ids make another output."""
    if "position_ids" not in names_of(base):
        return False
    ids, _ = _with_padding(base)
    near = torch.tensor([[0, 1, 2]], device=ids.device)
    far = torch.tensor([[0, 2, 5]], device=ids.device)
    return not torch.equal(*(_last(run(base, input_ids=ids, position_ids=p)) for p in (near, far)))


def only_distance(base: nn.Module) -> bool:
    """Whether the model sees distances between tokens alone, and not their numbers.

    All tokens are numbered higher by the same, which must change far less than other distances do:
    in 16 bits a model with rotary attention rounds other angles, and one with a table of positions
    may have neighbours there that are nearly equal.
    """
    if "position_ids" not in names_of(base):
        return False
    ids, _ = _with_padding(base)
    most = min(64, int(getattr(base.config, "max_position_embeddings", None) or 64))
    near, higher, apart = (
        _last(run(base, input_ids=ids, position_ids=torch.tensor([numbers], device=ids.device)))
        for numbers in ([0, 1, 2], [most - 3, most - 2, most - 1], [0, most // 4, most // 2])
    )
    return float((near - higher).float().norm()) <= 0.5 * float((near - apart).float().norm())


def is_causal(base: nn.Module) -> bool:
    """Whether the first token's output is independent of the second token.

    Up to rounding: experts batch tokens in another order when another is chosen.
    """
    device = device_of(base.get_input_embeddings())  # type: ignore[operator]
    texts = torch.tensor([[3, 4], [3, 5]], device=device)
    one, other = run(base, input_ids=texts).last_hidden_state.float()
    change = (one - other).abs().amax(1)
    return bool(change[0] <= 1e-2 * change[1])


def embedding_of(model: Any) -> nn.Module | None:
    """The module that embeds the model's input; None where the model names none."""
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found


def input_device(model: nn.Module) -> torch.device:
    """Where the model's input belongs.

    Raises:
        ValueError: the model has no values yet.
    """
    table = embedding_of(model)
    return device_of(model if getattr(table, "weight", None) is None else table)


def device_of(table: nn.Module | None) -> torch.device:
    """Where an embedding computes: accelerate keeps the weights of offloaded modules elsewhere."""
    weight = getattr(table, "weight", None)
    if weight is None and table is not None:  # of images, say: several modules embed them
        weight = next((p for p in table.parameters() if not p.is_meta), None)
    hook = getattr(table, "_hf_hook", None)
    elsewhere = getattr(hook, "execution_device", None)
    if isinstance(weight, Tensor) and not weight.is_meta:
        return weight.device
    if elsewhere is None:
        raise ValueError("the model has no values yet (meta device); load it first")
    return torch.device(elsewhere)


def _last(output: Any) -> Tensor:
    states: Tensor = output.last_hidden_state
    return states[:, -1]


def _with_padding(base: nn.Module) -> tuple[Tensor, int | None]:
    """Three token ids of which the middle one is padding where the model knows such an id."""
    device = device_of(base.get_input_embeddings())  # type: ignore[operator]
    pad = padding_id(base)
    real = [i for i in range(4) if i != pad][:2]
    return torch.tensor([[real[0], 0 if pad is None else pad, real[1]]], device=device), pad
